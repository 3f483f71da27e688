"""Which nudged windows there are and how their energies combine to the gradient of the loss."""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass
from typing import Literal

from lightning_lrtt import _check

Kind = Literal[
    "positive",
    "negative",
    "random_sign",
    "centered",
    "holomorphic",
    "contrastive",
    "coupled_positive",
    "coupled_negative",
    "coupled_centered",
]
KINDS: tuple[str, ...] = Kind.__args__  # type: ignore[attr-defined]  # of a Literal


@dataclass(frozen=True)
class Branch:
    """One energy of the estimate ``sum_k weight_k E(theta, s_k) / divisor``.

    Args:
        factor: beta of the window in units of the estimator's beta; 0 is the free state itself.
        weight: Its share.
    """

    factor: complex
    weight: complex


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """How the phases are nudged and combined; one beta is the strength of the nudge and the divisor.

    One-sided: Scellier & Bengio (2017); random sign and centered: Laborieux et al. (2021); holomorphic: Laborieux & Zenke
    (2022); contrastive: Movellan (1991); coupled: Stern et al. (2021), Scellier et al. (2023).

    ============================ ============================================== ==========================
    kind                         gradient of the loss                           error
    ============================ ============================================== ==========================
    positive                     [dE(s_b) - dE(s_0)] / b                        O(b)
    negative                     [dE(s_0) - dE(s_-b)] / b                       O(b)
    random_sign                  one of the two, drawn for each batch           O(b^2) in the mean
    centered                     [dE(s_b) - dE(s_-b)] / 2b                      O(b^2)
    holomorphic                  (1/(N b)) sum_k e^(-i t_k) dE(s at b e^(i t_k)) falls geometrically with N
    contrastive                  dE(outputs at the target) - dE(s_0)            no gradient
    coupled_positive, _negative  outputs held at o -+ b dcost/do, else as above O(b)
    coupled_centered             the same                                       O(b^2)
    ============================ ============================================== ==========================

    Coupled learning's limit is the gradient of another cost, whose derivative by the outputs is S dcost/do, with S the
    energy's Hessian in the outputs after the other states have been eliminated.

    Args:
        kind: See the table.
        beta: Strength, > 0; a module's schedule may move it. Contrastive learning has none: leave it out there.
        points: N of ``holomorphic``, >= 2 (2 is ``centered``).
        seed: Of the signs of ``random_sign``.

    Raises:
        ValueError: If a number is out of range, or ``points`` or ``beta`` is given to a kind that has none.

    Example:
        >>> Estimator(kind="centered", beta=0.1).branches()
        (Branch(factor=1.0, weight=0.5), Branch(factor=-1.0, weight=-0.5))
    """

    kind: Kind = "centered"
    beta: float = 0.1
    points: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check.choice("Estimator", "kind", self.kind, KINDS)
        _check.number("Estimator", "beta", self.beta, above=0.0)
        _check.integer("Estimator", "seed", self.seed, low=0)
        if self.kind == "holomorphic":
            if self.points is None:
                raise _check.fail("Estimator", "points", "given for kind 'holomorphic'", None, "4 is a good start")
            _check.integer("Estimator", "points", self.points, low=2)
        elif self.points is not None:
            raise _check.fail(
                "Estimator",
                "points",
                f"left out for kind {self.kind!r}",
                self.points,
                "only 'holomorphic' has points",
            )
        if self.kind == "contrastive" and self.beta != Estimator.beta:
            raise _check.fail(
                "Estimator",
                "beta",
                "left out for kind 'contrastive'",
                self.beta,
                "it holds the outputs at the target and divides by nothing",
            )

    @property
    def clamps(self) -> bool:
        """Whether outputs are held instead of nudged."""
        return self.kind == "contrastive" or self.kind.startswith("coupled")

    @property
    def divides(self) -> bool:
        """Whether the sum is divided by beta."""
        return self.kind != "contrastive"

    @property
    def is_complex(self) -> bool:
        """Whether states become complex."""
        return self.kind == "holomorphic" and self.points != 2

    def branches(self) -> tuple[Branch, ...]:
        """The energies of the estimate; the weights sum to 0."""
        if self.kind == "holomorphic":
            n = self.points or 2
            turns = [cmath.exp(2j * math.pi * k / n) for k in range(n)]
            if n == 2:
                return Branch(1.0, 0.5), Branch(-1.0, -0.5)
            return tuple(Branch(turn, turn.conjugate() / n) for turn in turns)
        if self.kind.endswith("centered"):
            return Branch(1.0, 0.5), Branch(-1.0, -0.5)
        if self.kind.endswith("negative"):
            return Branch(-1.0, -1.0), Branch(0.0, 1.0)
        return Branch(1.0, 1.0), Branch(0.0, -1.0)  # random_sign: beta itself carries the sign

    def check_range(self, low: float, high: float, beta: float | None = None) -> None:
        """Require every nudge to lie within a system's open interval ``(low, high)``.

        Raises:
            ValueError: Naming the bound.
        """
        if self.clamps:
            return
        strength = self.beta if beta is None else beta
        signs = (1.0, -1.0) if self.kind == "random_sign" else ()
        for factor in (*(complex(b.factor).real for b in self.branches()), *signs):
            if not low < factor * strength < high:
                raise _check.fail(
                    "Estimator",
                    "beta",
                    f"such that every nudge lies in ({low:g}, {high:g})",
                    strength,
                    f"kind {self.kind!r} nudges by {factor * strength:g}, where the nudged energy has no "
                    "minimum that relaxation finds; use a smaller beta",
                )


@dataclass(frozen=True, kw_only=True)
class DecayingBeta:
    """A schedule: ``max(beta * factor ** (step // every), floor)``. Any callable from step to beta is one too.

    Args:
        beta: At step 0, > 0.
        factor: By which it shrinks, in (0, 1].
        every: Optimizer steps between two shrinkings, at least 1.
        floor: It shrinks no further, > 0.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> DecayingBeta(beta=0.4, factor=0.5, every=10)(25)
        0.1
    """

    beta: float = 0.1
    factor: float = 0.5
    every: int = 1000
    floor: float = 1e-4

    def __post_init__(self) -> None:
        _check.number("DecayingBeta", "beta", self.beta, above=0.0)
        _check.number("DecayingBeta", "factor", self.factor, above=0.0, high=1.0)
        _check.integer("DecayingBeta", "every", self.every, low=1)
        _check.number("DecayingBeta", "floor", self.floor, above=0.0)

    def __call__(self, step: int) -> float:
        """Beta at this step."""
        return max(self.beta * self.factor ** (step // self.every), self.floor)
