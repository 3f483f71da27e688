"""PowStep read against a reference device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lrtt import _check
from lightning_lrtt.devices.pow_step import PowStep


@dataclass(frozen=True, kw_only=True)
class PowStepReference(PowStep):
    """PowStep read against a reference device: ``v = w + ref`` takes the pulses.

    Args:
        reference_mean: Mean of the reference weight.
        reference_std: Spread of the reference weight.

    All other arguments are those of `PowStep`.

    Example:
        >>> PowStepReference(dw_min=0.01, reference_mean=0.2).granularity
        0.005
    """

    kind: ClassVar[int] = 7

    reference_mean: float = 0.0
    reference_std: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        _check.number(type(self).__name__, "reference_mean", self.reference_mean)
        _check.number(type(self).__name__, "reference_std", self.reference_std, low=0.0)
