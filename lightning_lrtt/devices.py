"""Models of the analog devices that hold a weight, one class each, with their spread and noise.

A model is a frozen description; what a cell *is* (its bounds and step sizes) is drawn by the compiled core from
``(tile key, array, cell)``, so nothing is stored per cell. Formulas follow aihwkit's pulsed devices. Written for one
pulse upwards with a fresh ``xi ~ N(0, 1)``; a pulse downwards mirrors it with the down step size. After each pulse a
weight is clipped to its cell's bounds.

Units: weights, bounds and step sizes are in units of the weight matrix, everything else is a ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import erf, exp
from typing import ClassVar

import numpy as np

from lightning_lrtt import _check
from lightning_lrtt._compiled import LAYOUT

__all__ = [
    "ConstantStep",
    "Device",
    "ExpStep",
    "Ideal",
    "LinearStep",
    "PiecewiseStep",
    "PowStep",
    "PowStepReference",
    "PulsedDevice",
    "SoftBounds",
    "SoftBoundsPmax",
    "SoftBoundsReference",
]

_NODES = 16  # of a PiecewiseStep, as csrc/devices.h has room for


class Device:
    """Base of all device models.

    Not a dataclass, so that configuration files may name any subclass by ``class_path``.
    """

    kind: ClassVar[int] = -1  # DeviceKind of the compiled core

    @property
    def granularity(self) -> float:
        """Weight granularity ``g_w``: the step that pulse management counts with."""
        raise NotImplementedError

    @property
    def relaxes(self) -> bool:
        """Whether weights decay or diffuse between updates."""
        return False

    def numbers(self) -> dict[str, float]:
        """Every field of the compiled ``DeviceParams`` by name."""
        raise NotImplementedError

    def clipped_power(self, std: float) -> float:
        """``E[clip(z)^2]`` of ``z ~ N(0, std^2)`` held by cells with this model's bounds."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PulsedDevice(Device):
    """What the pulsed models share. Use a subclass.

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
        reset: Mean weight that decay leads to.
        reset_dtod: Device-to-device spread of ``reset``, absolute.
        diffusion: Standard deviation of a weight's random walk in one optimizer step; 0: none.
        diffusion_dtod: Device-to-device spread of ``diffusion``, relative.

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
    diffusion: float = 0.0
    diffusion_dtod: float = 0.0

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
        for name in ("lifetime", "lifetime_dtod", "reset_dtod", "diffusion", "diffusion_dtod"):
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

    def numbers(self) -> dict[str, float]:
        """The model's fields; those that it does not have are 0."""
        own = {f.name: float(getattr(self, f.name)) for f in fields(self) if not isinstance(getattr(self, f.name), tuple)}
        own |= {"kind": float(self.kind), "granularity": self.granularity}
        return {name: own.get(name, 0.0) for name in LAYOUT["device"]}

    def clipped_power(self, std: float) -> float:
        """See `Device.clipped_power`.

        The truncated second moment has a closed form for each bound; the spread of the bounds is averaged over by
        quadrature in its own normal variable.
        """
        xi = np.linspace(-4.0, 4.0, 201)
        weight = np.exp(-0.5 * xi**2)
        weight /= weight.sum()
        total = 0.0
        for bound, spread in ((self.w_max, self.w_max_dtod), (-self.w_min, self.w_min_dtod)):
            b = np.abs(bound * (1.0 + spread * xi))
            total += float((weight * _one_sided_power(b, std)).sum())
        return total


def _one_sided_power(bound: np.ndarray, std: float) -> np.ndarray:
    """``E[min(z, bound)^2; z > 0]`` for ``z ~ N(0, std^2)``."""
    u = bound / std
    cdf = 0.5 * np.vectorize(erf)(u / np.sqrt(2.0))
    density = np.exp(-0.5 * u**2) / np.sqrt(2.0 * np.pi)
    return std**2 * (cdf - u * density) + bound**2 * (0.5 - cdf)


@dataclass(frozen=True, kw_only=True)
class ConstantStep(PulsedDevice):
    """Step independent of the weight: ``w += s_up (1 + sigma xi)``.

    Example:
        >>> ConstantStep(dw_min=0.002).granularity
        0.002
    """

    kind: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class Ideal(ConstantStep):
    """ConstantStep without any variation: exact steps of ``dw_min`` between exact bounds."""

    dw_min_dtod: float = 0.0
    dw_min_std: float = 0.0
    up_down_dtod: float = 0.0
    w_max: float = 1.0
    w_min: float = -1.0
    w_max_dtod: float = 0.0
    w_min_dtod: float = 0.0


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


@dataclass(frozen=True, kw_only=True)
class SoftBounds(PulsedDevice):
    """Step that vanishes at the cell's own bound: ``w += s_up (1 - w / b_max)(1 + sigma xi)``.

    Args:
        mult_noise: True: noise multiplies the step as above. False: ``w += s_up (1 - w / b_max + sigma xi)``.

    All other arguments are those of `PulsedDevice`.

    Example:
        >>> from lightning_lrtt import LRTTConfig, devices
        >>> LRTTConfig(rank=4, fast_device=devices.SoftBounds(), visible_device=devices.SoftBounds()).is_pulsed
        True
    """

    kind: ClassVar[int] = 3

    mult_noise: bool = True


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
    diffusion: float = 0.0
    diffusion_dtod: float = 0.0

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
        return SoftBounds(dw_min=b * self.alpha, up_down=1.0 + 2.0 * self.range_min / b, w_max=self.range_min + b,
                          w_min=self.range_min, **shared)

    @property
    def relaxes(self) -> bool:
        """That of the equivalent SoftBounds."""
        return self.soft_bounds.relaxes

    @property
    def granularity(self) -> float:
        """``dw_min`` of the equivalent SoftBounds."""
        return self.soft_bounds.granularity

    def numbers(self) -> dict[str, float]:
        """Those of the equivalent SoftBounds."""
        return self.soft_bounds.numbers()

    def clipped_power(self, std: float) -> float:
        """That of the equivalent SoftBounds."""
        return self.soft_bounds.clipped_power(std)


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


