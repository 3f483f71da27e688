"""RunProfile: where a step's time goes, and where the traces of the profiler are."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lrtt import _check


class RunProfile(Callback):
    """Log times of the loop, and at the end of `fit` the paths of Chrome traces.

    Logged to all loggers: ``profile/step_ms``, the wall-clock time of an optimizer step with everything around it, and
    ``profile/data_ms``, the part in which the loop waited for batches; both are means since the last log. Nothing is
    synchronised: over an interval the wall clock keeps pace with the device, a single step's share may lie in another
    one's. Times in which validation runs do not count.

    With a `PyTorchProfiler` that exports Chrome traces, their paths go to the logger ``lightning_lrtt`` and, as text,
    to ``profile/trace`` in TensorBoard.

    Args:
        every_n_steps: Optimizer steps between logs; None: the Trainer's ``log_every_n_steps``.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.

    Example:
        >>> RunProfile(every_n_steps=10).state_key
        "RunProfile{'every_n_steps': 10}"
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            _check.integer("RunProfile", "every_n_steps", every_n_steps, low=1)
        self.every_n_steps = every_n_steps
        self._clock = time.perf_counter
        self._restart(0.0)

    @cached_property  # Lightning asks for it at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    def _restart(self, now: float) -> None:
        self._last = now  # end of the last batch
        self._spent = self._waited = 0.0
        self._steps = 0

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = self._clock()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = self._clock()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += self._clock() - self._last

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._clock()
        self._spent += now - self._last
        self._last = now
        if trainer.fit_loop._should_accumulate():
            return
        self._steps += 1
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        done = trainer.fit_loop.epoch_loop._batches_that_stepped
        if every and (done + 1) % every == 0:
            # `_spent` counts from the end of one batch to the end of the next, so the waiting is in it.
            metrics = {
                "profile/step_ms": 1e3 * self._spent / self._steps,
                "profile/data_ms": 1e3 * self._waited / self._steps,
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=done)
            self._restart(self._clock())

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restart(0.0)  # a fit that follows does not count the one that broke off; teardown names its trace

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        profiler = trainer.profiler  # type: ignore[attr-defined]  # set by a connector
        if stage != "fit" or not isinstance(profiler, PyTorchProfiler) or not trainer.is_global_zero:
            return
        folder = profiler.dirpath or trainer.log_dir
        traces = sorted(str(path) for path in Path(folder).glob("*.pt.trace.json")) if folder else []
        viewer = "https://ui.perfetto.dev"
        if traces:
            text = f"Open in {viewer} or chrome://tracing:\n\n" + "\n".join(f"- `{path}`" for path in traces)
            rank_zero_info("RunProfile: open in %s: %s", viewer, ", ".join(traces))
        else:  # shorter than the profiler's schedule: it writes when it is closed, after this
            text = f"The run was short; its trace comes into `{folder}` at its very end. Open it in {viewer}."
            rank_zero_info("RunProfile: the trace comes into %s; open it in %s", folder, viewer)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("profile/trace", text, trainer.fit_loop.epoch_loop._batches_that_stepped)
