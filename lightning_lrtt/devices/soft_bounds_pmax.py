"""SoftBounds by what a pulse-response measurement gives."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import exp

from lightning_lrtt import _check
from lightning_lrtt.devices.base import Device
from lightning_lrtt.devices.soft_bounds import SoftBounds


@dataclass(frozen=True, kw_only=True)
class SoftBoundsPmax(Device):
    """SoftBounds described by what a pulse-response measurement gives: the range and how fast it is crossed.

    After ``p_max`` up pulses from ``range_min`` the mean weight reaches ``range_max``, along
    ``w_min + b (1 - exp(-alpha p))`` with ``b = (range_max - range_min) / (1 - exp(-p_max alpha))``. Equivalent to SoftBounds
    with ``w_min = range_min``, ``w_max = range_min + b``, ``dw_min = b alpha`` and ``up_down = 1 + 2 range_min / b``.

    Args:
        p_max: Number of pulses of the measurement.
        alpha: Rate of the exponential, per pulse.
        range_min: Weight at the start, < 0.
        range_max: Weight after ``p_max`` pulses, > 0.

    All other arguments are those of `SoftBounds`.

    Example:
        >>> round(SoftBoundsPmax().soft_bounds.dw_min, 6)
        0.002541
    """

    p_max: int = 1000
    alpha: float = 0.0005
    range_min: float = -1.0
    range_max: float = 1.0
    dw_min_dtod: float = 0.3
    dw_min_dtod_log_normal: bool = False
    dw_min_std: float = 0.3
    up_down_dtod: float = 0.01
    w_max_dtod: float = 0.3
    w_min_dtod: float = 0.3
    mult_noise: bool = True
    enforce_consistency: bool = True
    corrupt_devices_prob: float = 0.0
    corrupt_devices_range: float = 0.1
    lifetime: float = 0.0
    lifetime_dtod: float = 0.0
    reset: float = 0.0
    reset_dtod: float = 0.0
    reset_std: float = 0.01
    diffusion: float = 0.0
    diffusion_dtod: float = 0.0
    write_noise_std: float = 0.0
    apply_write_noise_on_set: bool = True

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        owner = type(self).__name__
        _check.integer(owner, "p_max", self.p_max, low=1)
        _check.number(owner, "alpha", self.alpha, above=0.0)
        _check.number(owner, "range_min", self.range_min, high=0.0, remedy="the range must enclose 0")
        _check.number(owner, "range_max", self.range_max, above=0.0, remedy="the range must enclose 0")
        self.soft_bounds  # noqa: B018  checks the rest

    @property
    def soft_bounds(self) -> SoftBounds:
        """The same device in SoftBounds' own parameters."""
        b = (self.range_max - self.range_min) / (1.0 - exp(-self.p_max * self.alpha))
        shared = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("p_max", "alpha", "range_min", "range_max"):
            del shared[name]
        return SoftBounds(
            dw_min=b * self.alpha,
            up_down=1.0 + 2.0 * self.range_min / b,
            w_max=self.range_min + b,
            w_min=self.range_min,
            **shared,
        )

    @property
    def relaxes(self) -> bool:
        """That of the equivalent SoftBounds."""
        return self.soft_bounds.relaxes

    @property
    def planes(self) -> int:
        """Those of the equivalent SoftBounds."""
        return self.soft_bounds.planes

    @property
    def granularity(self) -> float:
        """``dw_min`` of the equivalent SoftBounds."""
        return self.soft_bounds.granularity

    def numbers(self) -> dict[str, float]:
        """Those of the equivalent SoftBounds."""
        return self.soft_bounds.numbers()

    def clipped_power(self, std: float, one_sided: bool = False) -> float:
        """That of the equivalent SoftBounds."""
        return self.soft_bounds.clipped_power(std, one_sided)
