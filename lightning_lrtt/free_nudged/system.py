"""What a system is to the engine: states that relax, an energy, a cost; the protocol and its defaults by autograd."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

States = dict[str, Tensor]

# Keyword-only arguments of the hooks; a hook with others is refused at setup.
HOOKS: dict[str, tuple[str, ...]] = {
    "prepare": ("x", "differentiable"),
    "start": ("x", "context"),
    "energy": ("x", "context", "states"),
    "cost": ("states", "target"),
    "output": ("states",),
    "encode": ("target",),
    "window": ("x", "context", "states", "steps", "target", "beta", "clamped"),
    "contrast": ("x", "target", "phases", "form"),
    "registered": (),
    "commit": ("x", "states", "target"),
    "beta_range": (),
}


@dataclass(frozen=True)
class Phase:
    """The end of one window and its share in the estimate.

    Args:
        states: By name, detached.
        weight: Coefficient of its energy, before the division by beta.
        beta: The nudge ``[]``; None in a free or clamped window.
    """

    states: States
    weight: complex
    beta: Tensor | None = None


class System(nn.Module):
    """A physical system to be trained by free and nudged relaxation.

    Subclass it and write `start`, `energy`, `cost` and `output`; the other hooks have defaults by autograd, in which
    states follow the gradient flow ``s <- s - rate d(E + beta cost)/ds``. All hooks take keyword arguments only. A
    window must not change the states that it is given, and must return states of the same names; they keep their
    shapes, but for records of the path, which may grow. Whatever else it
    changes (a history, counters in tensors, a `torch.Generator`) it must name in `registered`.

    Args:
        rate: Step of the default gradient flow, > 0.

    Attributes:
        stackable: Whether several windows may run as one over copies of the batch: samples do not interact and
            nothing is registered.
        holomorphic: Whether the window continues to complex beta.
        clampable: Whether outputs can be held, as contrastive and coupled learning do.

    Example:
        >>> import torch
        >>> class Spring(System):  # E = (s - w x)^2 / 2
        ...     def __init__(self):
        ...         super().__init__(rate=0.5)
        ...         self.w = torch.nn.Parameter(torch.tensor(2.0))
        ...     def start(self, *, x, context):
        ...         return {"s": torch.zeros_like(x)}
        ...     def energy(self, *, x, context, states):
        ...         return 0.5 * ((states["s"] - self.w * x) ** 2).sum(1)
        ...     def cost(self, *, states, target):
        ...         return 0.5 * ((states["s"] - target) ** 2).sum(1)
        ...     def output(self, *, states):
        ...         return states["s"]
        >>> system, x = Spring(), torch.ones(1, 1)
        >>> states = system.start(x=x, context=None)
        >>> with torch.no_grad():
        ...     states = system.window(
        ...         x=x, context=None, states=states, steps=60, target=None, beta=None, clamped=None
        ...     )
        >>> states["s"]
        tensor([[2.]])
    """

    stackable = False
    holomorphic = False
    clampable = True

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate

    # -------------------------------------------------------------- to be written

    def start(self, *, x: Tensor, context: Any) -> States:
        """The states before the free window, each with the batch first."""
        raise NotImplementedError

    def energy(self, *, x: Tensor, context: Any, states: States) -> Tensor:
        """E of each sample ``[N]``, differentiable by the parameters and the states."""
        raise NotImplementedError

    def cost(self, *, states: States, target: Tensor) -> Tensor:
        """Cost of each sample ``[N]``, never averaged: an average would weaken the nudge N-fold."""
        raise NotImplementedError

    def output(self, *, states: States) -> Tensor:
        """The outputs ``[N, K]``: a view of a state."""
        raise NotImplementedError

    # -------------------------------------------------------------- with defaults

    def prepare(self, *, x: Tensor, differentiable: bool) -> Any:
        """What all windows of a step share, e.g. frozen weights and the input's drive; handed to the other hooks.

        ``differentiable`` asks for one through which gradients reach the parameters.
        """
        return None

    def encode(self, *, target: Tensor) -> Tensor:
        """Targets as `cost` wants them."""
        return target

    def registered(self) -> Mapping[str, Any]:
        """Tensors and generators that a window changes besides the states; they are restored between phases.

        A step that fails leaves them as it found them. `FreeNudgedModule` saves what no state dict holds in checkpoints.
        """
        return {}

    def commit(self, *, x: Tensor, states: States, target: Tensor) -> None:
        """Called once a step, after all phases, with the free states: the place to write a memory."""

    def check(self) -> None:
        """Called when training is set up: raise if this system cannot be relaxed as it is."""

    def beta_range(self) -> tuple[float, float]:
        """Open interval of beta in which the nudged energy has a minimum."""
        return -math.inf, math.inf

    def window(
        self,
        *,
        x: Tensor,
        context: Any,
        states: States,
        steps: int,
        target: Tensor | None,
        beta: Tensor | None,
        clamped: Tensor | None,
    ) -> States:
        """``steps`` steps of relaxation: free (``beta`` None), nudged by beta (``[]`` or ``[N]``) towards ``target``,
        or with outputs held at ``clamped``.
        """
        differentiable = torch.is_grad_enabled()
        for _ in range(steps):
            with torch.enable_grad():
                leaves = {
                    name: s if differentiable and s.requires_grad else s.detach().requires_grad_()
                    for name, s in states.items()
                }
                total = self.energy(x=x, context=context, states=leaves)
                if beta is not None:
                    assert target is not None
                    total = total + beta * self.cost(states=leaves, target=target)
                slopes = torch.autograd.grad(
                    total.sum(), list(leaves.values()), create_graph=differentiable, allow_unused=True
                )
            states = {
                name: s if g is None else s - self.rate * g for (name, s), g in zip(leaves.items(), slopes, strict=True)
            }
            if not differentiable:
                states = {name: s.detach() for name, s in states.items()}
            if clamped is not None:
                states = self.hold(states, clamped)
        return states

    def project(self) -> None:
        """Bring the parameters back to what is physical, e.g. conductances >= 0; called right after each update, before
        callbacks see the parameters. Calling it twice must be as good as once.
        """

    def hold(self, states: States, value: Tensor) -> States:
        """Copies of the states with the outputs set to ``value``."""
        copies = {name: s.clone() for name, s in states.items()}
        self.output(states=copies).copy_(value)
        return copies

    def contrast(self, *, x: Tensor, target: Tensor, phases: Sequence[Phase], form: str) -> Tensor:
        """``sum_k weight_k (E(theta, s_k) + beta_k cost(s_k))``, averaged over the batch, differentiable by the
        parameters: the surrogate before its division by beta. The cost matters where parameters enter it.

        Args:
            x: Inputs.
            target: Encoded targets.
            phases: Ends of the windows; the weights sum to 0.
            form: ``difference`` or ``direct``. It changes what pulsed tiles are sent, so it means nothing here.
        """
        total: Any = 0.0
        # Without autocast, as the windows: energies of whole states are subtracted here, and in bfloat16 their
        # difference would be rounding.
        with torch.autocast(x.device.type, enabled=False):
            context = self.prepare(x=x, differentiable=True)
            for phase in phases:
                energy = self.energy(x=x, context=context, states=phase.states)
                if phase.beta is not None:
                    energy = energy + phase.beta * self.cost(states=phase.states, target=target)
                energy = energy.mean()
                # Python numbers, not tensors: those would be copied from the host within a captured step.
                weight = complex(phase.weight)
                total = total + (energy * weight if energy.is_complex() else energy * weight.real)
        return total.real if total.is_complex() else total  # type: ignore[no-any-return]  # a sum of tensors

    # -------------------------------------------------------------- diagnostics

    def saturation(self, states: States) -> Tensor:
        """Share of states at an end of their range, a scalar; 0 where there is none."""
        first = next(iter(states.values()))
        return torch.zeros((), device=first.device)

    def stack(self, context: Any, copies: int) -> Any:
        """The context of ``copies`` copies of the batch, one after the other; for stackable systems."""
        raise NotImplementedError


def leaves_of(registered: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and generators in what `System.registered` returned, named as `Snapshot` names them (``field.0``)."""
    if isinstance(registered, (Mapping, list, tuple)):
        pairs = registered.items() if isinstance(registered, Mapping) else enumerate(registered)
        for key, part in pairs:
            yield from leaves_of(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, registered


def check_hooks(system: System) -> None:
    """Require every hook's signature to be the protocol's.

    Raises:
        TypeError: Naming the hook, what it takes and what it must take.
    """
    if not isinstance(system, System):
        raise TypeError(
            f"FreeNudgedModule: system must be a System, got {type(system).__name__}; see "
            "lightning_lrtt.free_nudged.System"
        )
    for name, expected in HOOKS.items():
        parameters = list(inspect.signature(getattr(system, name)).parameters.values())
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        keyword_only = all(p.kind is p.KEYWORD_ONLY for p in named)
        complete = takes_any or set(expected) <= {p.name for p in named}
        optional = all(p.default is not p.empty for p in named if p.name not in expected)
        if not (keyword_only and complete and optional):
            want = f"{name}(self, *, {', '.join(expected)})" if expected else f"{name}(self)"
            raise TypeError(
                f"{type(system).__name__}: hook {name} must be {want}, keyword-only, got "
                f"{name}{inspect.signature(getattr(system, name))}; optional arguments can shift when they "
                "are positional"
            )
