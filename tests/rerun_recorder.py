"""A recorder without a GPU: what is recorded is a function, and a replay calls it again on the static tensors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_lrtt.callbacks import CUDAGraph

from lightning_lrtt.graphs import StateCopy


class Rerun:
    """Calls the function and copies what it returns over the tensors of the first call, as a graph would write them."""

    def __init__(self, function: Callable[[], Any], owner: RerunRecorder) -> None:
        self._function, self._owner = function, owner
        self.outputs = function()

    def replay(self) -> None:
        static = self.outputs.tensors()
        undo = self._owner.before_replay()
        fresh = self._function().tensors()
        undo()
        assert len(fresh) == len(static)
        for old, new in zip(static, fresh, strict=True):
            if old is not new:
                old.data.copy_(new)
        self._owner.replays += 1


class Moment:
    """Host time."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def ready(self) -> bool:
        return True

    def milliseconds_since(self, earlier: Moment) -> float:
        return 1e3 * (self.at - earlier.at)


class RerunRecorder:
    """See the module. ``fail`` is raised by captures in place of running them, as a device would refuse one."""

    def __init__(self, fail: BaseException | None = None) -> None:
        self.fail, self.records, self.replays = fail, 0, 0
        self.before_replay: Callable[[], Callable[[], None]] = lambda: lambda: None
        self.before_record = self.before_replay

    def eager(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> Rerun:
        self.records += 1
        if self.fail is not None:
            raise self.fail
        undo = self.before_record()
        try:
            return Rerun(function, self)
        except BaseException:
            undo()
            raise

    def mark(self) -> Moment:
        return Moment()

    def pool_bytes(self) -> int:
        return 2**20


class RehearsedGraph(CUDAGraph):
    """`CUDAGraph` on the CPU, through a `RerunRecorder`."""

    def __init__(self, *args: Any, fail: BaseException | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = RerunRecorder(fail)

    def make_recorder(self, device: torch.device) -> RerunRecorder:
        return self.recorder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A replay runs no Python of Lightning's: take back what calling it again counts.
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.zero_grad

        def before_replay() -> Callable[[], None]:
            counted = progress.state_dict()
            return lambda: progress.load_state_dict(counted)

        def before_record() -> Callable[[], None]:  # a capture that fails has done no device work
            return StateCopy([*pl_module.parameters(), *pl_module.buffers()], torch.device("cpu")).restore

        self.recorder.before_replay, self.recorder.before_record = before_replay, before_record
        super().on_train_start(trainer, pl_module)
