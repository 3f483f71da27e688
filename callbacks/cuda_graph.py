"""CUDAGraph: training steps as CUDA graphs, with every reason for not doing so said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_lrtt.callbacks._graph_policy import step_reasons
from lightning_lrtt.callbacks._graph_records import Events, Options
from lightning_lrtt.callbacks._graph_step import StepGraphs
from typing_extensions import override

from lightning_lrtt import LRTT, _check
from lightning_lrtt.graphs import CudaRecorder, DeviceForm, PhaseTimer, Recorder, TileGraphs
from lightning_lrtt.nn.tile import TileModule
from lightning_lrtt.strategies.seams import ExecutorSeams
from lightning_lrtt.strategies.tiles import TileStrategy

log = logging.getLogger("lightning_lrtt")


class CUDAGraph(Callback):
    """Run training steps as CUDA graphs: forward, backward, clipping, update and transfer in one launch.

    For every shape of batch the first steps run eagerly, on real batches and as real steps; then one is captured, and
    from there on replayed. lr, counters and random numbers come from device memory, so schedules and noise go on. Calls
    of ``self.log`` and of torchmetrics are made again after every replay. Validation, checkpoints and everything else
    outside the step stay as they are. Needs a strategy of this package.

    What cannot be recorded is found before the capture where possible, named with file and line, and said once on the
    logger ``lightning_lrtt`` and as text under ``graph/reasons``. Then only the update of the tiles is recorded
    (``optimizer``), or the step stays eager. docs/graphs.md tells what is refused and why.

    Logged to all loggers: ``graph/captures``, ``graph/replays``, ``graph/eager_steps`` (so far), ``graph/pool_MiB``,
    ``graph/capture_ms`` (the last capture), ``graph/parity_max_abs``, with ``timing`` ``graph/transfer_ms`` and
    ``graph/step_ms``, in scope ``optimizer`` ``graph/update_ms``.

    Args:
        scope: ``step`` records whole steps where possible; ``optimizer`` the update of the tiles only.
        warmup: Eager steps before the first capture, at least 1; later shapes take one.
        max_graphs: Shapes with a graph at the same time, at least 1. A shape beyond them runs eagerly, unless a graph
            has rested for 100 steps and makes room.
        on_failure: ``eager`` goes on without a graph; ``raise`` raises where a step cannot be recorded, a shape beyond
            ``max_graphs`` included.
        parity_steps: So many steps of every graph are also taken eagerly, from the same state, and the largest
            difference of any parameter, buffer, optimizer state and logged value is logged. A graph that differs at all
            is given up (kernels with unordered atomic additions differ from themselves). For scope ``step``.
        timing: Log device times of the phases, by events that are read when the device has passed them.
        find_syncs: Look for host synchronisations and frozen host values in the last eager step before a capture.
        every_n_steps: Optimizer steps between logs; None: the Trainer's ``log_every_n_steps``.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At setup, with a strategy that is not ours; with ``on_failure='raise'`` if whole
            steps cannot be recorded: at the start of training, or after the eager steps, when the finder has looked.
        GraphCaptureError: With ``on_failure='raise'``, in a step that cannot be recorded.

    Example:
        >>> CUDAGraph(parity_steps=2).state_key
        'CUDAGraph'
    """

    def __init__(
        self,
        scope: Literal["step", "optimizer"] = "step",
        warmup: int = 3,
        max_graphs: int = 4,
        on_failure: Literal["eager", "raise"] = "eager",
        parity_steps: int = 0,
        timing: bool = False,
        find_syncs: bool = True,
        every_n_steps: int | None = None,
    ) -> None:
        name = "CUDAGraph"
        _check.choice(name, "scope", scope, ("step", "optimizer"))
        _check.choice(name, "on_failure", on_failure, ("eager", "raise"))
        _check.integer(name, "warmup", warmup, low=1)
        _check.integer(name, "max_graphs", max_graphs, low=1)
        _check.integer(name, "parity_steps", parity_steps, low=0)
        if every_n_steps is not None:
            _check.integer(name, "every_n_steps", every_n_steps, low=1)
        for flag, value in (("timing", timing), ("find_syncs", find_syncs)):
            if not isinstance(value, bool):
                raise _check.fail(name, flag, "True or False", value)
        if scope == "optimizer" and parity_steps:
            raise _check.fail(name, "parity_steps", "0 with scope='optimizer'", parity_steps, "it compares whole steps")
        self.scope, self.timing, self.every_n_steps = scope, timing, every_n_steps
        self._options = Options(warmup, max_graphs, on_failure, parity_steps, find_syncs)
        self._events = Events()
        self._steps: StepGraphs | None = None
        self._tiles: list[tuple[LRTT, TileGraphs]] = []
        self._recorder: Recorder | None = None
        self._timer: PhaseTimer | None = None
        self._trainer: pl.Trainer | None = None

    # -------------------------------------------------------------- state

    @property
    @override
    def state_key(self) -> str:
        return "CUDAGraph"

    @override
    def state_dict(self) -> dict[str, Any]:
        events = self._events
        return {"captures": events.captures, "replays": events.replays, "eager_steps": events.eager_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._events = Events(**state_dict)

    @property
    def captures(self) -> int:
        """Graphs captured so far."""
        return self._events.captures

    @property
    def replays(self) -> int:
        """Steps (of the tiles' updates, in scope ``optimizer``) replayed so far."""
        return self._events.replays

    @property
    def eager_steps(self) -> int:
        """Steps that ran eagerly so far."""
        return self._events.eager_steps

    @property
    def reasons(self) -> list[str]:
        """Everything that kept something from being recorded."""
        return list(self._events.reasons)

    @property
    def parity_max_abs(self) -> float | None:
        """Largest difference between replay and eager step so far; None if none was compared."""
        return self._events.parity_max_abs

    @property
    def active_scope(self) -> str:
        """What is recorded now: ``step``, ``optimizer`` or ``none``."""
        if self._recorder is None:
            return "none"
        return "step" if self._steps is not None else "optimizer" if self._tiles else "none"

    # -------------------------------------------------------------- begin and end

    def make_recorder(self, device: torch.device) -> Recorder | None:
        """What records on ``device``; None where there are no graphs."""
        return CudaRecorder(device) if device.type == "cuda" else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.strategy, (ExecutorSeams, TileStrategy)):
            raise MisconfigurationException(
                f"CUDAGraph: the strategy must run whole steps on one device, got {type(trainer.strategy).__name__}; use "
                "Trainer(strategy='lrtt', devices=1) (LRTTStrategy(include=[]) leaves every layer digital), or leave the "
                "callback out: the workers of lrtt_ddp and ddp meet within a step, which a graph cannot hold"
            )
        if stage == "fit":
            self._events = Events()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: a checkpoint's optimizer state is restored between on_fit_start and this.
        self._close()
        pretrained = getattr(trainer.strategy, "pretrained", None)
        if pretrained is not None:
            pretrained.finish()  # a layer's first call, or the prefetching thread, would read a file within a recording
        self._trainer, self._events.on_reason = trainer, self._say
        device = trainer.strategy.root_device
        self._recorder = self.make_recorder(device)
        if self._recorder is None:
            self._events.because(f"device {device} has no CUDA graphs; every step is eager")
            if self._options.on_failure == "raise":
                raise MisconfigurationException(
                    f"CUDAGraph: the device must be a CUDA device, got {device}; use "
                    "accelerator='gpu' or on_failure='eager'"
                )
        elif self.timing:
            self._timer = PhaseTimer(self._recorder.mark)
        if self.scope == "optimizer":
            self._fall(["scope='optimizer' was asked for"], asked=True)
            return
        reasons = step_reasons(trainer, pl_module, device)
        if reasons:
            self._fall(reasons)
            return
        optimizer = trainer.optimizers[0]
        form = DeviceForm(optimizer.digital if isinstance(optimizer, LRTT) else optimizer, device)
        self._steps = StepGraphs(
            trainer,
            pl_module,
            self._recorder,
            form if self._recorder is not None else None,
            self._options,
            self._events,
            self._timer,
            self._fall,
        )
        trainer.strategy.executor = self._steps  # type: ignore[attr-defined]  # checked at setup: a strategy with ExecutorSeams

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trainer is not None:
            self._write(trainer)
        self._close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._trainer is not None and getattr(self._trainer.strategy, "executor", None) is self._steps:
            self._trainer.strategy.executor = None  # type: ignore[attr-defined]  # checked at setup
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        while self._tiles:
            optimizer, graphs = self._tiles.pop()
            optimizer.runner = None
            graphs.clear()
        self._recorder = self._timer = self._trainer = None

    def _fall(self, reasons: list[str], asked: bool = False) -> None:
        """Leave the scope ``step``: record the tiles' updates only, if there are any."""
        trainer = self._trainer
        assert trainer is not None
        if not asked:
            for reason in reasons:
                self._events.because(f"whole steps are not recorded: {reason}")
            if self._options.on_failure == "raise":
                raise MisconfigurationException(
                    f"CUDAGraph: whole steps cannot be recorded: {'; '.join(reasons)}; use "
                    "scope='optimizer' or on_failure='eager'"
                )
        if self._steps is not None:
            trainer.strategy.executor = None  # type: ignore[attr-defined]  # checked at setup: a strategy with ExecutorSeams
            self._steps.close()
            self._steps = None
        if self._recorder is None:
            return
        if not isinstance(trainer.strategy, ExecutorSeams):
            self._nothing(f"{type(trainer.strategy).__name__} reduces over workers inside a step; every step is eager")
            return
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LRTT) and optimizer.tiles():
                self._record_tiles(optimizer, self._recorder)
        if not self._tiles:
            self._nothing("there are no tiles whose update could be recorded; every step is eager")
            return
        log.info("CUDAGraph: the update of the tiles is recorded (scope 'optimizer')")
        if self._options.parity_steps:
            self._events.because("parity_steps compares whole steps, and none is recorded; nothing is compared")

    def _nothing(self, reason: str) -> None:
        self._events.because(reason)
        if self._options.on_failure == "raise":
            raise MisconfigurationException(f"CUDAGraph: {reason}; leave the callback out, or use on_failure='eager'")

    def _record_tiles(self, optimizer: LRTT, recorder: Recorder) -> None:
        def report(event: str, reason: str) -> None:
            events = self._events
            if event == "refused":
                events.because(reason)
            if event == "capture":
                events.capture_ms = graphs.capture_ms
            events.captures += event == "capture"
            events.replays += event == "replay"
            events.eager_steps += event in ("eager", "refused")

        def timed(tiles: list[TileModule], issue: Callable[[], None]) -> None:
            assert self._timer is not None
            self._timer.begin("update")
            try:
                graphs(tiles, issue)
            finally:
                self._timer.end()

        options = self._options
        graphs = TileGraphs(recorder, options.warmup, options.max_graphs, self._watched, report, options.on_failure)
        optimizer.runner = graphs if self._timer is None else timed
        self._tiles.append((optimizer, graphs))

    def _watched(self) -> bool:
        callbacks = [] if self._trainer is None else self._trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        return any(c.wants_eager_step() for c in callbacks if hasattr(c, "wants_eager_step"))

    # -------------------------------------------------------------- reports

    def _say(self, reason: str) -> None:
        log.warning("CUDAGraph: %s", reason)
        trainer = self._trainer
        for logger in [] if trainer is None else trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("graph/reasons", reason, self._now(trainer))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps is None and not self._tiles:  # nobody else counts
            self._events.eager_steps += 1
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if every and not trainer.fit_loop._should_accumulate() and (self._now(trainer) + 1) % every == 0:
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        events = self._events
        values: dict[str, float] = {
            "captures": events.captures,
            "replays": events.replays,
            "eager_steps": events.eager_steps,
        }
        if self._recorder is not None and events.captures:
            if events.captures != events.measured:  # walks the allocator's tables, so once a capture
                events.pool_mib, events.measured = self._recorder.pool_bytes() / 2**20, events.captures
            values |= {"pool_MiB": events.pool_mib, "capture_ms": events.capture_ms}
        if events.parity_max_abs is not None:
            values["parity_max_abs"] = events.parity_max_abs
        if self._timer is not None:
            values |= {f"{phase}_ms": mean for phase, mean in self._timer.means().items()}
        metrics = {f"graph/{name}": float(value) for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._now(trainer))

    @staticmethod
    def _now(trainer: Any) -> int:
        return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
