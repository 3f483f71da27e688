"""What a layer on a tile says about its multiplication: everything that linear layers and convolutions do differently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

_SMALL = 2**20  # cells


class Kept(NamedTuple):
    """What a read keeps for its backward pass: operands in the dtype of the products."""

    x: Tensor
    z: Tensor  # X_B
    w: Tensor  # C, or C + alpha A B (`Products.merged`)
    a: Tensor
    b: Tensor


class Products(NamedTuple):
    """What a read computes."""

    y: Tensor
    kept: Kept
    merged: bool  # whether kept.w contains the factors, and kept.a and kept.b are copies
    x_top: Tensor | None  # as `Operands.x_top`


class Gradients(NamedTuple):
    """What backward owes the factors, the bias and the input."""

    dz: Tensor  # D_A
    a: Tensor
    b: Tensor
    bias: Tensor | None
    x: Tensor | None
    d_top: Tensor | None  # as `Operands.d_top`
    copies: tuple[Tensor, Tensor] | None = None  # of the gradients of A and B, where they came by the way


class Multiplication(nn.Module):
    """How a layer multiplies by a matrix of its tile, and how its activations are cut into samples.

    A sample is one row of x and of the output's gradient: an input of a linear layer, a position of a convolution.
    """

    def project(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """x times a matrix ``[rows, k]``: ``x w^T`` for a linear layer, a convolution with ``rows`` outputs otherwise."""
        raise NotImplementedError

    def project_backward(
        self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of `project` by x and by w (as ``[rows, k]``); None where not needed."""
        raise NotImplementedError

    def takes_one_launch(self, x: Tensor) -> bool:
        """Whether `products` of x, and `gradients`, are one kernel each."""
        return False

    def mix(self, z: Tensor, a: Tensor) -> Tensor:
        """z times A^T: r features to d."""
        raise NotImplementedError

    def mix_backward(self, grad: Tensor, z: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of `mix` by z and by A; and `Operands.d_top`, where it is at hand."""
        raise NotImplementedError

    def add_mix(self, y: Tensor, z: Tensor, a: Tensor, alpha: float) -> None:
        """``y += alpha mix(z, a)`` in place."""
        y.add_(self.mix(z, a), alpha=alpha)

    def products(
        self, x: Tensor, c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, dtype: torch.dtype
    ) -> Products:
        """``y = project(x, c) + alpha mix(z, a) + bias`` with ``z = project(x, b)``, in ``dtype``.

        Where C is copied into another dtype anyway, the copy is ``C + alpha A B``, rounded once: like dense training in
        mixed precision, and y and the gradient of x are one product each. So for small C on a GPU, where a pass over C
        takes less time than the launches that it saves.
        """
        merged = dtype != c.dtype or (c.is_cuda and c.numel() <= _SMALL)
        if merged:
            w, a_t, b = torch.ops.lrtt.merge(c.flatten(1), a, b, alpha, dtype)
            a = a_t.t()
            x, z, x_top = self.factor_product(x, b, dtype)
            y = self.project(x, w, None if bias is None else bias.to(dtype))
        else:
            w = c
            x, z, x_top = self.factor_product(x, b, dtype)
            y = self.project(x, c)
            self.add_mix(y, z, a, alpha)
            if bias is not None:
                y = self.add_bias(y)
        return Products(y, Kept(x, z, w, a, b), merged, x_top)

    def factor_product(self, x: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """x in ``dtype``, ``project(x, b)`` of it, and `Operands.x_top` where it is at hand."""
        x = x.to(dtype)
        return x, self.project(x, b), None

    def gradients(
        self, grad: Tensor, kept: Kept, merged: bool, alpha: float, bias: torch.dtype | None, x: torch.dtype | None
    ) -> Gradients:
        """What the output gradient ``grad`` says to A and B, and where a dtype is given, to the bias and to the input."""
        dz, by_a, d_top = self.mix_backward(grad, kept.z, kept.a)
        _, by_b = self.project_backward(dz, kept.x, kept.b, (False, True))
        assert by_b is not None
        by_bias, by_x = None if bias is None else self.bias_gradient(grad, bias), None
        if x is not None:
            by_x = self.input_gradient(grad, kept.x, kept.w, x)
            if not merged:
                self.add_input_gradient(by_x, dz, kept.x, kept.b, alpha)
        if alpha != 1.0:
            by_a, by_b = alpha * by_a, alpha * by_b
        return Gradients(dz, by_a, by_b, by_bias, by_x, d_top)

    def input_gradient(self, grad: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of `project` by x, in ``dtype``."""
        by_x, _ = self.project_backward(grad, x, w, (True, False))
        assert by_x is not None
        return by_x.to(dtype)

    def add_input_gradient(self, grad_x: Tensor, grad: Tensor, x: Tensor, w: Tensor, alpha: float) -> None:
        """``grad_x += alpha`` times the gradient of `project` by x, in place."""
        grad_x.add_(self.input_gradient(grad, x, w, grad_x.dtype), alpha=alpha)

    def with_mix(self, y: Tensor, z: Tensor, a: Tensor, alpha: float) -> Tensor:
        """``y + alpha mix(z, a)`` by ordinary autograd."""
        return y + self.mix(alpha * z, a)

    def add_bias(self, y: Tensor) -> Tensor:
        """y plus the bias, broadcast over samples."""
        raise NotImplementedError

    def bias_gradient(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of the bias from that of the output, added up in ``dtype``."""
        raise NotImplementedError

    def samples(self, features: Tensor) -> Tensor:
        """``[N, features]`` view or copy of an activation, one row a sample."""
        raise NotImplementedError

    def patches(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Bounded chunks of the unfolded input: (index of the first sample, ``[n, k]``)."""
        raise NotImplementedError

    def chunks(self, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Bounded pieces of x for analog reads: (index of the first sample, piece of x, its samples ``[n, k]``)."""
        raise NotImplementedError

    def unsamples(self, rows: Tensor, x: Tensor) -> Tensor:
        """``[N, features]`` in the shape of the layer's output for x; `samples` undoes it."""
        raise NotImplementedError

    def fold(self, rows: Tensor, x: Tensor) -> Tensor:
        """The gradient of x from that of its samples ``[n, k]``."""
        raise NotImplementedError
