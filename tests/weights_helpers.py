"""Checkpoint files for the tests, written by the gguf and safetensors libraries, and a small Llama-shaped module."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn

DIM, HEADS, KV_HEADS, HIDDEN, VOCAB = 64, 4, 2, 96, 50


def random_blocks(rng: np.random.Generator, kind: Kind, rows: int, blocks: int) -> np.ndarray:
    """``[rows, bytes]`` of random blocks whose half-precision scales are finite, so that every element is a number."""
    _size, width = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * blocks, width), dtype=np.uint8)
    scales = {
        "Q4_0": (0,),
        "Q4_1": (0, 2),
        "Q5_0": (0,),
        "Q5_1": (0, 2),
        "Q8_0": (0,),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
        "F16": (0,),
    }
    for at in scales.get(kind.name, ()):
        half = raw[:, at : at + 2].copy().view(np.uint16)
        raw[:, at : at + 2] = np.where(half & 0x7C00 == 0x7C00, half & 0xBFFF, half).view(np.uint8)
    if kind.name == "MXFP4":
        raw[:, 0] = np.minimum(raw[:, 0], 250)
    if kind.name in ("F32", "BF16"):
        values = rng.standard_normal((rows * blocks, 1)).astype(np.float32)
        raw = values.view(np.uint8) if kind.name == "F32" else values.view(np.uint8)[:, 2:].copy()
    return raw.reshape(rows, blocks * width)


def decoded(raw: np.ndarray, kind: Kind) -> Tensor:
    """What gguf.quants makes of the blocks."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.array(gguf.dequantize(raw, kind), dtype=np.float32))


def write_gguf(
    path: Path, tensors: Mapping[str, tuple[np.ndarray, Kind]], arch: str = "llama", **metadata: Any
) -> Path:
    """Write values quantised as given; ints and strings of ``metadata`` are added under ``arch.``-less keys."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.k_proj = nn.Linear(DIM, DIM // HEADS * KV_HEADS, bias=False)
        self.o_proj = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k_proj(x).repeat(1, 1, HEADS // KV_HEADS)
        return self.o_proj(torch.tanh(self.q_proj(x) * k))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm = nn.RMSNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(x)


class Body(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.RMSNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Llama(nn.Module):
    """Names and shapes of a Hugging Face Llama; the arithmetic is only meant to use every parameter."""

    def __init__(self, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.model = Body(layers)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.model(x))


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp's converter writes them (LlamaModel.permute)."""
    return values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_llama(
    path: Path, layers: int = 2, kind: Kind = Kind.Q8_0, head: bool = True, scale: float = 0.1, arch: str = "llama"
) -> dict[str, Tensor]:
    """A GGUF file of `Llama` with random weights, as llama.cpp writes it; returns the decoded weights by HF name."""
    rng = np.random.default_rng(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    state = Llama(layers).state_dict()
    tensors, expected = {}, {}
    for name, value in state.items():
        if name == "lm_head.weight" and not head:
            continue
        values = (scale * rng.standard_normal(tuple(value.shape))).astype(np.float32)
        own = kind if values.ndim == 2 else Kind.F32
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name and "mlp" not in name else 0
        stored = interleave(values, heads) if heads else values
        # A row is quantised by itself, so decoding and permuting commute.
        expected[name] = decoded(gguf.quantize(values, own), own).view(values.shape)
        source = names.get_name(name, (".weight",))
        assert source is not None
        tensors[source] = (stored, own)
    if not head:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    write_gguf(
        path,
        tensors,
        arch,
        **{
            f"{arch}__block_count": layers,
            f"{arch}__attention__head_count": HEADS,
            f"{arch}__attention__head_count_kv": KV_HEADS,
        },
    )
    return expected


# ------------------------------------------------------------------ GGUF files by hand, for broken ones


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def info(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int, n_dims: int | None = None) -> bytes:
    """A tensor's record."""
    return (
        text(name)
        + struct.pack("<I", len(dims) if n_dims is None else n_dims)
        + b"".join(struct.pack("<Q", d) for d in dims)
        + struct.pack("<IQ", kind, offset)
    )


def header(tensors: int = 0, metadata: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    """The first 24 bytes."""
    return magic + struct.pack("<IQQ", version, tensors, metadata)


def whole(records: list[bytes], data: int, metadata: tuple[bytes, ...] = (), alignment: int = 32) -> bytes:
    """A file of these records with ``data`` zero bytes behind them."""
    head = header(len(records), len(metadata)) + b"".join(metadata) + b"".join(records)
    return head + bytes(-len(head) % alignment + data)
