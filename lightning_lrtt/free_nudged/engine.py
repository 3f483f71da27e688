"""The two-phase engine: runs the windows of one step and forms the surrogate. It knows nothing of Lightning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lrtt import _check
from lightning_lrtt.free_nudged.couplings import FORMS
from lightning_lrtt.free_nudged.estimator import Estimator
from lightning_lrtt.free_nudged.system import Phase, States, System, check_hooks
from lightning_lrtt.snapshot import Snapshot


@dataclass(frozen=True)
class Outcome:
    """What the windows of one step left.

    Args:
        target: Encoded target.
        free: States after the free window.
        phases: The estimator's branches.
        cost: Mean cost of the free states, a scalar on the device.
        residuals: Largest change of a state in the last step of the free and of the nudged windows ``[2]``; None unless
            asked for.
    """

    target: Tensor
    free: States
    phases: tuple[Phase, ...]
    cost: Tensor
    residuals: Tensor | None


class TwoPhase:
    """Free window, snapshot, nudged windows, surrogate.

    All windows of a step see the same weights; that they did not change is checked by the tensors' versions, without a
    host read. The first step also checks that a window changes nothing that the system has not registered.

    Args:
        system: What relaxes.
        estimator: How it is nudged.
        free_steps: T1, steps of the free window, >= 1.
        nudged_steps: T2, steps of each nudged window, >= 1.
        form: How two phases become outer products on couplings: ``difference`` (exact, and no cancelling pulses) or
            ``direct`` (each phase as it is).
        init: ``zeros`` starts every batch at the system's `start`; ``previous`` where the batch before stopped, if it
            had the same shapes.
        nudge_from: Nudged windows go on from the ``free`` states, or from the ``start`` of the free window (then
            T2 = T1).
        tolerance: Stop the free window once no state moves by more, checked every ``check_every`` steps. This reads
            from the device and so cannot be captured. None: always T1 steps.
        check_every: See ``tolerance``.

    Raises:
        ValueError: If a number is out of range, or the estimator does not suit the system.
        TypeError: If a hook of the system has the wrong signature.
        MisconfigurationException: If a coupling cannot be read both ways (`couplings.check_layers`).

    Example:
        >>> import torch
        >>> from lightning_lrtt.free_nudged import HopfieldMLP
        >>> engine = TwoPhase(HopfieldMLP([4, 8, 2]), Estimator(beta=0.1), free_steps=30, nudged_steps=8)
        >>> x, y = torch.rand(5, 4), torch.tensor([0, 1, 1, 0, 1])
        >>> engine.surrogate(x, engine.run(x, y)).backward()
        >>> engine.system.layers[0].weight.grad.shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        system: System,
        estimator: Estimator,
        free_steps: int = 20,
        nudged_steps: int = 4,
        *,
        form: Literal["difference", "direct"] = "difference",
        init: Literal["zeros", "previous"] = "zeros",
        nudge_from: Literal["free", "start"] = "free",
        tolerance: float | None = None,
        check_every: int = 5,
    ) -> None:
        _check.integer("FreeNudged", "free_steps", free_steps, low=1, remedy="a window needs a step")
        _check.integer("FreeNudged", "nudged_steps", nudged_steps, low=1, remedy="a window needs a step")
        _check.integer("FreeNudged", "check_every", check_every, low=1)
        _check.choice("FreeNudged", "form", form, FORMS)
        _check.choice("FreeNudged", "init", init, ("zeros", "previous"))
        _check.choice("FreeNudged", "nudge_from", nudge_from, ("free", "start"))
        if tolerance is not None:
            _check.number("FreeNudged", "tolerance", tolerance, above=0.0)
        if nudge_from == "start" and free_steps != nudged_steps:
            raise _check.fail(
                "FreeNudged",
                "nudged_steps",
                f"equal to free_steps ({free_steps}) with nudge_from 'start'",
                nudged_steps,
                "windows of different length are compared at different times",
            )
        if nudge_from == "start" and tolerance is not None:
            raise _check.fail(
                "FreeNudged",
                "tolerance",
                "None with nudge_from 'start'",
                tolerance,
                "the free window's length would differ from the nudged one's",
            )
        check_hooks(system)
        system.check()
        if estimator.is_complex and not (system.holomorphic and system.stackable):
            raise _check.fail(
                "FreeNudged",
                "estimator.kind",
                "other than 'holomorphic' for this system",
                type(system).__name__,
                "its window does not continue to complex states: use smooth "
                "activations such as tanh, or kind 'centered'",
            )
        if estimator.clamps and not system.clampable:
            raise _check.fail(
                "FreeNudged",
                "estimator.kind",
                "one that nudges for this system",
                estimator.kind,
                f"outputs of {type(system).__name__} cannot be held: use 'centered'",
            )
        estimator.check_range(*system.beta_range())
        self.system, self.estimator = system, estimator
        self.free_steps, self.nudged_steps = free_steps, nudged_steps
        self.form, self.init, self.nudge_from = form, init, nudge_from
        self.tolerance, self.check_every = tolerance, check_every
        self.previous: States | None = None
        self._registered: dict[int, Any] = {}
        self._entry, self._before, self._after = Snapshot(), Snapshot(), Snapshot()
        self._verified = False

    @property
    def capturable(self) -> bool:
        """Whether a step can be part of a CUDA graph: fixed windows, no generator to restore, no warm start."""
        self._register()
        return self.tolerance is None and self._after.capturable and self.init == "zeros"

    # -------------------------------------------------------------- windows

    def free(self, x: Tensor, steps: int | None = None) -> States:
        """The states after a free window from the system's start; changes nothing."""
        with ordinary(x, gradients=False) as (x,), torch.autocast(x.device.type, enabled=False):
            self._register()
            self._after.take()
            with self._undone_by_errors(self._after):
                context = self.system.prepare(x=x, differentiable=False)
                states = self.system.start(x=x, context=context)
                states = self.system.window(
                    x=x,
                    context=context,
                    states=states,
                    steps=steps or self.free_steps,
                    target=None,
                    beta=None,
                    clamped=None,
                )
            self._after.restore()
            return states

    def run(self, x: Tensor, target: Tensor, beta: Tensor | None = None, measure: bool = False) -> Outcome:
        """All windows of one step. One that fails leaves registered state and ``previous`` as it found them.

        Args:
            x: Inputs, batch first.
            target: Targets, as the system's `encode` takes them.
            beta: Scalar on the device; None: the estimator's.
            measure: Also measure residuals.

        Raises:
            UnregisteredStateError: On the first step, if a window changes state that the system has not registered.
            RuntimeError: If the weights changed between phases.
        """
        # Without autocast: in bfloat16 the difference of the phases would be rounding.
        with ordinary(x, target, gradients=False) as (x, target), torch.autocast(x.device.type, enabled=False):
            self._register()
            versions = [(name, p, p._version) for name, p in self.system.named_parameters()]
            guard = contextlib.nullcontext() if self._verified else self._after.guard(self.system)
            # One copy of what is registered: without it an error in the free window could not be undone. A capture runs
            # nothing that could need it, and every replay would copy.
            entry = None if x.is_cuda and torch.cuda.is_current_stream_capturing() else self._entry
            if entry is not None:
                entry.take()
            with self._undone_by_errors(entry):
                with guard:
                    outcome = self._windows(x, self.system.encode(target=target), self._beta(x, beta), measure)
                self._verified = True
                changed = [name for name, p, version in versions if p._version != version]
                if changed:
                    raise RuntimeError(
                        f"FreeNudged: weights must stay as they are between phases, but {', '.join(changed)} "
                        "changed in a window; updates belong to the optimizer's step"
                    )
                self.system.commit(x=x, states=outcome.free, target=outcome.target)
            return outcome

    @contextlib.contextmanager
    def _undone_by_errors(self, snapshot: Snapshot | None) -> Iterator[None]:
        """Whatever is raised within leaves registered state as ``snapshot`` holds it, and ``previous`` as it was."""
        previous = self.previous
        try:
            yield
        except BaseException:
            self.previous = previous
            if snapshot is not None:
                # On a device that failed nothing can be restored; the first error is the one to be seen.
                with contextlib.suppress(RuntimeError):
                    snapshot.restore()
            raise

    def _beta(self, x: Tensor, beta: Tensor | None) -> Tensor:
        if beta is not None:
            return beta
        parameter = next(iter(self.system.parameters()))
        return torch.full((), self.estimator.beta, dtype=parameter.dtype, device=parameter.device)

    def _windows(self, x: Tensor, target: Tensor, beta: Tensor, measure: bool) -> Outcome:
        system, from_start = self.system, self.nudge_from == "start"
        context = system.prepare(x=x, differentiable=False)
        start = self._start(x, context)
        if from_start:
            self._before.take()
        free, moved = self._free(x, context, start, measure)
        if self.init == "previous":
            self.previous = free
        self._after.take()
        origin, snapshot = (start, self._before) if from_start else (free, self._after)
        branches = self.estimator.branches()
        nudged = [b for b in branches if b.factor != 0]
        clamped = [self._clamp(free, target, beta, b.factor) for b in nudged] if self.estimator.clamps else None
        strengths = [beta * b.factor for b in nudged]
        if system.stackable and len(nudged) > 1:
            ends, residual = self._stacked(x, context, origin, target, strengths, clamped, measure)
        else:
            ends, residual = [], moved
            for k, strength in enumerate(strengths):
                snapshot.restore()
                end, last = self._window(
                    x,
                    context,
                    origin,
                    self.nudged_steps,
                    target,
                    None if clamped else strength,
                    clamped[k] if clamped else None,
                    measure,
                )
                ends.append(end)
                residual = last if k == 0 or last is None or residual is None else torch.maximum(residual, last)
        self._after.restore()
        ordered = iter(zip(ends, strengths, strict=True))
        phases = []
        for branch in branches:
            if branch.factor == 0:
                phases.append(Phase(free, branch.weight))
            else:
                states, strength = next(ordered)
                phases.append(Phase(states, branch.weight, None if clamped else strength))
        residuals = torch.stack([moved, residual]) if moved is not None and residual is not None else None
        return Outcome(target, free, tuple(phases), system.cost(states=free, target=target).mean(), residuals)

    def _start(self, x: Tensor, context: Any) -> States:
        start = self.system.start(x=x, context=context)
        if self.init == "previous" and self.previous is not None and _alike(start, self.previous):
            # Those of a checkpoint are where it was loaded, which may be before the module moved to its device.
            return {name: s.to(start[name].device) for name, s in self.previous.items()}
        return start

    def _free(self, x: Tensor, context: Any, start: States, measure: bool) -> tuple[States, Tensor | None]:
        if self.tolerance is None:
            return self._window(x, context, start, self.free_steps, None, None, None, measure)
        states, done = start, 0
        while True:
            steps = min(self.check_every, self.free_steps - done)
            states, moved = self._window(x, context, states, steps, None, None, None, True)
            done += steps
            assert moved is not None
            if done >= self.free_steps or bool(moved <= self.tolerance):
                return states, moved

    def _window(
        self,
        x: Tensor,
        context: Any,
        states: States,
        steps: int,
        target: Tensor | None,
        beta: Tensor | None,
        clamped: Tensor | None,
        measure: bool,
    ) -> tuple[States, Tensor | None]:
        run = self.system.window
        if not measure:
            return run(
                x=x, context=context, states=states, steps=steps, target=target, beta=beta, clamped=clamped
            ), None
        if steps > 1:
            states = run(
                x=x, context=context, states=states, steps=steps - 1, target=target, beta=beta, clamped=clamped
            )
        last = run(x=x, context=context, states=states, steps=1, target=target, beta=beta, clamped=clamped)
        return last, distance(states, last)

    def _stacked(
        self,
        x: Tensor,
        context: Any,
        origin: States,
        target: Tensor,
        strengths: list[Tensor],
        clamped: list[Tensor] | None,
        measure: bool,
    ) -> tuple[list[States], Tensor | None]:
        """All nudged windows as one over copies of the batch: fewer, larger products."""
        copies, n = len(strengths), len(target)
        beta = torch.stack(strengths).repeat_interleave(n)
        states = {name: s.repeat(copies, *[1] * (s.dim() - 1)) for name, s in origin.items()}
        ends, residual = self._window(
            x.repeat(copies, *[1] * (x.dim() - 1)),
            self.system.stack(context, copies),
            states,
            self.nudged_steps,
            target.repeat(copies, *[1] * (target.dim() - 1)),
            None if clamped else beta,
            torch.cat(clamped) if clamped else None,
            measure,
        )
        parts = {name: s.chunk(copies) for name, s in ends.items()}
        return [{name: part[k] for name, part in parts.items()} for k in range(copies)], residual

    def _clamp(self, free: States, target: Tensor, beta: Tensor, factor: complex) -> Tensor:
        if self.estimator.kind == "contrastive":
            return target
        with torch.enable_grad():
            leaves = {name: s.detach().requires_grad_() for name, s in free.items()}
            outputs = self.system.output(states=leaves)
            slopes = torch.autograd.grad(
                self.system.cost(states=leaves, target=target).sum(), list(leaves.values()), allow_unused=True
            )
        grads = {
            name: torch.zeros_like(s) if g is None else g for (name, s), g in zip(leaves.items(), slopes, strict=True)
        }
        return outputs.detach() - factor.real * beta * self.system.output(states=grads)

    def _register(self) -> None:
        """Keep the snapshots' registries those of the system, whose tensors may have moved to another device."""
        registered = dict(self.system.registered())
        leaves = {id(leaf): leaf for leaf in torch.utils._pytree.tree_leaves(registered)}
        if leaves.keys() == self._registered.keys():
            return
        self._registered = leaves
        self._entry, self._before, self._after = Snapshot(), Snapshot(), Snapshot()
        for snapshot in (self._entry, self._before, self._after):
            for name, value in registered.items():
                snapshot.add(name, value)

    # -------------------------------------------------------------- the surrogate

    def surrogate(self, x: Tensor, outcome: Outcome, beta: Tensor | None = None) -> Tensor:
        """A scalar whose gradient by the parameters is the estimator's row exactly; its value is no loss.

        Args:
            x: As in `run`.
            outcome: What `run` returned.
            beta: As in `run`.
        """
        with ordinary(x) as (x,):
            total = self.system.contrast(x=x, target=outcome.target, phases=outcome.phases, form=self.form)
            if self.estimator.divides:
                total = total / self._beta(x, beta)
            return total


def distance(one: States, other: States) -> Tensor:
    """Largest absolute difference of any state, a scalar on the device; a state that grew (a recorded path) is left
    out.
    """
    pairs = [(s, other[name]) for name, s in one.items() if s.numel() and s.shape == other[name].shape]
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max()


def _alike(one: States, other: States) -> bool:
    return one.keys() == other.keys() and all(
        s.shape == other[name].shape and s.dtype == other[name].dtype for name, s in one.items()
    )


@contextlib.contextmanager
def ordinary(*tensors: Tensor, gradients: bool | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Out of inference mode, in which no state can be differentiated; tensors that come from there are copied.

    ``gradients``: whether they are recorded; None: as outside. Leaving inference mode switches them on.
    """
    gradients = torch.is_grad_enabled() if gradients is None else gradients
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield tuple(t.clone() if t.is_inference() else t for t in tensors)
