"""What stands between the digital world and an array when it is read: converters, noise and their management."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_lrtt import _check
from lightning_lrtt._compiled import LAYOUT

__all__ = ["IOConfig"]

_MANAGEMENTS = {"none": 0, "abs_max": 1, "constant": 2}
_BOUND_MANAGEMENTS = ("none", "iterative", "iterative_worst_case")
_INP_RES, _OUT_RES = 1 / (2**7 - 2), 1 / (2**9 - 2)
_MAX_BM_FACTOR = 1000  # aihwkit's limit where there is no input resolution


@dataclass(frozen=True, kw_only=True)
class IOConfig:
    """The converters of one direction; docs/io.md has the formulas.

    Names and defaults are those of aihwkit's ``IOParameters``.

    An input is divided by the scale of its sample, rounded to the input converter's steps, clipped to ``inp_bound`` and
    multiplied with the array; to the product comes noise, it is rounded to the output converter's steps, clipped to
    ``out_bound``, and scaled back. All of it in float32, whatever the autocast dtype.

    Args:
        is_perfect: Exact reads in this direction; the other arguments have no effect.
        inp_bound: Largest input in absolute value, after scaling; 1 with ``abs_max`` and ``constant``. 0: no bound.
        inp_res: Step of the input converter as a share of its range ``2 inp_bound``. 0: no rounding.
        inp_bits: Instead of ``inp_res``: 2 to 16 bits, ``inp_res = 1 / (2**bits - 2)``.
        inp_noise: Standard deviation of the noise on each converted input.
        inp_sto_round: Round inputs up or down at random, so that they are right on average.
        out_bound: Largest output in absolute value, in the same units. 0: no bound.
        out_res: Step of the output converter as a share of its range ``2 out_bound``. 0: no rounding.
        out_bits: Instead of ``out_res``, as ``inp_bits``.
        out_noise: Standard deviation of the noise on each output before its converter.
        out_sto_round: As ``inp_sto_round``.
        w_noise: Standard deviation of the noise of each weight, fresh at every read. It is applied where it adds up, at
            the output: normal with standard deviation ``w_noise |x|``, x being the converted input (aihwkit's
            ``ADDITIVE_CONSTANT``).
        noise_management: Scale of a sample: ``abs_max``, its largest input in absolute value (a zero input gives a zero
            output); ``constant``, the number ``nm_thres``; ``none``, 1.
        nm_thres: With ``constant`` the scale (0: 1), with ``abs_max`` its largest value (0: no limit).
        bound_management: Forward only. ``iterative``: while an output of a sample is clipped, read again with its scale
            doubled. ``iterative_worst_case``: the first repetition takes the scale at which no output can clip if no
            weight exceeds ``nm_assumed_wmax``, later ones double it. ``none``: clipped outputs stay.
        nm_assumed_wmax: Largest weight that ``iterative_worst_case`` reckons with.
        max_bm_res: Repeat until the input's range in use falls below this share of its steps, ``0.25``: to 2 bits.
        max_bm_rounds: Most repetitions. None: what ``max_bm_res`` allows, with the defaults 4, and 5 in the worst-case
            form.

    Raises:
        ValueError: If a number is outside its range, or two exclude each other.

    Example:
        >>> io = IOConfig(inp_bits=8, out_bits=10, out_noise=0.0)
        >>> round(1 / io.inp_resolution), io.bm_rounds
        (254, 5)
    """

    is_perfect: bool = False
    inp_bound: float = 1.0
    inp_res: float = _INP_RES
    inp_bits: int | None = None
    inp_noise: float = 0.0
    inp_sto_round: bool = False
    out_bound: float = 12.0
    out_res: float = _OUT_RES
    out_bits: int | None = None
    out_noise: float = 0.06
    out_sto_round: bool = False
    w_noise: float = 0.0
    noise_management: Literal["none", "abs_max", "constant"] = "abs_max"
    nm_thres: float = 0.0
    bound_management: Literal["none", "iterative", "iterative_worst_case"] = "iterative"
    nm_assumed_wmax: float = 0.6
    max_bm_res: float = 0.25
    max_bm_rounds: int | None = None

    def __post_init__(self) -> None:
        """Refuse converters that cannot be."""
        me = "IOConfig"
        for name in ("inp_bound", "inp_noise", "out_bound", "out_noise", "w_noise", "nm_thres"):
            _check.number(me, name, getattr(self, name), low=0.0)
        for name in ("inp_res", "out_res"):
            _check.number(me, name, getattr(self, name), low=0.0, high=0.5, remedy="for n steps write 1 / n")
        for name, default in (("inp", _INP_RES), ("out", _OUT_RES)):
            bits = getattr(self, name + "_bits")
            if bits is not None:
                _check.integer(me, name + "_bits", bits, low=2, high=16)
                if getattr(self, name + "_res") != default:
                    raise _check.fail(
                        me,
                        name + "_res",
                        f"left alone with {name}_bits = {bits}",
                        getattr(self, name + "_res"),
                        "give one of the two",
                    )
        _check.number(me, "nm_assumed_wmax", self.nm_assumed_wmax, above=0.0)
        _check.number(me, "max_bm_res", self.max_bm_res, above=0.0)
        if self.max_bm_rounds is not None:
            _check.integer(
                me,
                "max_bm_rounds",
                self.max_bm_rounds,
                low=1,
                high=20,
                remedy="bound_management='none' repeats nothing",
            )
        _check.choice(me, "noise_management", self.noise_management, _MANAGEMENTS)
        _check.choice(me, "bound_management", self.bound_management, _BOUND_MANAGEMENTS)
        for name, resolution in (("inp", self.inp_resolution), ("out", self.out_resolution)):
            if resolution and not getattr(self, name + "_bound"):
                raise _check.fail(
                    me,
                    name + "_bound",
                    f"positive with a resolution of {resolution:g}",
                    0.0,
                    f"steps are a share of the range; set {name}_res=0 to round nothing",
                )
        if self.inp_sto_round and not self.inp_resolution:
            raise _check.fail(me, "inp_sto_round", "off with inp_res=0", True, "there is nothing to round")
        if self.out_sto_round and not self.out_resolution:
            raise _check.fail(me, "out_sto_round", "off with out_res=0", True, "there is nothing to round")
        if self.noise_management != "none" and self.inp_bound not in (0.0, 1.0):
            raise _check.fail(
                me,
                "inp_bound",
                f"1 with noise_management={self.noise_management!r}",
                self.inp_bound,
                "inputs are scaled to it; use nm_thres to clip large ones",
            )
        if self.noise_management == "none" and self.nm_thres:
            raise _check.fail(me, "nm_thres", "0 with noise_management='none'", self.nm_thres, "use 'constant'")
        if self.bound_management == "iterative_worst_case":
            if self.noise_management != "abs_max":
                raise _check.fail(
                    me,
                    "noise_management",
                    "'abs_max' with bound_management='iterative_worst_case'",
                    self.noise_management,
                    "use 'iterative'",
                )
            if not self.out_bound:
                raise _check.fail(
                    me,
                    "out_bound",
                    "positive with bound_management='iterative_worst_case'",
                    self.out_bound,
                    "without a bound nothing clips; use bound_management='none'",
                )

    @property
    def inp_resolution(self) -> float:
        """``inp_res`` in force; 0 if inputs are not rounded."""
        return self.inp_res if self.inp_bits is None else 1 / (2**self.inp_bits - 2)

    @property
    def out_resolution(self) -> float:
        """``out_res`` in force; 0 if outputs are not rounded."""
        return self.out_res if self.out_bits is None else 1 / (2**self.out_bits - 2)

    @property
    def bm_rounds(self) -> int:
        """Most repetitions of one forward read."""
        if self.bound_management == "none" or not self.out_bound or self.is_perfect:
            return 0
        if self.max_bm_rounds is not None:
            return self.max_bm_rounds
        limit = min(self._factor_limit, _MAX_BM_FACTOR)
        if limit < 1.0:
            return 0
        doublings = math.floor(math.log2(limit)) + 1  # aihwkit stops at the first factor above the limit
        return min(doublings + (self.bound_management == "iterative_worst_case"), 20)

    @property
    def levels(self) -> int:
        """Largest integer that stands for an input if inputs are whole numbers of steps, otherwise 0."""
        largest = 0.5 / self.inp_resolution if self.inp_resolution else 0.5
        whole = self.inp_noise == 0.0 and abs(largest - round(largest)) < 1e-6 * largest
        return round(largest) if whole else 0

    @property
    def is_random_input(self) -> bool:
        """Whether two reads of the same input see different operands."""
        return self.inp_noise > 0.0 or self.inp_sto_round

    @property
    def _factor_limit(self) -> float:
        return self.max_bm_res / (2.0 * self.inp_bound * self.inp_resolution) if self.inp_resolution else math.inf

    def pack(self, backward: bool = False) -> torch.Tensor:
        """The numbers in the order the compiled core reads them (csrc/io.h), float64 on the CPU.

        Args:
            backward: Without bound management.
        """
        inp_step = 2.0 * self.inp_bound * self.inp_resolution or 1.0
        out_step = 2.0 * self.out_bound * self.out_resolution or 1.0
        limits = {"abs_max": self.nm_thres or math.inf, "constant": self.nm_thres or 1.0, "none": 1.0}
        worst = self.bound_management == "iterative_worst_case" and not backward
        numbers = {
            "management": _MANAGEMENTS[self.noise_management],
            "nm_thres": limits[self.noise_management],
            "worst_case": self.nm_assumed_wmax / self.out_bound if worst else 0.0,
            "worst_cap": self._factor_limit,
            "inp_round": _rounding(self.inp_resolution, self.inp_sto_round),
            "inp_scale": 1.0 / inp_step,
            "inp_unit": inp_step,
            "inp_limit": _steps(self.inp_bound, inp_step),
            "inp_noise": self.inp_noise / inp_step,
            "out_round": _rounding(self.out_resolution, self.out_sto_round),
            "out_scale": 1.0 / out_step,
            "out_unit": out_step,
            "out_limit": _steps(self.out_bound, out_step),
            "out_noise": self.out_noise,
            "w_noise": self.w_noise * inp_step,
        }
        return torch.tensor([float(numbers[name]) for name in LAYOUT["io"]], dtype=torch.float64, device="cpu")


def _rounding(resolution: float, stochastic: bool) -> int:
    """``Rounding`` of csrc/io.h."""
    return (2 if stochastic else 1) if resolution else 0


def _steps(bound: float, step: float) -> float:
    """A bound in steps; whole where it is meant to be."""
    steps = bound / step if bound else math.inf
    return float(round(steps)) if math.isfinite(steps) and abs(steps - round(steps)) < 1e-6 * steps else steps
