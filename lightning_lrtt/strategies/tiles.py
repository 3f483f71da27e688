"""What the strategies of this package share: conversion, wrapping of optimizers, exact resume, averaging, refusals."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.nn import convert_to_lrtt, find_tiles
from lightning_lrtt.nn.convert import PatternError
from lightning_lrtt.optim import LRTT, reduced, takes_closure, tiles_of
from lightning_lrtt.strategies.averaging import average_by_effective_weights, averaged_copies
from lightning_lrtt.strategies.bars import bar_of
from lightning_lrtt.strategies.resume import AtomicCheckpointIO, collect_rng, restore_rng
from lightning_lrtt.weights import Pretrained

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


class TileStrategy(_Base):
    """Mixin before a Lightning strategy: the module's layers become tiles and its optimizers `LRTT`.

    A strategy of this package gives every worker the same pulses. Subclasses call `_init_tiles` in ``__init__``.
    """

    config: LRTTConfig
    if TYPE_CHECKING:

        @property
        def lightning_module(self) -> pl.LightningModule:
            """None before `connect`, which comes before everything that looks."""

    def _init_tiles(
        self,
        config: LRTTConfig | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        tile_lr_scale: float,
        on_nonfinite: Literal["raise", "skip"],
        pretrained: str | os.PathLike[str] | Pretrained | None = None,
    ) -> None:
        self.config = LRTTConfig() if config is None else config
        self.include, self.exclude = include, exclude
        self.tile_lr_scale, self.on_nonfinite = tile_lr_scale, on_nonfinite
        if isinstance(pretrained, str | os.PathLike):
            pretrained = Pretrained(os.fspath(pretrained))
        if not isinstance(pretrained, Pretrained | None):
            raise TypeError(f"{self._me}: pretrained must be a path or a Pretrained, got {type(pretrained).__name__}")
        self.pretrained = pretrained
        self._undo_averaging: Callable[[], None] | None = None

    @property
    def _me(self) -> str:
        return type(self).__name__

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):  # e.g. AsyncCheckpointIO
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # its setter keeps one that the user gave
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        if "optimizer_states" in checkpoint:  # not in save_weights_only, from which nothing resumes
            checkpoint["lrtt"] = {"rng": collect_rng(self.root_device)}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        # Here, because it is the last thing restored before the training loader is asked for its iterator, which draws a
        # seed, and because only `fit` comes by.
        if "rng" in checkpoint.get("lrtt", {}):
            restore_rng(checkpoint["lrtt"]["rng"], self.root_device)

    @override
    def connect(self, model: pl.LightningModule) -> None:
        # Now, because averaging callbacks copy the model before setup. Layers that the hooks setup and configure_model
        # make are converted later, and patterns that name such layers match nothing yet.
        with contextlib.suppress(PatternError):
            self._convert(model)
        super().connect(model)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._convert(self.lightning_module)  # checkpoints load before the strategy's setup
        self._convert_copies()
        if self.pretrained is not None:
            self.pretrained.restored(self.lightning_module, self.root_device)
        super().load_model_state_dict(checkpoint, strict)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._convert(self.lightning_module)
        self._convert_copies()
        self._refuse(trainer)
        self._fill(trainer)  # before optimizers exist and before anything is wrapped
        self._restore_averaging()
        self._undo_averaging = average_by_effective_weights(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        super().setup(trainer)
        if self.pretrained is not None:
            self.pretrained.prefetch()  # not earlier: the setup of workers sends tiles' keys and counters, which a fill uses

    @override
    def teardown(self) -> None:
        if self.pretrained is not None:
            self.pretrained.stop()
        self._restore_averaging()
        module = self.lightning_module
        if module is not None and any(p.is_meta for p in module.parameters()):
            # A setup that failed before they had memory: moving them would raise, in place of the error that says why.
            self._lightning_module = None
        super().teardown()
        self._lightning_module = module

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        with reduced():
            super().setup_optimizers(trainer)
            self.optimizers = [self._wrap(optimizer) for optimizer in self.optimizers]

    @override
    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        trainer = self.lightning_module.trainer
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        # Only here, at the steps at which Lightning logs, and at epoch ends does training wait for the device.
        if (
            every
            and not self._leaves_the_step()
            and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0
        ):
            self.check_finite()
        return result

    def _leaves_the_step(self) -> bool:
        """Whether the call of `optimizer_step` in progress is for a micro-batch only."""
        return False

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self.lightning_module.trainer.fit_loop.epoch_loop._batches_that_stepped > 0:
            self.check_finite()  # of the epoch before

    @override
    def on_train_end(self) -> None:
        self.check_finite()

    def check_finite(self) -> None:
        """Report skipped updates of all optimizers (`LRTT.check_finite`)."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, LRTT):
                optimizer.check_finite()

    def _fill(self, trainer: pl.Trainer) -> None:
        """Read the pretrained weights, or install what will."""
        if self.pretrained is not None:
            self.pretrained.apply(self.lightning_module, self.root_device, bar_of(trainer))

    def _convert(self, model: Any) -> None:
        convert_to_lrtt(model, self.config, self.include, self.exclude)

    def _convert_copies(self) -> None:
        # Made in the callbacks' setup, before the hooks that make layers late.
        for copy in averaged_copies(self.lightning_module.trainer.callbacks):  # type: ignore[attr-defined]  # set by a connector
            self._convert(copy)

    def _restore_averaging(self) -> None:
        if self._undo_averaging is not None:
            self._undo_averaging()
            self._undo_averaging = None

    def _wrap(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if isinstance(optimizer, LRTT):
            for name, default in (("tile_lr_scale", 1.0), ("on_nonfinite", "raise")):
                if getattr(self, name) not in (default, getattr(optimizer, name)):
                    raise MisconfigurationException(
                        f"{self._me}: {name} must be left out with an LRTT optimizer of your own, got "
                        f"{getattr(self, name)!r}; give it to the optimizer"
                    )
            optimizer.adopt_factors()  # LightningCLI builds it before the conversion
            optimizer.reduced = True
            return optimizer
        if takes_closure(optimizer):
            if not tiles_of(optimizer.param_groups):
                return optimizer
            raise MisconfigurationException(
                f"{self._me}: an optimizer of tiles must step without a closure, got {type(optimizer).__name__}, "
                "which evaluates the loss several times a step, where pulses cannot be taken back; use SGD or Adam, or "
                "exclude its layers: strategy.exclude=[...]"
            )
        wrapped = LRTT(digital=optimizer, tile_lr_scale=self.tile_lr_scale, on_nonfinite=self.on_nonfinite)
        tiles = wrapped.tiles()
        if not tiles and not find_tiles(self.lightning_module):
            return optimizer
        wrapped.optimizer = optimizer  # type: ignore[attr-defined]  # by this LearningRateMonitor takes both for one
        if not tiles:  # they may come later: BackboneFinetuning adds what it unfreezes
            return wrapped
        on_tiles = {id(p) for tile, _ in tiles for p in (tile.weight, tile.A, tile.B)}
        others = sum(id(p) not in on_tiles for group in wrapped.param_groups for p in group["params"])
        log.info(
            "lightning_lrtt: %d tiles by LR-TT at lr x %g; %d digital parameters by %s, whose momentum, betas and "
            "weight decay apply to those only",
            len(tiles),
            self.tile_lr_scale,
            others,
            type(optimizer).__name__,
        )
        return wrapped

    def _refuse(self, trainer: pl.Trainer) -> None:
        if isinstance(self.precision_plugin, HalfPrecision):
            raise MisconfigurationException(
                f"{self._me}: precision must keep float32 parameters, got {self.precision_plugin.precision!r}; use "
                "'bf16-mixed' or '16-mixed'"
            )
        configs = [tile.config for tile in find_tiles(self.lightning_module).values()]
        on_devices = any(c.fast_device or c.visible_device for c in configs)
        if on_devices and isinstance(self.precision_plugin, DoublePrecision):
            raise MisconfigurationException(
                f"{self._me}: precision must be '32-true' or mixed for tiles on devices, got '64-true'; devices hold "
                "float32 weights"
            )
        pulsed = any(c.is_pulsed for c in configs)
        if pulsed and trainer.gradient_clip_val and trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            raise MisconfigurationException(
                f"{self._me}: gradient_clip_algorithm must be 'norm' with pulsed tiles, got 'value'; clipping single "
                "elements has no counterpart in a pulse train"
            )
