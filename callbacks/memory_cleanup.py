"""MemoryCleanup: hands cached memory back to the device, only when that helps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_lrtt import _check

log = logging.getLogger("lightning_lrtt")


@dataclass(frozen=True)
class MemoryUse:
    """Device memory in bytes.

    Args:
        allocated: Held by tensors.
        reserved: Held by torch's allocator, tensors included.
        free: Held by nobody.
    """

    allocated: int
    reserved: int
    free: int

    @property
    def limit(self) -> int:
        """What this process could have: others' memory is out of reach."""
        return self.reserved + self.free


class MemoryCleanup(Callback):
    """Empty torch's cache when the device is nearly full and much of what the cache holds is unused.

    Emptying waits for the device and makes the next allocations slow, so a low ratio of allocated to reserved memory is
    no reason by itself: as long as the device has room, the cache is good where it is. It is done between steps, never
    within a CUDA graph's capture, and takes nothing from the graphs' own pool while they live.

    A cleanup that frees less than half of what was unused (graphs keep their pool, tensors the blocks around them) is waited
    for twice as long before the next, and so on; one that frees more ends that.

    Logged to all loggers when it happened: ``memory/freed_MiB`` and ``memory/cleanups`` (so far).

    Args:
        threshold: Share of the memory within reach that must be reserved, in (0, 1].
        min_unused: Share of the reserved memory that must be unused, in (0, 1).
        every_n_steps: Optimizer steps between two cleanups at least, and between looks, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> MemoryCleanup(threshold=0.8).state_key
        "MemoryCleanup{'threshold': 0.8, 'min_unused': 0.25, 'every_n_steps': 50}"
    """

    def __init__(self, threshold: float = 0.9, min_unused: float = 0.25, every_n_steps: int = 50) -> None:
        name = "MemoryCleanup"
        _check.number(name, "threshold", threshold, above=0.0, high=1.0)
        _check.number(name, "min_unused", min_unused, above=0.0)
        if min_unused >= 1.0:
            raise _check.fail(name, "min_unused", "< 1", min_unused, "a cache in use holds at least one tensor")
        _check.integer(name, "every_n_steps", every_n_steps, low=1)
        self.threshold, self.min_unused, self.every_n_steps = threshold, min_unused, every_n_steps
        self.cleanups = 0
        self._looked, self._every = 0, every_n_steps

    @cached_property  # Lightning asks for it at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            threshold=self.threshold, min_unused=self.min_unused, every_n_steps=self.every_n_steps
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._looked = _stepped(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = _stepped(trainer)
        if step + 1 - self._looked < self._every or trainer.fit_loop._should_accumulate():
            return
        self._looked = step + 1
        device = trainer.strategy.root_device
        before = self.measure(device)
        if before is None or not self.helps(before) or self.capturing(device):
            return
        self.release(device)
        after = self.measure(device)
        freed = 0.0 if after is None else (before.reserved - after.reserved) / 2**20
        self.cleanups += 1
        useless = 2**20 * freed < (before.reserved - before.allocated) / 2
        self._every = 2 * self._every if useless else self.every_n_steps
        log.info(
            "MemoryCleanup: step %d, %.0f MiB handed back to %s (%.0f of %.0f MiB reserved were in use)",
            step,
            freed,
            device,
            before.allocated / 2**20,
            before.reserved / 2**20,
        )
        for logger in trainer.loggers:
            logger.log_metrics({"memory/freed_MiB": freed, "memory/cleanups": float(self.cleanups)}, step=step)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._looked, self._every = 0, self.every_n_steps

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._looked, self._every = 0, self.every_n_steps  # of this run

    def helps(self, use: MemoryUse) -> bool:
        """Whether emptying the cache is worth its wait."""
        full = use.reserved > 0 and use.reserved >= self.threshold * use.limit
        return full and use.reserved - use.allocated >= self.min_unused * use.reserved

    # -------------------------------------------------------------- the device

    def measure(self, device: torch.device) -> MemoryUse | None:
        """Memory of a CUDA device, by counters on the host; None on other devices, which have no such cache."""
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), free)

    def capturing(self, device: torch.device) -> bool:
        """Whether a capture is going on."""
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def release(self, device: torch.device) -> None:
        """Empty the cache."""
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def _stepped(trainer: Any) -> int:
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
