"""The linear layer on a tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.nn.tile import TileModule
from lightning_lrtt.ops.product_kernels import projects


class LRTTLinear(TileModule):
    """``y = x (C + alpha A B)^T + bias`` with C, A, B on an LR-TT tile.

    ``weight`` is C, so that a digital checkpoint loads by name; it takes no gradient, the optimizer `LRTT` moves it.

    Args:
        in_features: k.
        out_features: d.
        bias: Whether there is a digital bias.
        config: The tile's numbers.
        device: Torch device.
        dtype: float32; float64 for tiles that are digital throughout.
        tile: See `TileModule`.

    Shape:
        input ``[..., k]``, output ``[..., d]``; N is the product of the leading dimensions.

    Example:
        >>> import torch
        >>> layer = LRTTLinear(6, 4, config=LRTTConfig(rank=2))
        >>> layer(torch.zeros(3, 6)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: LRTTConfig = LRTTConfig(),  # noqa: B008
        device: Any = None,
        dtype: torch.dtype | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__((out_features, in_features), config, bias, device, dtype, tile)
        self.in_features, self.out_features = in_features, out_features
        self.reset_parameters()

    @classmethod
    def from_digital(cls, linear: nn.Linear, config: LRTTConfig, tile: int | None = None) -> LRTTLinear:
        """Take over ``linear``'s weight and bias; both keep their Parameter identity.

        Bounded devices clip the weight.
        """
        new = cls(
            linear.in_features, linear.out_features, linear.bias is not None, config, "meta", linear.weight.dtype, tile
        )
        return new.adopt(linear)

    def to_digital(self) -> nn.Linear:
        """A plain layer with the effective weight."""
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.weight.dtype)
        new.weight = nn.Parameter(self.effective_weight(), self.A.requires_grad)
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.read(x)

    def project(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    def project_backward(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        by_x = grad @ w if needs[0] else None
        by_w = self.outer(grad, x) if needs[1] else None
        return by_x, by_w

    def mix(self, z: Tensor, a: Tensor) -> Tensor:
        return F.linear(z, a)

    def mix_backward(self, grad: Tensor, z: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        by_a, rows = self.outer(grad, z), self.samples(grad)
        if grad.dtype not in (torch.bfloat16, torch.float16) or not projects(rows, a.shape[1]):
            return grad @ a, by_a, None
        by_z = grad.new_empty((*grad.shape[:-1], a.shape[1]))
        top = torch.ops.lrtt.project_(self.samples(by_z), rows, a.t().contiguous(), None)
        return by_z, by_a, top

    def outer(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``rows^T columns`` over all samples; of half-precision operands on a GPU in float32, as they are added up."""
        left, right = self.samples(rows).t(), self.samples(columns)
        if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(left, right, out_dtype=torch.float32)
        return left @ right

    def add_mix(self, y: Tensor, z: Tensor, a: Tensor, alpha: float) -> None:
        # One matrix product that accumulates, instead of a product, a temporary of y's size and an addition.
        y.view(-1, a.shape[0]).addmm_(self.samples(z), a.t(), alpha=alpha)

    def products(
        self, x: Tensor, c: Tensor, a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        k, r = c.shape[1], b.shape[0]
        # Rows of 16 bytes are what fast kernels ask for; in float16 a small alpha A could vanish.
        if x.dtype == dtype or (k + r) % 8 != 0 or (dtype == torch.float16 and alpha != 1.0):
            return super().products(x, c, a, b, alpha, dtype)
        # x and C are copied into another dtype anyway: side by side with x B^T and alpha A they give y in one product of
        # k + r columns, which saves reading and writing y for the factors' part.
        rows = x.new_empty((*x.shape[:-1], k + r), dtype=dtype)
        columns = c.new_empty((c.shape[0], k + r), dtype=dtype)
        b = b.to(dtype)
        own_x, z, own_c, own_a = rows[..., :k], rows[..., k:], columns[:, :k], columns[:, k:]
        top, samples = None, x.reshape(-1, k)
        if x.dtype == torch.float32 and projects(samples, r):
            top = torch.ops.lrtt.project_(self.samples(z), samples, b, self.samples(own_x))
        else:
            torch.ops.lrtt.narrow_rows_(self.samples(own_x), samples)
            torch.mm(self.samples(own_x), b.t(), out=self.samples(z))
        torch.ops.lrtt.narrow_rows_(own_c, c)
        if alpha == 1.0:
            a = own_a.copy_(a)
        else:
            a = a.to(dtype)
            torch.mul(a, alpha, out=own_a)
        return F.linear(rows, columns), own_x, z, own_c, a, b, top

    def add_project_backward(self, grad_x: Tensor, grad: Tensor, x: Tensor, w: Tensor, alpha: float) -> None:
        grad_x.view(-1, w.shape[1]).addmm_(self.samples(grad), w, alpha=alpha)

    def with_project_backward(
        self, grad_x: Tensor, grad: Tensor, x: Tensor, w: Tensor, alpha: float, dtype: torch.dtype
    ) -> Tensor:
        if dtype != torch.float32 or grad_x.dtype == torch.float32:
            return super().with_project_backward(grad_x, grad, x, w, alpha, dtype)
        rows: Tensor = torch.ops.lrtt.add_product(grad_x.reshape(-1, w.shape[1]), self.samples(grad), w, alpha)
        return rows.view(grad_x.shape)

    def with_mix(self, y: Tensor, z: Tensor, a: Tensor, alpha: float) -> Tensor:
        return torch.addmm(self.samples(y), self.samples(z), a.t(), alpha=alpha).view(y.shape)

    def add_bias(self, y: Tensor) -> Tensor:
        assert self.bias is not None
        return y + self.bias.to(y.dtype)  # as nn.Linear, whose output has the autocast dtype

    def samples(self, features: Tensor) -> Tensor:
        return features.reshape(-1, features.shape[-1])

    def patches(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.samples(x)

    def chunks(self, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        yield 0, x, self.samples(x)

    def unsamples(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(*x.shape[:-1], rows.shape[1])

    def fold(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(x.shape)
