"""Observables of the phases, summed on the device and read in one transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_lrtt import _check


class PhaseStats(nn.Module):
    """Means of named scalars since the last read.

    `record` adds to buffers in place, so it can be captured in a CUDA graph; `read` is the only host read.

    Args:
        names: The observables, at least one.

    Raises:
        ValueError: If there are no names, or `record` gets another number of values.

    Example:
        >>> import torch
        >>> stats = PhaseStats(["cost"])
        >>> stats.record([torch.tensor(1.0)])
        >>> stats.record([torch.tensor(2.0)])
        >>> stats.read()
        {'cost': 1.5}
        >>> stats.read()
        {}
    """

    sums: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if not names:
            raise _check.fail("PhaseStats", "names", "at least one name", list(names))
        self.names = tuple(names)
        self.register_buffer("sums", torch.zeros(len(names)), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def record(self, values: Sequence[Tensor]) -> None:
        """Add one value a name, scalars on the buffers' device."""
        if len(values) != len(self.names):
            raise _check.fail("PhaseStats", "values", f"{len(self.names)} scalars", len(values))
        self.sums.add_(torch.stack([v.to(self.sums.dtype) for v in values]))
        self.count.add_(1)

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """Means since the last read, which start over; empty if nothing was recorded. One transfer."""
        *sums, count = torch.cat([self.sums, self.count.view(1)]).tolist()
        self.sums.zero_()
        self.count.zero_()
        return {name: value / count for name, value in zip(self.names, sums, strict=True)} if count else {}
