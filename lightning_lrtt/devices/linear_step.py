"""Steps that shrink linearly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lrtt import _check
from lightning_lrtt.devices.pulsed import PulsedDevice


@dataclass(frozen=True, kw_only=True)
class LinearStep(PulsedDevice):
    """Step that shrinks linearly with the weight: ``w += s_up (1 - gamma_up w / w_ref)(1 + sigma xi)``.

    Args:
        gamma_up: Relative loss of step size at the upper reference, >= 0.
        gamma_down: The same for down pulses at the lower reference.
        gamma_up_dtod: Device-to-device spread added to ``gamma_up``.
        gamma_down_dtod: Device-to-device spread added to ``gamma_down``.
        mult_noise: True: noise multiplies the step as above. False: ``w += s_up (1 - gamma_up w / w_ref + sigma xi)``.
        mean_bound_reference: ``w_ref`` is the mean bound (True) or the cell's own bound (False).
        allow_increasing_slope: Keep the sign of a drawn gamma instead of its magnitude.

    All other arguments are those of `PulsedDevice`.

    Example:
        >>> LinearStep(gamma_up=0.5, gamma_down=0.5, mult_noise=False).granularity
        0.001
    """

    kind: ClassVar[int] = 2

    gamma_up: float = 0.0
    gamma_down: float = 0.0
    gamma_up_dtod: float = 0.05
    gamma_down_dtod: float = 0.05
    mult_noise: bool = True
    mean_bound_reference: bool = True
    allow_increasing_slope: bool = False

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        owner = type(self).__name__
        low = -float("inf") if self.allow_increasing_slope else 0.0
        for name in ("gamma_up", "gamma_down"):
            _check.number(owner, name, getattr(self, name), low=low)
        for name in ("gamma_up_dtod", "gamma_down_dtod"):
            _check.number(owner, name, getattr(self, name), low=0.0)
