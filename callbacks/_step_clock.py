"""Speed of training between two logs, by the host's clock."""

from __future__ import annotations

import time
from typing import Any

from lightning_lrtt.callbacks._log_row import after
from torch import Tensor


class StepClock:
    """Mean step time and samples a second, without the time of validation.

    The host runs ahead of a GPU by a bounded number of launches, so the mean of many steps is the device's pace.
    """

    def __init__(self) -> None:
        self._start = self._paused = 0.0
        self._step = self._samples = 0
        self._workers = 1

    def begin(self, trainer: Any) -> None:
        """Start at the first step of a run."""
        started = trainer.fit_loop.epoch_loop._batches_that_stepped > 0
        self._start, self._samples = time.perf_counter(), 0
        self._step, self._workers = after(trainer) if started else -1, trainer.world_size

    def count(self, batch: Any) -> None:
        """Take note of a batch."""
        self._samples += batch_size(batch)

    def pause(self) -> None:
        """Stop for what is no training."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._start += time.perf_counter() - self._paused

    def read(self, step: int) -> dict[str, float]:
        """Means since the last call; no rate for batches without tensors."""
        now = time.perf_counter()
        seconds, steps = now - self._start, step - self._step
        found = {"perf/step_ms": 1e3 * seconds / max(steps, 1)}
        if self._samples:
            found["perf/samples_per_s"] = self._samples * self._workers / seconds
        self._start, self._step, self._samples = now, step, 0
        return found


def batch_size(batch: Any) -> int:
    """Length of the first tensor in a batch of tuples, lists and dicts; 0 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 0
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((size for size in map(batch_size, batch) if size), 0)
    return 0