@dataclass(frozen=True, kw_only=True)
class ExpStep(PulsedDevice):
    """Step with exponential saturation on both sides, as measured on ReRAM (Gong et al. 2018).

    With ``z = 2 a w / (b_max - b_min) + b``: ``w += max(1 - A_up exp(gamma_up z), 0) s_up (1 + sigma xi)``; down with
    ``1 - A_down exp(-gamma_down z)``.

    Args:
        A_up: Amplitude of the up saturation.
        A_down: Amplitude of the down saturation.
        gamma_up: Rate of the up saturation.
        gamma_down: Rate of the down saturation.
        a: Scale of the weight in z.
        b: Offset in z.

    All other arguments are those of `PulsedDevice`; here the defaults are ``dw_min_std=0.3`` and bounds of 0.6.
    """

    kind: ClassVar[int] = 5

    A_up: float = 0.00081
    A_down: float = 0.36833
    gamma_up: float = 12.44625
    gamma_down: float = 12.78785
    a: float = 0.244
    b: float = 0.2425

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        for name in ("A_up", "A_down", "gamma_up", "gamma_down", "a", "b"):
            _check.number(type(self).__name__, name, getattr(self, name))

    @property
    def granularity(self) -> float:
        """The mean down step at w = 0, as in aihwkit; ``dw_min`` where that is 0."""
        down = 1.0 - self.A_down * exp(min(-self.gamma_down * self.b, 80.0))  # the core clips there too
        step = self.dw_min * (1.0 - max(self.up_down, 0.0)) * max(down, 0.0)
        return step if step > 0.0 else self.dw_min


@dataclass(frozen=True, kw_only=True)
class PowStep(PulsedDevice):
    """Step that falls as a power of the room left: ``w += s_up ((b_max - w) / (b_max - b_min))^gamma_up (1 + sigma xi)``.

    Args:
        pow_gamma: Mean exponent, >= 0.
        pow_gamma_dtod: Device-to-device spread of the exponent, relative.
        pow_up_down: Mean asymmetry of the exponents.
        pow_up_down_dtod: Device-to-device spread of that asymmetry.

    All other arguments are those of `PulsedDevice`.
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
        return self.dw_min * 0.5**self.pow_gamma


@dataclass(frozen=True, kw_only=True)
class PowStepReference(PowStep):
    """PowStep read against a reference device: ``v = w + ref`` takes the pulses.

    Args:
        reference_mean: Mean of the reference weight.
        reference_std: Spread of the reference weight.

    All other arguments are those of `PowStep`.
    """

    kind: ClassVar[int] = 7

    reference_mean: float = 0.0
    reference_std: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        _check.number(type(self).__name__, "reference_mean", self.reference_mean)
        _check.number(type(self).__name__, "reference_std", self.reference_std, low=0.0)


@dataclass(frozen=True, kw_only=True)
class PiecewiseStep(PulsedDevice):
    """Step given by nodes at equal distances over the cell's range, interpolated linearly.

    Args:
        piecewise_up: Factors of the up step from ``b_min`` to ``b_max``, 1 to 16 numbers.
        piecewise_down: The same for the down step; as many.

    All other arguments are those of `PulsedDevice`.
    """

    kind: ClassVar[int] = 8

    piecewise_up: tuple[float, ...] = (1.0,)
    piecewise_down: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        owner = type(self).__name__
        for name in ("piecewise_up", "piecewise_down"):
            nodes = getattr(self, name)
            if not 1 <= len(nodes) <= _NODES:
                raise _check.fail(owner, name, f"1 to {_NODES} numbers", nodes)
            for node in nodes:
                _check.number(owner, name, node, low=0.0)
        if len(self.piecewise_up) != len(self.piecewise_down):
            raise _check.fail(owner, "piecewise_down", f"as long as piecewise_up ({len(self.piecewise_up)})", self.piecewise_down)
        middle = len(self.piecewise_up) // 2
        _check.number(owner, f"piecewise_up[{middle}]", self.piecewise_up[middle], above=0.0,
                      remedy="pulses are counted in the middle node's step")

    @property
    def granularity(self) -> float:
        """The up step at the middle node, number ``len(piecewise_up) // 2``, as in aihwkit."""
        return self.dw_min * self.piecewise_up[len(self.piecewise_up) // 2]

    def numbers(self) -> dict[str, float]:
        """The model's fields and its nodes."""
        nodes = {f"{name}_{i}": float(v) for name in ("piecewise_up", "piecewise_down") for i, v in enumerate(getattr(self, name))}
        return super().numbers() | nodes | {"sections": float(len(self.piecewise_up) - 1)}
