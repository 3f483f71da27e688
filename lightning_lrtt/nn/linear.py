"""The linear layer on a tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.nn.multiplication import Gradients, Kept, Products
from lightning_lrtt.nn.tile import TileModule
from lightning_lrtt.ops.product_kernels import HALVES, is_small, projects


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

    def project(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, w, bias)

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
        if not projects(rows, a.shape[1], grad.dtype):
            return grad @ a, by_a, None
        by_z = grad.new_empty((*grad.shape[:-1], a.shape[1]))
        top = torch.ops.lrtt.project_(self.samples(by_z), rows, a.t().contiguous(), None)
        return by_z, by_a, top

    def outer(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``rows^T columns`` over all samples; of half-precision operands on a GPU in float32, as they are added up."""
        left, right = self.samples(rows).t(), self.samples(columns)
        if rows.is_cuda and rows.dtype in HALVES:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left @ right

    def add_mix(self, y: Tensor, z: Tensor, a: Tensor, alpha: float) -> None:
        # One matrix product that accumulates, instead of a product, a temporary of y's size and an addition.
        y.view(-1, a.shape[0]).addmm_(self.samples(z), a.t(), alpha=alpha)

    def factor_product(self, x: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = self.samples(x)
        if not projects(rows, b.shape[0], dtype):
            return super().factor_product(x, b, dtype)
        z = x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype)
        narrow = None if x.dtype == dtype else rows.new_empty(rows.shape, dtype=dtype)
        top = torch.ops.lrtt.project_(self.samples(z), rows, b, narrow)
        return x if narrow is None else narrow.view(x.shape), z, top

    def takes_one_launch(self, x: Tensor) -> bool:
        return is_small(x, self.weight, self.config.rank)

    def products(
        self, x: Tensor, c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, dtype: torch.dtype
    ) -> Products:
        if dtype != x.dtype or not is_small(x, c, b.shape[0]):
            return super().products(x, c, a, b, bias, alpha, dtype)
        own_bias = None if bias is None else bias.to(dtype).contiguous()
        y, z, top = torch.ops.lrtt.small_forward(x, c, a, b, own_bias, alpha)
        return Products(y, Kept(x, z, c, a, b), False, top)

    def gradients(
        self, grad: Tensor, kept: Kept, merged: bool, alpha: float, bias: torch.dtype | None, x: torch.dtype | None
    ) -> Gradients:
        if merged or not is_small(grad, kept.w, kept.a.shape[1]):
            return super().gradients(grad, kept, merged, alpha, bias, x)
        dz, by_a, by_b, *copies, by_bias, by_x, top = torch.ops.lrtt.small_backward(grad, *kept, alpha, x is not None)
        own_x, own_bias = None if x is None else by_x, None if bias is None else by_bias
        return Gradients(dz, by_a, by_b, own_bias, own_x, top, (copies[0], copies[1]))

    def input_gradient(self, grad: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        if grad.is_cuda and grad.dtype in HALVES and dtype == torch.float32:  # as it is added up
            return torch.mm(self.samples(grad), w, out_dtype=torch.float32).view(*grad.shape[:-1], w.shape[1])
        return super().input_gradient(grad, x, w, dtype)

    def add_input_gradient(self, grad_x: Tensor, grad: Tensor, x: Tensor, w: Tensor, alpha: float) -> None:
        grad_x.view(-1, w.shape[1]).addmm_(self.samples(grad), w, alpha=alpha)

    def with_mix(self, y: Tensor, z: Tensor, a: Tensor, alpha: float) -> Tensor:
        return torch.addmm(self.samples(y), self.samples(z), a.t(), alpha=alpha).view(y.shape)

    def add_bias(self, y: Tensor) -> Tensor:
        assert self.bias is not None
        return y + self.bias.to(y.dtype)  # as nn.Linear, whose output has the autocast dtype

    def bias_gradient(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return self.samples(grad).sum(0, dtype=dtype)

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
