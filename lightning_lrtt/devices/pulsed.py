"""What the pulsed models share: bounds, steps, their spread, and what cells do between updates."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import erf

import numpy as np

from lightning_lrtt import _check
from lightning_lrtt._compiled import LAYOUT
from lightning_lrtt.devices.base import Device


@dataclass(frozen=True, kw_only=True)
class PulsedDevice(Device):
    """What the pulsed models share. Use a subclass.

    Weights, bounds and steps are in units of the layer's weight; spreads and noises are standard deviations. Formulas are
    those of Gokmen & Vlasov (2016) and of aihwkit's pulsed devices (Rasch et al. 2021); docs/devices.md has them all.

    Args:
        dw_min: Mean step of one pulse at weight 0, > 0.
        dw_min_dtod: Device-to-device spread of the step, relative.
        dw_min_dtod_log_normal: Draw the spread log-normally instead of normally.
        dw_min_std: Cycle-to-cycle noise ``sigma`` of a step, relative.
        up_down: Mean asymmetry: positive weakens down steps, negative weakens up steps.
        up_down_dtod: Device-to-device spread of the asymmetry.
        w_max: Mean upper bound, >= 0.
        w_min: Mean lower bound, <= 0.
        w_max_dtod: Device-to-device spread of ``w_max``, relative.
        w_min_dtod: Device-to-device spread of ``w_min``, relative.
        enforce_consistency: Keep drawn steps positive and drawn bounds on their sides of 0.
        corrupt_devices_prob: Probability that a cell is stuck at a value of its range.
        corrupt_devices_range: Largest magnitude of a stuck value.
        lifetime: Optimizer steps in which a weight decays to 1/e of its distance to ``reset``; 0: no decay.
        lifetime_dtod: Device-to-device spread of the lifetime, relative.
        reset: Mean weight that decay and a reset lead to.
        reset_dtod: Device-to-device spread of ``reset``, absolute.
        reset_std: Cycle-to-cycle noise of a reset, absolute.
        diffusion: Standard deviation of a weight's random walk in one optimizer step; 0: none.
        diffusion_dtod: Device-to-device spread of ``diffusion``, relative.
        write_noise_std: Write noise in units of ``dw_min``: the dynamics act on a persistent weight, and what is read
            is that plus ``write_noise_std dw_min xi``, drawn anew whenever the cell was written. 0: none.
        apply_write_noise_on_set: Whether loads, reinits and digital transfers, which program cells without pulses, draw
            write noise too.

    Raises:
        ValueError: If a number is outside its physical range; the message names it.
    """

    dw_min: float = 0.001
    dw_min_dtod: float = 0.3
    dw_min_dtod_log_normal: bool = False
    dw_min_std: float = 0.3
    up_down: float = 0.0
    up_down_dtod: float = 0.01
    w_max: float = 0.6
    w_min: float = -0.6
    w_max_dtod: float = 0.3
    w_min_dtod: float = 0.3
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
        if self.kind < 0:
            raise TypeError("PulsedDevice: use one of its subclasses, e.g. devices.SoftBounds()")
        _check.number(owner, "dw_min", self.dw_min, above=0.0)
        _check.number(owner, "w_max", self.w_max, low=0.0, remedy="the bounds must enclose 0")
        _check.number(owner, "w_min", self.w_min, high=0.0, remedy="the bounds must enclose 0")
        if self.w_max == self.w_min:
            raise _check.fail(owner, "w_max", "> w_min", self.w_max)
        for name in ("dw_min_dtod", "dw_min_std", "up_down_dtod", "w_max_dtod", "w_min_dtod", "corrupt_devices_range"):
            _check.number(owner, name, getattr(self, name), low=0.0)
        for name in (
            "lifetime",
            "lifetime_dtod",
            "reset_dtod",
            "reset_std",
            "diffusion",
            "diffusion_dtod",
            "write_noise_std",
        ):
            _check.number(owner, name, getattr(self, name), low=0.0)
        _check.number(owner, "reset", self.reset)
        _check.number(owner, "up_down", self.up_down)
        _check.number(owner, "corrupt_devices_prob", self.corrupt_devices_prob, low=0.0, high=1.0)

    @property
    def granularity(self) -> float:
        """``dw_min``."""
        return self.dw_min

    @property
    def relaxes(self) -> bool:
        """Whether ``lifetime`` or ``diffusion`` is set."""
        return self.lifetime > 0 or self.diffusion > 0

    @property
    def planes(self) -> int:
        """1 with write noise, the persistent weight; else 0."""
        return int(self.write_noise_std > 0)

    def numbers(self) -> dict[str, float]:
        """The model's fields; those that it does not have are 0."""
        own = {
            f.name: float(getattr(self, f.name)) for f in fields(self) if not isinstance(getattr(self, f.name), tuple)
        }
        own |= {"kind": float(self.kind), "granularity": self.granularity}
        return {name: own.get(name, 0.0) for name in LAYOUT["device"]}

    def clipped_power(self, std: float, one_sided: bool = False) -> float:
        """See `Device.clipped_power`.

        The truncated second moment has a closed form for each bound; the spread of the bounds is averaged over by
        quadrature in its own normal variable.
        """
        xi = np.linspace(-4.0, 4.0, 201)
        weight = np.exp(-0.5 * xi**2)
        weight /= weight.sum()
        total = 0.0
        upper, lower = (self.w_max, self.w_max_dtod), (-self.w_min, self.w_min_dtod)
        for bound, spread in (upper, upper if one_sided else lower):
            b = np.abs(bound * (1.0 + spread * xi))
            total += float((weight * _one_sided_power(b, std)).sum())
        return total


def _one_sided_power(bound: np.ndarray, std: float) -> np.ndarray:
    """``E[min(z, bound)^2; z > 0]`` for ``z ~ N(0, std^2)``."""
    u = bound / std
    cdf = 0.5 * np.vectorize(erf)(u / np.sqrt(2.0))
    density = np.exp(-0.5 * u**2) / np.sqrt(2.0 * np.pi)
    return np.asarray(std**2 * (cdf - u * density) + bound**2 * (0.5 - cdf))
