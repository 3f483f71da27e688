"""The nonlinearities of states and the costs of outputs, with what the two-phase engine must know of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lrtt import _check


@dataclass(frozen=True)
class Activation:
    """``s = rho(u)`` and the potential G with ``G' = rho^-1``, so that ``s = rho(dPhi/ds)`` minimises ``G(s) -
    Phi(s)``.

    Args:
        name: As users write it.
        apply: rho, a new tensor.
        apply_: rho in place.
        potential: G, element by element.
        low: Lower end of the states' range.
        high: Upper end.
        slope: Largest derivative of rho.
        holomorphic: Whether rho continues to complex arguments.
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    potential: Callable[[Tensor], Tensor]
    low: float
    high: float
    slope: float
    holomorphic: bool

    def saturated(self, states: Tensor) -> Tensor:
        """Which states are within 1% of an end of their range (bool); never for an unbounded one."""
        if not math.isfinite(self.high - self.low):
            return torch.zeros_like(states, dtype=torch.bool)
        margin = 0.01 * (self.high - self.low)
        return (states <= self.low + margin) | (states >= self.high - margin)


def _half_square(s: Tensor) -> Tensor:
    return 0.5 * s * s


def _tanh_potential(s: Tensor) -> Tensor:
    return 0.5 * (torch.xlogy(1 + s, 1 + s) + torch.xlogy(1 - s, 1 - s))


def _sigmoid_potential(s: Tensor) -> Tensor:
    return torch.xlogy(s, s) + torch.xlogy(1 - s, 1 - s)


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("tanh", torch.tanh, torch.tanh_, _tanh_potential, -1.0, 1.0, 1.0, True),
        Activation("sigmoid", torch.sigmoid, torch.sigmoid_, _sigmoid_potential, 0.0, 1.0, 0.25, True),
        # clip(u, 0, 1): the energy is s^2/2 within the box.
        Activation(
            "hard_sigmoid", lambda u: u.clamp(0, 1), lambda u: u.clamp_(0, 1), _half_square, 0.0, 1.0, 1.0, False
        ),
        Activation("linear", lambda u: u, lambda u: u, _half_square, -math.inf, math.inf, 1.0, True),
    )
}


@dataclass(frozen=True)
class Cost:
    """The cost of one sample's outputs, by which they are nudged.

    Args:
        name: As users write it.
        value: Outputs and target ``[N, K]`` to the cost of each sample ``[N]``.
        gradient: Its gradient by the outputs ``[N, K]``.
        slope: Lipschitz constant of the gradient.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    slope: float


def _softmax(s: Tensor) -> Tensor:
    e = torch.exp(s - s.real.amax(1, keepdim=True)) if s.is_complex() else torch.exp(s - s.amax(1, keepdim=True))
    return e / e.sum(1, keepdim=True)


def _cross_entropy(s: Tensor, y: Tensor) -> Tensor:
    shift = (s.real if s.is_complex() else s).amax(1, keepdim=True)
    shifted = s - shift
    return (torch.log(torch.exp(shifted).sum(1, keepdim=True)) * y - shifted * y).sum(1)


COSTS = {
    c.name: c
    for c in (
        Cost("mse", lambda s, y: 0.5 * ((s - y) ** 2).sum(1), lambda s, y: s - y, 1.0),
        Cost("cross_entropy", _cross_entropy, lambda s, y: _softmax(s) * y.sum(1, keepdim=True) - y, 0.5),
    )
}


def solves_output(activation: Activation, cost: Cost) -> bool:
    """Whether the nudged output has a closed form: ``(u + beta y) / (1 + beta)``, clipped to the box if there is
    one.
    """
    return cost.name == "mse" and activation.name in ("linear", "hard_sigmoid")


def beta_range(activation: Activation, cost: Cost) -> tuple[float, float]:
    """The open interval of beta in which the nudged output is a minimum that relaxation finds.

    With a quadratic potential and squared error the output's energy is bounded below for beta > -1. Otherwise the
    output is iterated, which contracts while ``|beta| * slope(rho) * slope(cost) < 1``.
    """
    if solves_output(activation, cost):
        return -1.0, math.inf
    bound = 1.0 / (activation.slope * cost.slope)
    return -bound, bound


def activation_named(owner: str, argument: str, name: str) -> Activation:
    """Look up an activation.

    Raises:
        ValueError: If there is none of this name.
    """
    _check.choice(owner, argument, name, ACTIVATIONS)
    return ACTIVATIONS[name]


def cost_named(owner: str, name: str) -> Cost:
    """Look up a cost.

    Raises:
        ValueError: If there is none of this name.
    """
    _check.choice(owner, "cost", name, COSTS)
    return COSTS[name]


def one_hot(target: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Targets ``[N, classes]``: class indices are expanded (without a host read), anything else is cast.

    Raises:
        ValueError: If the shape fits neither.
    """
    if not target.is_floating_point() and not target.is_complex() and target.dim() == 1:
        return (target.unsqueeze(1) == torch.arange(classes, device=target.device)).to(dtype)
    if target.dim() != 2 or target.shape[1] != classes:
        raise _check.fail("free_nudged", "target", f"class indices [N] or values [N, {classes}]", list(target.shape))
    return target.to(dtype)
