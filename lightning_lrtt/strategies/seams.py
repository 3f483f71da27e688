"""Where an executor, a callback's way to record steps, gets hold of a strategy's batches and optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import Strategy
from typing_extensions import override


class StepExecutor(Protocol):
    """Runs the training steps of a strategy in its own way."""

    def place(self, batch: Any, transfer: Callable[[Any], Any]) -> Any:
        """A training batch on the device; ``transfer`` is the strategy's own way."""

    def step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], run: Callable[[], Any], update: bool
    ) -> Any:
        """One micro-batch, ``update`` if the optimizer steps at its end; ``run`` is the strategy's own way."""


class ExecutorSeams(Strategy):
    """A strategy whose training steps an executor may run; without one it is as it was.

    With an executor installed Lightning hands over micro-batches of an accumulation window too, as it does to
    strategies that accumulate by themselves, except for the last batch of an epoch, which steps by Lightning's rule.
    """

    executor: StepExecutor | None = None

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        if self.executor is None or self.lightning_module is None:
            return False
        return not self.lightning_module.trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        transfer = partial(super().batch_to_device, device=device, dataloader_idx=dataloader_idx)
        training = self.lightning_module is not None and self.lightning_module.trainer.training
        return transfer(batch) if self.executor is None or not training else self.executor.place(batch, transfer)

    @override
    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        step = partial(super().optimizer_step, optimizer, closure, model, **kwargs)
        if self.executor is None:
            return step()
        update = not self.accumulating

        def accumulate() -> Any:
            with _block_parallel_sync_behavior(self, block=True):
                return closure()

        return self.executor.step(optimizer, closure, step if update else accumulate, update)

    @property
    def accumulating(self) -> bool:
        """Whether the micro-batch in progress leaves the optimizer's step to a later one."""
        module = self.lightning_module
        return module is not None and module.automatic_optimization and module.trainer.fit_loop._should_accumulate()
