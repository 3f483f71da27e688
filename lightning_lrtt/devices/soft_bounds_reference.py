"""SoftBounds read against a reference device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lrtt import _check
from lightning_lrtt.devices.pulsed import PulsedDevice


@dataclass(frozen=True, kw_only=True)
class SoftBoundsReference(PulsedDevice):
    """SoftBounds whose weight is read against a reference device: ``v = w + ref`` takes the pulses.

    Args:
        mult_noise: False (default): ``v += s_up (1 - v / b_max + sigma xi)``. True: noise multiplies the step.
        slope_up_dtod: Extra device-to-device spread of the up slope, relative; it moves the bound.
        slope_down_dtod: The same for down.
        reference_mean: Mean of the reference weight.
        reference_std: Spread of the reference weight.
        subtract_symmetry_point: Put the reference at the cell's symmetry point, where up and down steps are equal.

    All other arguments are those of `PulsedDevice`.

    Example:
        >>> SoftBoundsReference(subtract_symmetry_point=True, reference_std=0.05).mult_noise
        False
    """

    kind: ClassVar[int] = 4

    mult_noise: bool = False
    slope_up_dtod: float = 0.0
    slope_down_dtod: float = 0.0
    reference_mean: float = 0.0
    reference_std: float = 0.0
    subtract_symmetry_point: bool = False

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        for name in ("slope_up_dtod", "slope_down_dtod", "reference_std"):
            _check.number(type(self).__name__, name, getattr(self, name), low=0.0)
        _check.number(type(self).__name__, "reference_mean", self.reference_mean)
