"""The gradient of backpropagation through time beside the two-phase estimate, and the energy along a free window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lrtt.free_nudged.engine import TwoPhase, ordinary
from lightning_lrtt.free_nudged.system import System


@dataclass(frozen=True)
class Agreement:
    """Two gradients compared as one vector each: scalars on the device.

    Args:
        cosine: Of the angle between them.
        error: ``|estimate - reference| / |reference|``.
    """

    cosine: Tensor
    error: Tensor


def learned(system: System) -> dict[str, Tensor]:
    """The system's parameters that take gradients, by name."""
    return {name: p for name, p in system.named_parameters() if p.requires_grad}


def bptt(system: System, x: Tensor, target: Tensor, steps: int, last: int | None = None) -> dict[str, Tensor]:
    """Gradient of the mean cost after ``steps`` free steps, by backpropagation through the last ``last`` (None: all).

    Args:
        system: Its window must be differentiable, as all of this package are.
        x: Inputs.
        target: Targets, as `System.encode` takes them.
        steps: Length of the window.
        last: Steps to go back.

    Returns:
        By parameter name, of the parameter's shape and dtype; zeros where a parameter has no effect.

    Example:
        >>> import torch
        >>> from lightning_lrtt.free_nudged import HopfieldMLP
        >>> system = HopfieldMLP([4, 8, 2])
        >>> gradient = bptt(system, torch.rand(3, 4), torch.tensor([0, 1, 0]), steps=10)
        >>> sorted(gradient) == sorted(name for name, _ in system.named_parameters())
        True
    """
    last = steps if last is None else last
    with ordinary(x, target) as (x, target), torch.autocast(x.device.type, enabled=False):
        with torch.no_grad():
            context = system.prepare(x=x, differentiable=False)
            states = system.start(x=x, context=context)
            if steps > last:
                states = system.window(
                    x=x, context=context, states=states, steps=steps - last, target=None, beta=None, clamped=None
                )
        with torch.enable_grad():
            context = system.prepare(x=x, differentiable=True)
            states = system.window(
                x=x, context=context, states=states, steps=last, target=None, beta=None, clamped=None
            )
            cost = system.cost(states=states, target=system.encode(target=target)).mean()
            return _gradients(cost, system)


def estimate(engine: TwoPhase, x: Tensor, target: Tensor, beta: Tensor | None = None) -> dict[str, Tensor]:
    """The engine's gradient, by parameter name; touches no ``.grad`` and latches nothing.

    `System.commit` is called, as in a training step.

    Args:
        engine: Its system, estimator and windows.
        x: Inputs.
        target: Targets, as `System.encode` takes them.
        beta: A scalar tensor; None: the estimator's.

    Example:
        >>> import torch
        >>> from lightning_lrtt.free_nudged import Estimator, HopfieldMLP, TwoPhase
        >>> _ = torch.manual_seed(0)
        >>> system = HopfieldMLP([4, 8, 2])
        >>> engine = TwoPhase(system, Estimator(kind="centered", beta=0.1))
        >>> x, target = torch.rand(3, 4), torch.tensor([0, 1, 0])
        >>> found = agreement(estimate(engine, x, target), bptt(system, x, target, steps=60))
        >>> bool(found.cosine > 0.99)
        True
    """
    outcome = engine.run(x, target, beta)
    with torch.inference_mode(False), torch.enable_grad():
        return _gradients(engine.surrogate(x, outcome, beta), engine.system)


def agreement(estimated: dict[str, Tensor], reference: dict[str, Tensor]) -> Agreement:
    """Compare two gradients over all parameters.

    Args:
        estimated: By parameter name, as `estimate` returns it.
        reference: As `bptt` returns it; its names count.

    Example:
        >>> import torch
        >>> float(agreement({"w": torch.ones(2)}, {"w": 2 * torch.ones(2)}).error)
        0.5
    """
    one = torch.cat([estimated[name].flatten() for name in reference])
    other = torch.cat([g.flatten() for g in reference.values()])
    return Agreement(torch.nn.functional.cosine_similarity(one, other, dim=0), (one - other).norm() / other.norm())


def energy_trace(system: System, x: Tensor, steps: int) -> Tensor:
    """Mean energy before and after each step of a free window ``[steps + 1]``, on the device.

    It falls monotonically where relaxation is a descent (``even_odd`` order, or small steps); a trace that rises says
    that relaxation does not converge.

    Args:
        system: What relaxes.
        x: Inputs.
        steps: Length of the window.

    Example:
        >>> import torch
        >>> from lightning_lrtt.free_nudged import HopfieldMLP
        >>> energy_trace(HopfieldMLP([4, 8, 2]), torch.rand(3, 4), steps=5).shape
        torch.Size([6])
    """
    with ordinary(x, gradients=False) as (x,), torch.autocast(x.device.type, enabled=False):
        context = system.prepare(x=x, differentiable=False)
        states = system.start(x=x, context=context)
        trace = [system.energy(x=x, context=context, states=states).mean()]
        for _ in range(steps):
            states = system.window(x=x, context=context, states=states, steps=1, target=None, beta=None, clamped=None)
            trace.append(system.energy(x=x, context=context, states=states).mean())
        return torch.stack(trace)


def _gradients(scalar: Tensor, system: System) -> dict[str, Tensor]:
    parameters = learned(system)
    # Backward outside of autocast, as Lightning's: products of backward are rounded too where it is switched on.
    with torch.autocast(scalar.device.type, enabled=False):
        grads = torch.autograd.grad(scalar, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }
