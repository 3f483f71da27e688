"""What a pulsed tile remembers between backward and step: the operands of its outer products."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Operands:
    """One call of the layer: input x, ``X_B = x B^T``, output gradient D and ``D_A = D A``, in the layer's own shapes."""

    x: Tensor
    xb: Tensor
    d: Tensor
    da: Tensor
    version: int = 0  # of x, which belongs to the user
    x_top: Tensor | None = None  # int32 [N], as `pulsed_update_` takes them, where the products gave them by the way
    d_top: Tensor | None = None


def _copies(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of both in one operation, which is one launch on a GPU."""
    both = torch.cat((a.reshape(-1), b.reshape(-1)))
    return both[: a.numel()].view(a.shape), both[a.numel() :].view(b.shape)


@dataclass
class Latch:
    """Operands of all calls since the last step, in the order of their backward passes, and the sums of their gradients.

    Args:
        calls: One entry per backward pass through a pulsed layer.
        samples: N of all calls.
        grad_a: Sum of the exact factor gradients of A ``[d, r]`` as backward produced them (g0 in the docs).
        grad_b: The same for B ``[r, k]``.
    """

    calls: list[Operands] = field(default_factory=list)
    samples: int = 0
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None
    task: int = -1

    def enter(self, task: int, no_grad: bool) -> None:
        """Called by every backward pass through the layer: ``task`` numbers the pass, ``no_grad`` says that A has no
        ``.grad``. A new pass that finds none starts afresh: ``model.zero_grad()`` was called instead of the optimizer's.
        """
        if no_grad and task != self.task:
            self.clear()
        self.task = task

    def add(
        self, operands: Operands, grad_a: Tensor, grad_b: Tensor, copies: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Append one call. The sums are built in autograd's own order, so they equal ``p.grad`` bit for bit.

        Copies of the gradients, which are made here unless given: autograd may keep the very tensors that backward
        returns as p.grad, and clipping writes there.
        """
        self.calls.append(operands)
        if self.grad_a is None or self.grad_b is None:
            self.grad_a, self.grad_b = copies or _copies(grad_a, grad_b)
        else:
            self.grad_a, self.grad_b = self.grad_a + grad_a, self.grad_b + grad_b

    def clear(self) -> None:
        """Forget everything: after a step, and when gradients are zeroed."""
        self.calls.clear()
        self.samples = 0
        self.grad_a = self.grad_b = None

    def merged(self) -> list[Operands]:
        """All calls as one where they differ in batch size at most, otherwise one by one.

        Raises:
            RuntimeError: If an input was modified in place since its backward pass.
        """
        if any(call.x._version != call.version for call in self.calls):
            raise RuntimeError(
                "LRTT: the input of a pulsed layer must stay as it is until the optimizer's step, but it was "
                "modified in place after backward; pass a copy (x.clone()) to the layer"
            )
        shapes = {(c.x.shape[1:], c.xb.shape[1:], c.x.dtype, c.d.dtype) for c in self.calls}
        if len(self.calls) == 1 or len(shapes) > 1:
            return self.calls
        x, xb, d, da = (torch.cat([getattr(c, name) for c in self.calls]) for name in ("x", "xb", "d", "da"))
        self.calls = [Operands(x, xb, d, da)]
        return self.calls
