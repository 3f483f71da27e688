"""What a tile is told: LR-TT's numbers, its pulse trains and its devices, validated and immutable."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from lightning_lrtt import _check
from lightning_lrtt._compiled import LAYOUT
from lightning_lrtt.devices import Device
from lightning_lrtt.io_config import IOConfig

__all__ = ["IOConfig", "LRTTConfig", "PulseConfig"]

_TRANSFER_MODES = {"digital": 1, "pulsed": 2, "pulsed_residual": 3}
_PULSE_TYPES = {
    "stochastic_compressed": 1,
    "stochastic": 2,
    "mean_count": 3,
    "deterministic_implicit": 4,
    "none": 5,
    "none_with_device": 6,
}  # PulseType of csrc/jobs.h
_LONG_TRAIN = 496  # default of max_bl: blocks of 32 samples
_REINITS = {"normal": 1, "uniform": 2, "orthogonal": 3}


@dataclass(frozen=True, kw_only=True)
class PulseConfig:
    """How one sample's outer product becomes a train of pulses.

    A train has ``BL`` slots; with ``p_x = |x_j| S_x`` and ``p_d = |d_i| S_d`` (above 1 they act as 1) a cell gets about
    ``BL p_x p_d`` device pulses. Rules after Gokmen & Vlasov (2016) and aihwkit's pulsed update, whose names these are but
    for ``x_res`` and ``d_res``; formulas, and which type to use when, in docs/pulses.md.

    Args:
        pulse_type: What a train is. ``stochastic_compressed``: input j fires in a slot with probability p_x, output i with
            p_d, a coincidence is a pulse. ``stochastic``: the same; upstream sends positive and negative inputs in two
            passes there, which changes neither the distribution nor, here, a bit. ``mean_count``:
            ``round(round(BL p_x) round(BL p_d) / BL)`` pulses. ``deterministic_implicit``: ``round(BL p_x p_d)`` pulses.
            ``none``: no device, a floating-point update. ``none_with_device``: a floating-point update, clipped to the
            bounds of the device once a step.
        desired_bl: Longest train, 1 to 15872 slots. Up to 31 is fastest.
        fixed_bl: Without it (and without BL management) a learning rate beyond ``desired_bl`` steps makes the train longer:
            ``BL = ceil(lr / g_w)``, ``S_x S_d = 1``.
        max_bl: Longest train of ``fixed_bl=False``, at least ``desired_bl``; beyond it S grows. None: 496.
        update_bl_management: Shorten the train to what the sample needs, ``BL = ceil(lr max|x| max|d| / g_w)``.
        update_management: Balance ``S_x`` and ``S_d`` so that x never saturates.
        um_grad_scale: Factor on max|d| in both managements; below 1 outliers of d are cut earlier.
        x_res: Step of the grid to which p_x is rounded, 0 (no grid) or 2^-20 to 1: 1/n for n steps.
        d_res: The same for p_d.
        sto_round: Round to the grid at random, with the mean at p, instead of to the nearest step.

    Raises:
        ValueError: If a number is outside its range, or an option would have no effect.

    Example:
        >>> PulseConfig(pulse_type="deterministic_implicit", x_res=1 / 15, d_res=1 / 15).is_pulsed
        True
    """

    pulse_type: Literal[
        "stochastic_compressed", "stochastic", "mean_count", "deterministic_implicit", "none", "none_with_device"
    ] = "stochastic_compressed"
    desired_bl: int = 31
    fixed_bl: bool = True
    max_bl: int | None = None
    update_bl_management: bool = True
    update_management: bool = True
    um_grad_scale: float = 1.0
    x_res: float = 0.0
    d_res: float = 0.0
    sto_round: bool = False

    def __post_init__(self) -> None:
        """Refuse trains that do not fit, and options that nothing would read."""
        me, most = "PulseConfig", LAYOUT["most_slots"]
        _check.choice(me, "pulse_type", self.pulse_type, _PULSE_TYPES)
        _check.integer(me, "desired_bl", self.desired_bl, low=1, high=most)
        _check.number(me, "um_grad_scale", self.um_grad_scale, above=0.0)
        for name in ("x_res", "d_res"):
            _check.number(me, name, getattr(self, name), low=0.0, high=1.0, remedy="write 1/n for n steps")
            if 0.0 < getattr(self, name) < 2.0**-20:
                raise _check.fail(
                    me, name, "0 or at least 2**-20", getattr(self, name), "0 leaves probabilities as they are"
                )
        if not self.is_pulsed:
            for f in fields(self)[1:]:
                if getattr(self, f.name) != f.default:
                    raise _check.fail(
                        me,
                        f.name,
                        f"left at {f.default!r} with pulse_type={self.pulse_type!r}",
                        getattr(self, f.name),
                        "a floating-point update has no train",
                    )
            return
        if not self.fixed_bl and self.update_bl_management:
            raise _check.fail(
                me,
                "fixed_bl",
                "True with update_bl_management=True",
                False,
                "BL management sets the length; turn it off to let lr set it",
            )
        if self.max_bl is not None:
            if self.fixed_bl:
                raise _check.fail(
                    me, "max_bl", "None with fixed_bl=True", self.max_bl, "desired_bl is the longest train"
                )
            _check.integer(me, "max_bl", self.max_bl, low=self.desired_bl, high=most)
        if self.um_grad_scale != 1.0 and not (self.update_management or self.update_bl_management):
            raise _check.fail(
                me,
                "um_grad_scale",
                "1 without update_management and update_bl_management",
                self.um_grad_scale,
                "nothing else reads it",
            )
        if self.sto_round and self.x_res == 0.0 and self.d_res == 0.0:
            raise _check.fail(me, "sto_round", "False without x_res and d_res", True, "there is no grid to round to")

    @property
    def is_pulsed(self) -> bool:
        """Whether there are pulses at all."""
        return self.pulse_type not in ("none", "none_with_device")

    @property
    def longest(self) -> int:
        """Slots of the longest train."""
        if self.fixed_bl:
            return self.desired_bl
        return max(self.desired_bl, _LONG_TRAIN) if self.max_bl is None else self.max_bl


@dataclass(frozen=True, kw_only=True)
class LRTTConfig:
    """One LR-TT tile: ``W = C + alpha A B`` with C ``[d, k]``, A ``[d, r]``, B ``[r, k]``.

    Every optimizer step moves A and B; every ``transfer_every`` steps ``C += transfer_lr * A B`` and A, B start afresh.
    Tiki-Taka (Gokmen & Haensch 2020) with the factors of LoRA (Hu et al. 2021); formulas in docs/algorithm.md.

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
        transfer_pulse: Trains of the transfer into C; one that needs more than ``desired_bl`` slots becomes several words.
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
                raise _check.fail(
                    me,
                    "transfer_lr",
                    "nonzero",
                    self.transfer_lr,
                    "with 0 every transfer throws A B away; leave it at None",
                )
            if self.transfer_lr * self.alpha < 0:
                raise _check.fail(
                    me,
                    "transfer_lr",
                    f"of the sign of alpha = {self.alpha!r}",
                    self.transfer_lr,
                    "with the other one C moves uphill; leave it at None",
                )
        if self.reinit_gain != "unit":
            _check.number(
                me,
                "reinit_gain",
                self.reinit_gain,
                above=0.0,
                remedy="A = B = 0 is a fixed point; use 'unit' or a positive gain",
            )
        _check.choice(me, "transfer_unit", self.transfer_unit, ("steps", "samples"))
        _check.choice(me, "reinit", self.reinit, _REINITS)
        _check.choice(me, "grad_scale", self.grad_scale, ("none", "rsqrt", "sqrt"))
        _check.choice(me, "transfer_mode", self.transfer_mode, ("auto", *_TRANSFER_MODES))
        for name in ("io", "io_backward"):
            if not isinstance(getattr(self, name), (IOConfig, type(None))):
                raise TypeError(f"{me}: {name} must be an IOConfig or None, got {getattr(self, name)!r}")
        if self.io is None and self.io_backward is not None:
            raise _check.fail(
                me,
                "io_backward",
                "None with io=None",
                self.io_backward,
                "for converters in the backward direction only, give io=IOConfig(is_perfect=True)",
            )
        for name in ("fast_device", "visible_device"):
            device = getattr(self, name)
            if device is not None and not isinstance(device, Device):
                raise TypeError(f"{me}: {name} must be a device of lightning_lrtt.devices or None, got {device!r}")
        self._check_pulses()
        if self.mode.startswith("pulsed") and self.visible_device is None:
            raise _check.fail(
                me,
                "transfer_mode",
                "'auto' or 'digital' without a visible_device",
                self.transfer_mode,
                "give C a device, e.g. visible_device=devices.SoftBounds()",
            )
        if self.mode == "pulsed_residual":
            if self.reinit == "orthogonal":
                raise _check.fail(
                    me,
                    "reinit",
                    "'normal' or 'uniform' with transfer_mode='pulsed_residual'",
                    self.reinit,
                    "rows of B that keep a residual cannot be made orthogonal to fresh ones",
                )
            if not self.transfer_pulse.update_management:
                raise _check.fail(
                    me,
                    "transfer_pulse.update_management",
                    "on with transfer_mode='pulsed_residual'",
                    False,
                    "without it B saturates too and the rest is not rank r",
                )

    def _check_pulses(self) -> None:
        """Trains must suit what they are for."""
        me, kind = "LRTTConfig", self.pulse.pulse_type
        if kind == "none" and self.fast_device is not None:
            raise _check.fail(
                me,
                "fast_device",
                "None with pulse.pulse_type='none'",
                type(self.fast_device).__name__,
                "nothing would read it; 'none_with_device' keeps its bounds",
            )
        if kind == "none_with_device" and self.fast_device is None:
            raise _check.fail(
                me, "pulse.pulse_type", "'none' without a fast_device", kind, "there are no bounds to clip to"
            )
        if kind == "none_with_device" and self.fast_device is not None and self.fast_device.planes:
            raise _check.fail(
                me,
                "fast_device",
                "one that holds nothing but the weight with pulse.pulse_type='none_with_device'",
                type(self.fast_device).__name__,
                "write noise and pairs need pulses",
            )
        train = self.transfer_pulse
        if not train.is_pulsed:
            raise _check.fail(
                me,
                "transfer_pulse.pulse_type",
                "a pulsed one",
                train.pulse_type,
                "transfer_mode='digital' moves A B in floating point, clipped to the bounds of visible_device",
            )
        if not train.fixed_bl:
            raise _check.fail(
                me,
                "transfer_pulse.fixed_bl",
                "True",
                False,
                "a transfer splits what needs more slots into words; raise desired_bl or transfer_max_words",
            )
        if train.um_grad_scale != 1.0:
            raise _check.fail(
                me,
                "transfer_pulse.um_grad_scale",
                "1",
                train.um_grad_scale,
                "it would cut entries of A for which there are words",
            )

    @property
    def tau(self) -> float:
        """The transfer learning rate in force."""
        return self.alpha if self.transfer_lr is None else self.transfer_lr

    @property
    def is_pulsed(self) -> bool:
        """Whether A and B are updated by pulses."""
        return self.fast_device is not None and self.pulse.is_pulsed

    @property
    def mode(self) -> str:
        """The transfer mode in force."""
        if self.transfer_mode != "auto":
            return self.transfer_mode
        return "digital" if self.visible_device is None else "pulsed"

    @property
    def factor_scale(self) -> float:
        """s_r, the factor of ``grad_scale``."""
        factor: float = {"none": 1.0, "rsqrt": self.rank**-0.5, "sqrt": self.rank**0.5}[self.grad_scale]
        return factor

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
            "pulse_type": _PULSE_TYPES[self.pulse.pulse_type],
            "fixed_bl": self.pulse.fixed_bl,
            "max_bl": self.pulse.longest,
            "x_res": self.pulse.x_res,
            "d_res": self.pulse.d_res,
            "sto_round": self.pulse.sto_round,
            "um_grad_scale": self.pulse.um_grad_scale,
            "transfer_pulse_type": _PULSE_TYPES[self.transfer_pulse.pulse_type],
            "transfer_x_res": self.transfer_pulse.x_res,
            "transfer_d_res": self.transfer_pulse.d_res,
            "transfer_sto_round": self.transfer_pulse.sto_round,
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
