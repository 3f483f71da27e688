"""Runs whole training steps as graphs: what to keep from a capture, and what to do again after every replay."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.trainer.trainer import Trainer
from lightning_lrtt.callbacks._graph_inputs import StepInputs
from lightning_lrtt.callbacks._graph_policy import hooks_of_the_user, most_accumulated
from lightning_lrtt.callbacks._graph_records import Events, Kept, Options, Outputs, Placed
from lightning_lrtt.callbacks._graph_state import IGNORED, StepState
from lightning_lrtt.callbacks._graph_tape import Tape, detached, free, metric_names, plain, watched
from torch import Tensor

from lightning_lrtt import LRTT
from lightning_lrtt.graphs import (
    DeviceForm,
    Entry,
    Finder,
    FrozenValues,
    GraphCache,
    GraphCaptureError,
    HostState,
    PhaseTimer,
    Recorder,
    Recording,
    StateCopy,
    max_difference,
)

# Python numbers that Lightning hands out and that change from step to step.
_FROZEN = {
    owner.__dict__[name].fget.__code__: f"{owner.__name__}.{name}"
    for owner in (LightningModule, Trainer)
    for name in ("current_epoch", "global_step")
}


class StepGraphs:
    """The executor of ``scope='step'`` (see `lightning_lrtt.strategies.seams.StepExecutor`).

    Args:
        trainer: The Trainer, in a fit, with everything restored.
        module: Its module.
        recorder: What records, None on a device without graphs: then the finder still tells what would be in the way.
        form: The device form of the optimizer of digital parameters, None with a recorder of None.
        options: What was asked for.
        events: Where it reports.
        timer: Times the phases ``transfer`` and ``step``, if given.
        give_up: Called with reasons that concern every step; leaves the scope.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        recorder: Recorder | None,
        form: DeviceForm | None,
        options: Options,
        events: Events,
        timer: PhaseTimer | None,
        give_up: Callable[[list[str]], None],
    ) -> None:
        self._trainer, self._module, self._recorder, self._form = trainer, module, recorder, form
        self._options, self._events, self._timer, self._give_up = options, events, timer, give_up
        self._device = trainer.strategy.root_device
        self._optimizer = trainer.optimizers[0]
        self._lrtt = self._optimizer if isinstance(self._optimizer, LRTT) else None
        self._cache: GraphCache[Recording] = GraphCache(options.max_graphs * most_accumulated(trainer))
        self._inputs = StepInputs(trainer, module, self._device, 4 * self._cache.size, events.because)
        self._placed: Placed | None = None
        self._chain: tuple[Hashable, ...] | None = None  # keys of this window's micro-batches so far, all from graphs
        metrics = metric_names(module)
        self._watched = {
            name: child
            for name, child in module.named_modules()
            if name not in metrics and not any(name.startswith(m + ".") for m in metrics)
        }
        digital = self._lrtt.digital if self._lrtt is not None else self._optimizer
        self._hook = digital.register_load_state_dict_post_hook(lambda _: self.clear())
        self._modules = list(self._watched.values())
        self._state = StepState(trainer, module, self._optimizer, self._watched)
        self._now: tuple[int, Any] = (0, None)
        self._circumstances_seen: list[tuple[int, Any]] = []
        self._hyper: Hashable = None
        self._hyper_changes = 0
        self._names: set[str] | None = set() if options.find_syncs else None  # what steps may read; None: anything
        self._changes, self._changed_at = 0, 0
        self._asked_in_a_row = 0
        self._warmed = self._left = self._told_full = False

    # -------------------------------------------------------------- inputs

    def place(self, batch: Any, transfer: Callable[[Any], Any]) -> Any:
        """A training batch in static buffers, if it can be held there."""
        if self._timer is not None:
            self._timer.begin("transfer")
        try:
            position = self._state.position(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)
            eager = None if self._recorder is None else self._needed()
            batch, self._placed = self._inputs.place(batch, transfer, position, eager)
            return batch
        finally:
            if self._timer is not None:
                self._timer.end()

    # -------------------------------------------------------------- a step

    def step(self, optimizer: Any, closure: Any, run: Callable[[], Any], update: bool) -> Any:
        """One micro-batch, with the update at its end if it is the last of its window."""
        if self._timer is not None:
            self._timer.begin("step")
        try:
            return self._step(closure, run, update)
        finally:
            if self._timer is not None:
                self._timer.end()

    def _step(self, closure: Any, run: Callable[[], Any], update: bool) -> Any:
        if self._lrtt is not None:
            self._lrtt.refresh_lr()  # first: from the lr as the user's scheduler left it
        if self._form is not None:
            self._form.refresh()
        position = self._state.position()
        chain = () if position == 0 else self._chain
        self._chain = None
        placed, self._placed = self._placed, None
        assert placed is not None
        if placed.refused:
            self._refuse(placed.refused)
        if placed.refused or chain is None or self._eager_now(closure):
            return self._eager(run)
        key = (*chain, (placed.key, update, self._circumstances()))
        entry = self._cache.entry(key)
        if entry.extra is not None and self._stale(entry.extra, placed):
            self._cache.drop(key)
            entry = self._cache.entry(key)
        if self._left:
            return self._eager(run)
        if entry.recording is not None:
            self._replay(entry, closure, run)
        elif entry.refused:
            return self._eager(run)
        elif entry.seen < self._needed():
            entry.seen += 1
            if entry.seen == self._needed():
                return self._eager_watched(run)
            return self._eager(run)
        elif self._recorder is None:
            entry.extra = entry.extra or self._kept(placed)
            return self._eager(run)
        elif placed.static is None or not self._cache.room(key):
            if not self._told_full:
                self._told_full = True
                self._refuse(
                    f"shape cache full ({self._options.max_graphs}), got {placed.words}; this and other new shapes stay "
                    "eager: pad batches to fewer shapes, or raise max_graphs"
                )
            return self._eager(run)
        elif not self._record(entry, placed, closure, run):
            return closure._result.loss if closure._result is not None else None
        self._chain = key if not update else None
        return closure._result.loss

    def _needed(self) -> int:
        """Eager steps before a capture: later shapes need one only, the libraries are warm."""
        return 1 if self._warmed else self._options.warmup

    def _refuse(self, reason: str) -> None:
        """Say why a step is eager that was to be a graph, or raise it."""
        self._events.because(reason)
        if self._options.on_failure == "raise":
            raise GraphCaptureError(f"CUDAGraph: {reason}; or use on_failure='eager'")

    def _eager_now(self, closure: Any) -> bool:
        """Whether this step has to be eager, whatever its shape."""
        if closure._backward_fn is None:
            self._events.because("a step without backward (an averaging callback refreshes batch statistics)")
            return True
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            wants = getattr(callback, "wants_eager_step", None)
            if wants is not None and wants():
                self._asked_in_a_row += 1
                if self._asked_in_a_row == _ALWAYS:
                    self._events.because(
                        f"{type(callback).__name__} has asked for an eager step {_ALWAYS} times in a row; let it look at fewer "
                        "steps (every_n_steps, the Trainer's log_every_n_steps), or end its trace"
                    )
                return True
        self._asked_in_a_row = 0
        return False

    def _kept(self, placed: Placed) -> Kept:
        return Kept(placed.static, FrozenValues(self._watched, self._names, IGNORED))

    def _stale(self, kept: Kept, placed: Placed) -> bool:
        """Whether a recording reads other buffers than the batch's, or holds Python values that are others now."""
        changed = kept.frozen.changed()
        if changed:
            # A graph every few steps: the value changes, a step is eager, one is captured, the value changes.
            near = self._cache.step - self._changed_at <= 4 * max(self._trainer.accumulate_grad_batches, 1)
            self._changes, self._changed_at = self._changes + 1 if near else 1, self._cache.step
            if self._changes == 3:
                self._leave(
                    [
                        f"{', '.join(changed)} changes from step to step, and a graph freezes Python values: "
                        "hold it in a tensor that is filled in place in on_train_batch_start"
                    ]
                )
        return bool(changed) or kept.static is not placed.static

    def _circumstances(self) -> int:
        """A number for what a recording freezes besides its inputs: addresses, modes, hyperparameters."""
        signature = None if self._form is None else self._form.signature()
        hyper = (signature, self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm)
        if hyper != self._hyper:
            self._hyper_changes = self._hyper_changes + 1 if self._hyper is not None else 0
            self._hyper = hyper
            if self._hyper_changes == 2:
                self._leave(
                    [
                        "gradient clipping, or hyperparameters of the optimizer other than lr, change from step to step, and "
                        "a graph freezes them (OneCycleLR, CyclicLR: cycle_momentum=False)"
                    ]
                )
        elif self._hyper_changes < 2:
            self._hyper_changes = 0
        tensors = self._state.tensors()
        now = (
            self._trainer.accumulate_grad_batches,
            hyper,
            [t.data_ptr() for t in tensors],
            [t.requires_grad for t in tensors],
            [m.training for m in self._modules],
        )
        if now != self._now[1]:  # a short number to hash instead of a long list
            known = [number for number, other in self._circumstances_seen if other == now]
            if not known:
                known = [len(self._circumstances_seen)]
                self._circumstances_seen.append((known[0], now))
            self._now = (known[0], now)
        return self._now[0]

    # -------------------------------------------------------------- eager

    def _contexts(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self._form.active() if self._form is not None else nullcontext())
        stack.enter_context(self._lrtt.lr_held() if self._lrtt is not None else nullcontext())
        return stack

    def _eager(self, run: Callable[[], Any]) -> Any:
        self._events.eager_steps += 1

        def body() -> Any:
            with self._contexts():
                return run()

        return body() if self._recorder is None else self._recorder.eager(body)

    def _eager_watched(self, run: Callable[[], Any]) -> Any:
        """The last eager step before a capture: an ordinary step, looked at by the finder."""
        self._warmed = True
        hooks = [
            f"{hook} would run at the capture and then go silent; do it in forward, or in on_train_batch_end"
            for hook in hooks_of_the_user(self._watched)
        ]
        if hooks:
            self._leave(hooks)
        if hooks or not self._options.find_syncs:
            return self._eager(run)
        finder = Finder(self._device, _FROZEN)
        state = HostState(self._watched, IGNORED)

        def look() -> Any:
            with watched(self._module, finder), finder.watch():
                return run()

        result = self._eager(look)
        reasons = [str(finding) for finding in finder.findings]
        reasons += [
            f"{name} changes in the step: change it in place if it is a tensor, or in on_train_batch_start or _end"
            for name in state.changes()
        ]
        if reasons:
            self._leave(reasons)
        names = finder.names
        self._names = None if self._names is None or names is None else self._names | names
        return result

    def _leave(self, reasons: list[str]) -> None:
        self._left = True
        self._give_up(reasons)

    # -------------------------------------------------------------- capture and replay

    def _body(self, closure: Any, run: Callable[[], Any]) -> Outputs:
        tape = Tape(self._module)
        with tape.recording(), self._contexts():
            run()
        tape.check()
        result, closure._result = closure._result, None
        if result is None or result.loss is None:
            raise ValueError("training_step returned None")
        if not plain(result.extra):
            raise ValueError(
                "training_step returns other things than tensors beside the loss, which a graph would repeat for ever"
            )
        grads = [(p, p.grad) for group in self._optimizer.param_groups for p in group["params"]]
        return Outputs(
            result.loss,
            detached(result.extra),
            tape,
            grads,
            self._state.latches(),
            closure._zero_grad_fn is not None,
        )

    def _record(self, entry: Entry[Recording], placed: Placed, closure: Any, run: Callable[[], Any]) -> bool:
        """Capture the step; True if it ran as a graph, False if it had to be run eagerly."""
        assert self._recorder is not None
        entry.extra = self._kept(placed)
        undo = self._state.preserve()
        eager = None
        states = self._state.of_optimizer()
        try:
            eager = self._eager_twin(closure, run, undo) if self._options.parity_steps else None
            start = time.perf_counter()
            recording = self._recorder.record(partial(self._body, closure, run))
        except Exception as error:
            undo()
            entry.refused = f"capture failed: {_in_words(error)}"
            self._cache.clear_recordings()  # the random generator's state may be a new one
            self._events.because(entry.refused)
            if self._options.on_failure == "raise":
                raise GraphCaptureError(f"CUDAGraph: {entry.refused}") from error
            self._eager(run)
            return False
        if [id(t) for t in self._state.of_optimizer()] != [id(t) for t in states]:
            entry.refused = "the optimizer replaces its state in every step instead of changing it in place"
            self._events.because(entry.refused)
        else:
            entry.recording = recording
        self._events.captures += 1
        self._events.capture_ms = 1e3 * (time.perf_counter() - start)
        self._after(recording.outputs, closure, first=True)
        if eager is not None:
            self._compare(entry, eager, recording.outputs)
        return entry.recording is not None

    def _replay(self, entry: Entry[Recording], closure: Any, run: Callable[[], Any]) -> None:
        assert entry.recording is not None
        eager = None
        if entry.checked < self._options.parity_steps:
            eager = self._eager_twin(closure, run, self._state.preserve())
        entry.recording.replay()
        self._events.replays += 1
        outputs = entry.recording.outputs
        self._after(outputs, closure)
        if eager is not None:
            self._compare(entry, eager, outputs)

    def _after(self, outputs: Outputs, closure: Any, first: bool = False) -> None:
        """What Python does in an eager step and a replay does not."""
        for p, grad in outputs.grads:
            if p.grad is not grad:
                p.grad = grad
        for latch, held in outputs.latches:
            if not held["calls"] and not latch.calls:
                continue
            for call in held["calls"]:
                call.version = call.x._version  # a static input was refilled since the capture, before this replay
            latch.__dict__.update(held, calls=list(held["calls"]))
        if outputs.zeroes and not first:
            progress = self._state.zero_grad_progress()
            progress.increment_ready()
            progress.increment_started()
            progress.increment_completed()
        outputs.tape.play()
        closure._result = ClosureResult(outputs.loss, extra=free(outputs.extra))  # clones the loss

    # -------------------------------------------------------------- parity

    def _eager_twin(
        self, closure: Any, run: Callable[[], Any], undo: Callable[[], None]
    ) -> tuple[StateCopy, list[Tensor]]:
        """The results of the step taken eagerly; afterwards everything is as before it."""
        assert self._recorder is not None
        copy = StateCopy(self._state.all(), self._device)
        try:
            outputs = self._recorder.eager(partial(self._body, closure, run))
            # Detached: a graph that reaches a parameter from here would tie its gradient to this stream.
            values = [t.detach().clone() for t in (*self._state.all(), outputs.loss, *outputs.tape.tensors())]
        finally:
            undo()
            copy.restore()
        return copy, values

    def _compare(self, entry: Entry[Recording], eager: tuple[StateCopy, list[Tensor]], outputs: Outputs) -> None:
        copy, values = eager
        gap = max_difference(values, [*self._state.all(), outputs.loss, *outputs.tape.tensors()])
        entry.checked += 1
        self._events.parity_max_abs = max(gap, self._events.parity_max_abs or 0.0)
        if gap == 0.0:
            return
        reason = f"a replay differs from the eager step by up to {gap:.3g}"
        self._refuse(reason)
        copy.write(values[: len(self._state.all())])
        entry.recording, entry.refused = None, reason

    def clear(self) -> None:
        """Let go of all graphs."""
        self._cache.clear()
        self._chain = None

    def close(self) -> None:
        """Let go of everything."""
        self.clear()
        self._inputs.clear()
        self._hook.remove()
        if self._form is not None:
            self._form.release()


def _in_words(error: Exception) -> str:
    words = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    if "legacy stream" in words:
        words += " (something outside the step holds an autograd graph of a parameter: detach what is kept of it)"
    return words


_ALWAYS = 20  # steps in a row that a callback wants eager before it is named
