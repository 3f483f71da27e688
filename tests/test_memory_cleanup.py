"""MemoryCleanup: when emptying the cache helps, and when it is done."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from graph_helpers import Rows
from lightning_helpers import Net, loader
from lightning_lrtt.callbacks import MemoryCleanup
from lightning_lrtt.callbacks.memory_cleanup import MemoryUse

GIB = 2**30


class Pretends(MemoryCleanup):
    """A device of 100 GiB, 95 of them reserved, of which tensors hold what ``use`` says."""

    def __init__(self, allocated: int = 40, capture: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.allocated, self.capture, self.reserved, self.released = allocated, capture, 95, 0

    def measure(self, device: torch.device) -> MemoryUse:
        return MemoryUse(self.allocated * GIB, self.reserved * GIB, (100 - self.reserved) * GIB)

    def capturing(self, device: torch.device) -> bool:
        return self.capture

    def release(self, device: torch.device) -> None:
        self.released += 1
        self.reserved = self.allocated

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        self.reserved = 95  # it grows back


def fit(callback: MemoryCleanup, **kwargs: Any) -> Rows:
    """Twenty steps."""
    logger = Rows()
    pl.Trainer(
        callbacks=[callback],
        logger=logger,
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1000,
        **kwargs,
    ).fit(Net(), loader())
    return logger


@pytest.mark.parametrize(
    ("allocated", "reserved", "free", "helps"),
    [
        (40, 95, 5, True),  # full, and mostly unused
        (90, 95, 5, False),  # full of tensors: nothing to gain
        (10, 50, 50, False),  # low ratio, but there is room
        (10, 50, 2, True),  # others hold the rest: 52 are within reach
        (0, 0, 0, False),
    ],
)
def test_when_it_helps(allocated, reserved, free, helps):
    assert MemoryCleanup().helps(MemoryUse(allocated * GIB, reserved * GIB, free * GIB)) is helps


@pytest.mark.parametrize(
    ("kwargs", "times"), [({}, 4), ({"accumulate_grad_batches": 2}, 2)], ids=["plain", "accumulated"]
)
def test_at_most_every_n_steps(kwargs, times):
    """Optimizer steps are counted; what was freed is logged at the step."""
    callback = Pretends(every_n_steps=5)
    rows = [row for row in fit(callback, **kwargs).rows if "memory/freed_MiB" in row]
    assert callback.released == len(rows) == times and callback.cleanups == times
    assert [row["memory/freed_MiB"] for row in rows] == [55 * 1024.0] * times
    assert [row["memory/cleanups"] for row in rows] == [i + 1.0 for i in range(times)]


@pytest.mark.parametrize(
    "callback",
    [Pretends(every_n_steps=1, capture=True), Pretends(every_n_steps=1, allocated=94), MemoryCleanup(every_n_steps=1)],
    ids=["capturing", "in-use", "cpu"],
)
def test_never_without_need(callback):
    fit(callback)
    assert callback.cleanups == 0 and getattr(callback, "released", 0) == 0


def test_a_cleanup_that_frees_little_waits_longer_for_the_next():
    """Regression: beside the pool of graphs, which emptying leaves alone, it was emptied in vain for ever."""

    class Stuck(Pretends):
        vain = 3

        def release(self, device: torch.device) -> None:
            self.released += 1
            if self.released > self.vain:
                self.reserved = self.allocated

    steps = [row["step"] for row in fit(Stuck(every_n_steps=1)).rows if "memory/freed_MiB" in row]
    # 1, 2, 4 and 8 steps apart; the fourth frees, and from there on it is every step.
    assert steps == [0, 2, 6, *range(14, 20)]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"threshold": 0.0}, "threshold must be"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"min_unused": 1.0}, "min_unused must be < 1"),
        ({"every_n_steps": 0}, "every_n_steps must be >= 1"),
    ],
)
def test_arguments(numbers, message):
    with pytest.raises(ValueError, match=message):
        MemoryCleanup(**numbers)
