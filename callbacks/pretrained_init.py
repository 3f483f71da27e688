"""PretrainedInit: start a run from a GGUF or safetensors checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_lrtt.nn import find_tiles
from lightning_lrtt.strategies.bars import bar_of
from lightning_lrtt.strategies.tiles import TileStrategy
from lightning_lrtt.weights import LoadReport, Pretrained


class PretrainedInit(Callback):
    """Fill the module's parameters from a checkpoint before training, or layer by layer on first use.

    The strategies of this package do it in their setup, on the root device, before optimizers exist; their argument
    ``pretrained`` is the same. Under Lightning's own single-device and DDP strategies it happens at the start of the
    stage, on every process for itself, and several processes read everything before the first training step; there
    the parameters must have memory (not be on meta). A run that goes on from a checkpoint (``ckpt_path``) is left as it
    is. Afterwards `report` says what was loaded.

    Args:
        path: A GGUF or safetensors checkpoint.
        mode: ``progressive``: all of it, with a progress bar in bytes; ``lazy``: each layer before its first call;
            ``prefetch``: lazy, with a thread that walks ahead.
        names: How names lead to tensors: ``auto``, a dict, pairs of regex and replacement, or a callable; see
            `lightning_lrtt.weights.load_pretrained`, also for the next three.
        strict: Raise if anything is missing, unexpected or of another shape.
        transforms: What is done to values; None: what the file's architecture needs.
        output_scale: Scale weights that exceed the bounds of a tile's device.
        verify: ``structure`` of the file, or also ``values``: finite block scales.
        sha256: The file's digest, if it is to be checked.

    Raises:
        ValueError: If ``mode`` or ``verify`` is none of its choices.
        MisconfigurationException: At setup, if the strategy shards parameters, or has a ``pretrained`` of its own.

    Example:
        >>> PretrainedInit("model.gguf", mode="lazy").report is None
        True
    """

    def __init__(
        self,
        path: str,
        mode: Literal["progressive", "lazy", "prefetch"] = "progressive",
        names: str | dict[str, str] | list[list[str]] | Callable[[str], Any] = "auto",
        strict: bool = True,
        transforms: dict[str, str] | None = None,
        output_scale: bool = True,
        verify: Literal["structure", "values"] = "structure",
        sha256: str | None = None,
    ) -> None:
        self.pretrained = Pretrained(path, mode, names, strict, transforms, output_scale, verify, sha256)
        self._by_strategy = False

    @property
    def report(self) -> LoadReport | None:
        """What was loaded so far; None before that, and for a resumed run."""
        return self.pretrained.report

    @cached_property  # Lightning asks for it at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(path=self.pretrained.path)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        self._by_strategy = isinstance(strategy, TileStrategy)
        if isinstance(strategy, TileStrategy):
            if strategy.pretrained not in (None, self.pretrained):
                raise MisconfigurationException(
                    "PretrainedInit: the strategy must have no `pretrained` beside this callback, got both; leave "
                    "one out"
                )
            strategy.pretrained = self.pretrained
        elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"PretrainedInit: the strategy must leave parameters whole, got {type(strategy).__name__}; use lrtt, "
                "lrtt_ddp, a single device or ddp"
            )
        elif any(parameter.is_meta for parameter in pl_module.parameters()):
            raise MisconfigurationException(
                f"PretrainedInit: parameters on the meta device need the strategy lrtt, got {type(strategy).__name__}"
            )
        elif isinstance(strategy, DDPStrategy):  # every process reads C for itself
            ignored = [f"{name}.weight" if name else "weight" for name in find_tiles(pl_module)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, ignored)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._by_strategy:
            self.pretrained.restored(pl_module, trainer.strategy.root_device)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._by_strategy:
            return
        if trainer.ckpt_path is not None:  # Lightning calls on_load_checkpoint only if the file has states of callbacks
            self.pretrained.restored(pl_module, trainer.strategy.root_device)
        else:
            self.pretrained.apply(pl_module, trainer.strategy.root_device, bar_of(trainer))
            self.pretrained.prefetch()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._by_strategy and trainer.world_size > 1:
            self.pretrained.finish()  # DDP sends the buffers of tiles before each forward pass: a fill would change them

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.pretrained.stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.pretrained.stop()
