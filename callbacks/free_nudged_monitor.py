"""FreeNudgedMonitor: what the two phases do, in TensorBoard."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_lrtt.callbacks._layouts import Layout, write_layouts
from typing_extensions import override

from lightning_lrtt import _check
from lightning_lrtt.free_nudged import FreeNudgedModule, agreement, bptt, estimate

_LAYOUT: Layout = {
    "free/nudged": {
        "cost": ["Multiline", ["free_nudged/cost_free", "free_nudged/cost_nudged"]],
        "residual": ["Multiline", ["free_nudged/residual_free", "free_nudged/residual_nudged"]],
        "phases": ["Multiline", ["free_nudged/phase_distance", "free_nudged/saturation", "free_nudged/beta"]],
        "against BPTT": ["Multiline", ["free_nudged/cosine_bptt", "free_nudged/error_bptt"]],
    }
}


class FreeNudgedMonitor(Callback):
    """Log observables of the phases to all loggers, at the steps and with the step numbers that Lightning uses.

    Means since the last log, recorded on the device at every step and read in one transfer at a log:
    ``free_nudged/cost_free|cost_nudged`` (mean cost of a sample), ``free_nudged/residual_free|residual_nudged``
    (largest change of a state in a window's last step: how far from its fixed point it was stopped),
    ``free_nudged/phase_distance`` (largest difference of a state between the phases), ``free_nudged/saturation``
    (share of states at an end of their range) and ``free_nudged/beta``.

    With ``bptt_every_n_steps`` also ``free_nudged/cosine_bptt`` and ``free_nudged/error_bptt``: the step's gradient,
    before the update, against backpropagation through the free window of the same batch. It costs several steps.
    TensorBoard gets a layout for its custom-scalars tab.

    Args:
        every_n_steps: Optimizer steps between logs; None: the Trainer's ``log_every_n_steps``.
        bptt_every_n_steps: Batches between comparisons; None: never.

    Raises:
        ValueError: If a number is below 1.
        MisconfigurationException: At setup, if the module is no `FreeNudgedModule`, or a comparison with
            backpropagation is asked of a system with registered state or of warm starts, whose window depends on more
            than the batch.

    Example:
        >>> FreeNudgedMonitor(bptt_every_n_steps=100).state_key
        "FreeNudgedMonitor{'every_n_steps': None, 'bptt_every_n_steps': 100}"
    """

    def __init__(self, every_n_steps: int | None = None, bptt_every_n_steps: int | None = None) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("bptt_every_n_steps", bptt_every_n_steps)):
            if value is not None:
                _check.integer("FreeNudgedMonitor", name, value, low=1)
        self.every_n_steps, self.bptt_every_n_steps = every_n_steps, bptt_every_n_steps
        self._before: bool | None = None

    @cached_property  # Lightning asks for it at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps, bptt_every_n_steps=self.bptt_every_n_steps)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, FreeNudgedModule):
            raise MisconfigurationException(
                f"FreeNudgedMonitor: the module must be a FreeNudgedModule, got {type(pl_module).__name__}; "
                "remove the callback"
            )
        engine = pl_module.engine
        if self.bptt_every_n_steps is not None and (engine.init == "previous" or pl_module.system.registered()):
            raise MisconfigurationException(
                "FreeNudgedMonitor: bptt_every_n_steps must be None with init='previous' or registered state, got "
                f"{self.bptt_every_n_steps}; the window depends on more than the batch"
            )
        self._before = pl_module.statistics
        pl_module.statistics = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        write_layouts(trainer, self)

    def custom_scalars(self) -> Layout:
        """Charts for the custom-scalars tab."""
        return _LAYOUT

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        every = self.bptt_every_n_steps
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if every is None or step % every or trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, FreeNudgedModule)
        x, target = pl_module.unpack(batch)
        reference = bptt(pl_module.system, x, target, pl_module.engine.free_steps)
        # Beta as this step will use it: the module's own hook comes after the callbacks'.
        pl_module.set_step(trainer.global_step)
        found = agreement(estimate(pl_module.engine, x, target, pl_module.beta), reference)
        cosine, error = torch.stack([found.cosine, found.error]).tolist()
        self._log(trainer, {"cosine_bptt": cosine, "error_bptt": error})

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if not every or (step + 1) % every or trainer.fit_loop._should_accumulate():
            return
        assert isinstance(pl_module, FreeNudgedModule)
        self._log(trainer, pl_module.stats.read())

    @staticmethod
    def _log(trainer: pl.Trainer, values: dict[str, float]) -> None:
        if not values:
            return
        metrics = {f"free_nudged/{name}": value for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo(pl_module)

    def _undo(self, pl_module: pl.LightningModule) -> None:
        if self._before is not None and isinstance(pl_module, FreeNudgedModule):
            pl_module.statistics = self._before
        self._before = None
