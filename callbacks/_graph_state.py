"""What a training step changes: tensors, and traces in Python objects that a capture must not leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_lrtt.callbacks._graph_records import held_by
from torch import Tensor, nn

from lightning_lrtt.graphs import HostState, tensor_slots
from lightning_lrtt.nn import find_tiles

IGNORED = frozenset({"_current_fx_name", "training"})


class StepState:
    """The state of a fit as one step sees it.

    Args:
        trainer: The Trainer, in a fit.
        module: Its module.
        optimizer: Its optimizer.
        watched: The modules that the graph covers, by name: all but metrics, which run outside.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        watched: Mapping[str, nn.Module],
    ) -> None:
        self._trainer, self._module, self._optimizer, self._watched = trainer, module, optimizer, dict(watched)
        self._tiles = list(find_tiles(module).values())
        # Looked up anew at every step, since a buffer may be replaced; not in modules that own nothing.
        self._owned = [d for m in self._watched.values() for d in (m._parameters, m._buffers) if d]
        self._plain = tensor_slots(self._watched)

    def position(self, index: int | None = None) -> int:
        """Place of a batch, the present one by default, in its window of accumulated micro-batches."""
        index = self._trainer.fit_loop.epoch_loop.batch_idx if index is None else index
        return int(index % max(self._trainer.accumulate_grad_batches, 1))

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers, those of metrics aside, which run outside the graph."""
        return [t for owned in self._owned for t in owned.values() if t is not None]

    def of_optimizer(self) -> list[Tensor]:
        """The optimizer's tensors."""
        return [v for state in self._optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]

    def all(self) -> list[Tensor]:
        """Every tensor that the step may change."""
        plain = [value for holder, key in self._plain if isinstance(value := holder.get(key), Tensor)]
        held = [*self.tensors(), *plain, *self.of_optimizer()]
        if self.position():  # later micro-batches add to gradients in place
            held += [p.grad for p in self._module.parameters() if p.grad is not None]
        return held

    def latches(self) -> list[tuple[Any, dict[str, Any]]]:
        """Every tile's latch and what it holds."""
        return [(tile.latch, held_by(tile.latch)) for tile in self._tiles]

    def zero_grad_progress(self) -> Any:
        """Lightning's count of `zero_grad`."""
        return self._trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.zero_grad

    def preserve(self) -> Callable[[], None]:
        """What takes back the traces that a step leaves in Python objects."""
        grads = [(p, p.grad) for p in self._module.parameters()]
        latches, progress = self.latches(), self.zero_grad_progress()
        counted = progress.state_dict()
        state, hook = HostState(self._watched, IGNORED), self._module._current_fx_name

        def undo() -> None:
            for p, grad in grads:
                p.grad = grad
            for latch, held in latches:
                latch.__dict__.update(held, calls=list(held["calls"]))
            progress.load_state_dict(counted)
            state.restore()
            self._module._current_fx_name = hook

        return undo
