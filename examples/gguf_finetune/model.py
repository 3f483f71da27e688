"""A small Llama on bytes, with Hugging Face's names: an ordinary LightningModule."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


def rotate(x: Tensor) -> Tensor:
    """Rotary positions on ``[batch, heads, time, head_dim]``, halves as Hugging Face pairs them."""
    time, half = x.shape[-2], x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(time, device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal attention with grouped queries."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim // heads * kv_heads, bias=False)
        self.v_proj = nn.Linear(dim, dim // heads * kv_heads, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, dim]`` to the same."""
        batch, time, dim = x.shape
        q = self.q_proj(x).view(batch, time, self.heads, -1).transpose(1, 2)
        k, v = (p(x).view(batch, time, self.kv_heads, -1).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, dim))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, dim]`` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(dim, heads, kv_heads), Mlp(dim, hidden)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, 1e-5), nn.RMSNorm(dim, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, dim]`` to the same."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, dim: int, layers: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, 1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, time]`` to ``[batch, time, dim]``."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Llama(nn.Module):
    """Bytes ``[batch, time]`` to logits ``[batch, time, 256]``."""

    def __init__(self, dim: int = 128, layers: int = 2, heads: int = 4, kv_heads: int = 2, hidden: int = 256) -> None:
        super().__init__()
        self.model = Body(dim, layers, heads, kv_heads, hidden)
        self.lm_head = nn.Linear(dim, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte."""
        return self.lm_head(self.model(tokens))


class ByteLlama(pl.LightningModule):
    """Next-byte prediction; built without memory, which the strategy's ``pretrained`` gives it.

    Args:
        dim: Width; a multiple of 32, the block of Q8_0 and Q4_0.
        layers: Depth.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        hidden: Width of the MLP; a multiple of 32.
        lr: Learning rate.
    """

    def __init__(
        self, dim: int = 128, layers: int = 2, heads: int = 4, kv_heads: int = 2, hidden: int = 256, lr: float = 0.002
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        with torch.device("meta"):
            self.net = Llama(dim, layers, heads, kv_heads, hidden)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("val/loss", loss, prog_bar=True)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
