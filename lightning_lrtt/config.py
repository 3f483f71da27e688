"""What a tile is told: LR-TT's numbers, its pulse trains and its devices, validated and immutable."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch

from lightning_lrtt import _check
from lightning_lrtt._compiled import LAYOUT
from lightning_lrtt.devices import Device
from lightning_lrtt.io_config import IOConfig

__all__ = ["IOConfig", "LRTTConfig", "PulseConfig"]

_TRANSFER_MODES = {"digital": 1, "pulsed": 2, "pulsed_residual": 3}
_REINITS = {"normal": 1, "uniform": 2, "orthogonal": 3}


@dataclass(frozen=True, kw_only=True)
class PulseConfig:
    """How one sample's outer product becomes a train of pulses (stochastic, compressed).

    Each of ``BL`` slots fires on input j with probability ``|x_j| S_x`` and on output i with ``|d_i| S_d``; a coincidence
    is one device pulse. Rules after Gokmen & Vlasov (2016) and aihwkit's pulsed update.

    Args:
        desired_bl: Longest train, 1 to 31 slots.
        update_bl_management: Shorten the train to what the sample needs, ``BL = ceil(lr max|x| max|d| / g_w)``.
        update_management: Balance ``S_x`` and ``S_d`` so that x never saturates.

    Raises:
        ValueError: If ``desired_bl`` is outside 1 to 31.
    """

    desired_bl: int = 31
    update_bl_management: bool = True
    update_management: bool = True

    def __post_init__(self) -> None:
        """Refuse trains that do not fit a word."""
        _check.integer("PulseConfig", "desired_bl", self.desired_bl, low=1, high=31)


@dataclass(frozen=True, kw_only=True)
class LRTTConfig:
    """One LR-TT tile: ``W = C + alpha A B`` with C ``[d, k]``, A ``[d, r]``, B ``[r, k]``.

    Every optimizer step moves A and B; every ``transfer_every`` steps ``C += transfer_lr * A B`` and A, B start afresh.

    Args:
        rank: r, at least 1 and at most min(d, k).
        alpha: Weight of A B in the output, used as it is (write alpha / r for LoRA's convention); not 0.
        transfer_every: T, steps (or samples) between transfers.
        transfer_unit: What T counts: optimizer ``steps`` or ``samples``.
        transfer_lr: tau, the share of A B that C receives. None: alpha, which keeps ``W`` continuous at a transfer.
        reinit: Fresh B: ``normal``, ``uniform`` (same variance) or ``orthogonal`` rows.
        reinit_gain: Standard deviation of B is ``gain * sqrt(2 / k)``. ``unit``: the gain at which LR-TT moves C like SGD
            at the same lr in expectation, ``E[B^2] = 1 / (r tau alpha s_r)``, corrected for the bounds of ``fast_device``.
        grad_scale: s_r, a factor on the factor learning rate: ``none`` (1), ``rsqrt`` (1/sqrt(r)) or ``sqrt`` (sqrt(r)).
        fast_device: Device of A and B; None keeps them in floating point.
        visible_device: Device of C; None keeps it in floating point.
        pulse: Trains of the updates of A and B.
        transfer_pulse: Trains of the transfer into C.
        transfer_mode: ``digital`` adds tau A B, ``pulsed`` sends it as r rank-1 pulsed updates, ``pulsed_residual`` also
            keeps in A what the trains could not carry; ``auto``: pulsed if there is a ``visible_device``.
        transfer_max_words: Pulsed transfer: most words (of ``transfer_pulse.desired_bl`` slots) that one of the r terms may
            use. What is beyond is counted in ``transfer_clip_fraction``.
        io: Converters of analog reads (`IOConfig`). None: every read is exact.
        io_backward: Converters of backward reads. None: those of ``io``. Backward reads have no bound management.
        seed: Seed of device draws, reinits and pulses; each tile derives its own key from it.

    Raises:
        ValueError: If an argument is outside its range, or two exclude each other.

    Example:
        >>> config = LRTTConfig(rank=4, transfer_every=16)
        >>> config.tau, config.is_pulsed
        (1.0, False)
    """

    rank: int = 8
    alpha: float = 1.0
    transfer_every: int = 32
    transfer_unit: Literal["steps", "samples"] = "steps"
    transfer_lr: float | None = None
    reinit: Literal["normal", "uniform", "orthogonal"] = "normal"
    reinit_gain: float | Literal["unit"] = "unit"
    grad_scale: Literal["none", "rsqrt", "sqrt"] = "none"
    fast_device: Device | None = None
    visible_device: Device | None = None
    pulse: PulseConfig = field(default_factory=PulseConfig)
    transfer_pulse: PulseConfig = field(default_factory=PulseConfig)
    transfer_mode: Literal["auto", "digital", "pulsed", "pulsed_residual"] = "auto"
    transfer_max_words: int = 16
    io: IOConfig | None = None
    io_backward: IOConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers with which nothing can be learned, and combinations that contradict themselves."""
        me = "LRTTConfig"
        _check.integer(me, "rank", self.rank, low=1)
        _check.integer(me, "transfer_every", self.transfer_every, low=1)
        _check.integer(me, "transfer_max_words", self.transfer_max_words, low=1)
        _check.integer(me, "seed", self.seed, low=0, high=2**63 - 1)
        _check.number(me, "alpha", self.alpha)
        if self.alpha == 0:
            raise _check.fail(me, "alpha", "nonzero", self.alpha, "with alpha = 0 the factors never reach the output")
        if self.transfer_lr is not None:
            _check.number(me, "transfer_lr", self.transfer_lr)
            if self.transfer_lr == 0:
                raise _check.fail(me, "transfer_lr", "nonzero", self.transfer_lr,
                                  "with 0 every transfer throws A B away; leave it at None")
            if self.transfer_lr * self.alpha < 0:
                raise _check.fail(me, "transfer_lr", f"of the sign of alpha = {self.alpha!r}", self.transfer_lr,
                                  "with the other one C moves uphill; leave it at None")
        if self.reinit_gain != "unit":
            _check.number(me, "reinit_gain", self.reinit_gain, above=0.0,
                          remedy="A = B = 0 is a fixed point; use 'unit' or a positive gain")
        _check.choice(me, "transfer_unit", self.transfer_unit, ("steps", "samples"))
        _check.choice(me, "reinit", self.reinit, _REINITS)
        _check.choice(me, "grad_scale", self.grad_scale, ("none", "rsqrt", "sqrt"))
        _check.choice(me, "transfer_mode", self.transfer_mode, ("auto", *_TRANSFER_MODES))
        for name in ("io", "io_backward"):
            if not isinstance(getattr(self, name), (IOConfig, type(None))):
                raise TypeError(f"{me}: {name} must be an IOConfig or None, got {getattr(self, name)!r}")
        if self.io is None and self.io_backward is not None:
            raise _check.fail(me, "io_backward", "None with io=None", self.io_backward,
                              "for converters in the backward direction only, give io=IOConfig(is_perfect=True)")
        for name in ("fast_device", "visible_device"):
            device = getattr(self, name)
            if device is not None and not isinstance(device, Device):
                raise TypeError(f"{me}: {name} must be a device of lightning_lrtt.devices or None, got {device!r}")
        if self.mode.startswith("pulsed") and self.visible_device is None:
            raise _check.fail(me, "transfer_mode", "'auto' or 'digital' without a visible_device", self.transfer_mode,
                              "give C a device, e.g. visible_device=devices.SoftBounds()")
        if self.mode == "pulsed_residual":
            if self.reinit == "orthogonal":
                raise _check.fail(me, "reinit", "'normal' or 'uniform' with transfer_mode='pulsed_residual'", self.reinit,
                                  "rows of B that keep a residual cannot be made orthogonal to fresh ones")
            if not self.transfer_pulse.update_management:
                raise _check.fail(me, "transfer_pulse.update_management", "on with transfer_mode='pulsed_residual'",
                                  False, "without it B saturates too and the rest is not rank r")

    @property
    def tau(self) -> float:
        """The transfer learning rate in force."""
        return self.alpha if self.transfer_lr is None else self.transfer_lr

    @property
    def is_pulsed(self) -> bool:
        """Whether A and B are updated by pulses."""
        return self.fast_device is not None

    @property
    def mode(self) -> str:
        """The transfer mode in force."""
        if self.transfer_mode != "auto":
            return self.transfer_mode
        return "digital" if self.visible_device is None else "pulsed"

    @property
    def factor_scale(self) -> float:
        """s_r, the factor of ``grad_scale``."""
        return {"none": 1.0, "rsqrt": self.rank**-0.5, "sqrt": self.rank**0.5}[self.grad_scale]

    def reinit_std(self, k: int) -> float:
        """Standard deviation of a fresh element of B, before clipping, for ``k`` inputs.

        Spec: ``E[dC] = -(tau lr alpha s_r r E[B^2]) D^T x``; ``unit`` makes the bracket lr. Where the bounds of
        ``fast_device`` do not allow that much power, 80% of what they allow is used and a warning names the factor.
        """
        if self.reinit_gain != "unit":
            return float(self.reinit_gain) * math.sqrt(2.0 / k)
        power = 1.0 / (self.rank * abs(self.tau * self.alpha) * self.factor_scale)
        if self.fast_device is None:
            return math.sqrt(power)
        return _std_within_bounds(self.fast_device, power, self.rank)

    def pack(self, k: int) -> torch.Tensor:
        """The numbers in the order the compiled core reads them, float64 ``[H]`` on the CPU."""
        tile = {
            "tau": self.tau,
            "transfer_every": self.transfer_every,
            "count_samples": self.transfer_unit == "samples",
            "transfer_mode": _TRANSFER_MODES[self.mode],
            "reinit": _REINITS[self.reinit],
            "reinit_std": self.reinit_std(k),
            "desired_bl": self.pulse.desired_bl,
            "update_management": self.pulse.update_management,
            "update_bl_management": self.pulse.update_bl_management,
            "transfer_bl": self.transfer_pulse.desired_bl,
            "transfer_update_management": self.transfer_pulse.update_management,
            "transfer_update_bl_management": self.transfer_pulse.update_bl_management,
            "max_words": self.transfer_max_words,
        }
        values = [float(tile[name]) for name in LAYOUT["tile"]]
        for device in (self.fast_device, self.visible_device):
            numbers = device.numbers() if device else dict.fromkeys(LAYOUT["device"], 0.0)
            values += [numbers[name] for name in LAYOUT["device"]]
        return torch.tensor(values, dtype=torch.float64, device="cpu")  # whatever the default device is


@functools.cache
def _std_within_bounds(device: Device, power: float, rank: int) -> float:
    """The std whose clipped second moment is ``power``, by bisection (the moment grows with the std)."""
    most = device.clipped_power(1e6)
    if power > 0.8 * most:
        warnings.warn(
            f"LRTTConfig: reinit_gain='unit' needs E[B^2] = {power:.3g} at rank {rank}, but the bounds of "
            f"{type(device).__name__} hold at most {most:.3g}; C will move like SGD at {0.8 * most / power:.2f} of the lr. "
            "Raise the rank or lr, or set reinit_gain to a number.",
            stacklevel=2,
        )
        power = 0.8 * most
    low, high = 0.0, math.sqrt(power)
    while device.clipped_power(high) < power:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if device.clipped_power(middle) < power else (low, middle)
    return high
