"""Steps that fall as a power."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lrtt import _check
from lightning_lrtt.devices.pulsed import PulsedDevice


@dataclass(frozen=True, kw_only=True)
class PowStep(PulsedDevice):
    """Step that falls as a power of the room left: ``w += s_up ((b_max - w) / (b_max - b_min))^gamma_up (1 + sigma xi)``.

    Args:
        pow_gamma: Mean exponent, >= 0.
        pow_gamma_dtod: Device-to-device spread of the exponent, relative.
        pow_up_down: Mean asymmetry of the exponents.
        pow_up_down_dtod: Device-to-device spread of that asymmetry.

    All other arguments are those of `PulsedDevice`.

    Example:
        >>> PowStep(dw_min=0.01, pow_gamma=1.0).granularity  # the step in the middle of the range
        0.005
    """

    kind: ClassVar[int] = 6

    pow_gamma: float = 1.0
    pow_gamma_dtod: float = 0.1
    pow_up_down: float = 0.0
    pow_up_down_dtod: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        for name in ("pow_gamma", "pow_gamma_dtod", "pow_up_down_dtod"):
            _check.number(type(self).__name__, name, getattr(self, name), low=0.0)
        _check.number(type(self).__name__, "pow_up_down", self.pow_up_down)

    @property
    def granularity(self) -> float:
        """The step in the middle of the range."""
        return self.dw_min * float(0.5**self.pow_gamma)
