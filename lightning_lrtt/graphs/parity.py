"""Running one step twice: in-place copies of state, and how far two results lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["StateCopy", "max_difference"]


class StateCopy:
    """Values of tensors and of the random generators, to be put back in place.

    Args:
        tensors: What a step may change.
        device: Its device; on CUDA that generator is copied too.

    Example:
        >>> w = torch.zeros(2)
        >>> copy = StateCopy([w], w.device)
        >>> w += 1
        >>> copy.restore()
        >>> w.tolist()
        [0.0, 0.0]
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors = list(tensors)
        self._values = [t.detach().clone() for t in self._tensors]
        self._cpu_rng = torch.get_rng_state()
        self._generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
        self._rng = None if self._generator is None else self._generator.get_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.data.copy_(value)
        torch.set_rng_state(self._cpu_rng)
        if self._generator is not None and self._rng is not None:
            self._generator.set_state(self._rng)

    @torch.no_grad()
    def now(self) -> list[Tensor]:
        """Copies of what the tensors hold now."""
        return [t.detach().clone() for t in self._tensors]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Overwrite the tensors with what `now` returned."""
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.data.copy_(value)


@torch.no_grad()
def max_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest absolute difference of two lists of tensors in float64; equal NaNs and infinities do not differ, unequal
    ones differ by infinity. Reads from the device.

    Args:
        one: Tensors of any shapes and dtypes.
        other: As many, of the same shapes.

    Example:
        >>> max_difference([torch.zeros(2)], [torch.tensor([0.0, 0.25])])
        0.25
    """
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel() == 0:
            continue
        x, y = a.detach().double(), b.detach().double()
        same = (x == y) | (x.isnan() & y.isnan())
        gap = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=float("inf"), posinf=float("inf")).max()
        worst = max(worst, float(gap))
    return worst
