"""The ``lrtt`` strategy: one device, an unchanged LightningModule on LR-TT tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.strategies.seams import ExecutorSeams
from lightning_lrtt.strategies.tiles import TileStrategy
from lightning_lrtt.weights import Pretrained


class LRTTStrategy(TileStrategy, ExecutorSeams, SingleDeviceStrategy):
    """Train a LightningModule on LR-TT tiles, on the one device that the Trainer chose.

    Linear, Conv1d and Conv2d layers become tiles (`convert_to_lrtt`), and every optimizer that the module configures is
    wrapped in `LRTT`: tiles by LR-TT at ``lr * tile_lr_scale`` of their group, all other parameters by the configured
    optimizer.

    Args:
        config: The tiles' numbers. None: ``LRTTConfig()``.
        include: Globs of qualified layer names to convert; None: all.
        exclude: Globs of qualified layer names that stay digital.
        tile_lr_scale: Factor on the configured lr for tiles.
        pretrained: A GGUF or safetensors file to start from, or a `Pretrained` with more to say. It is read at setup, on
            the root device; a run that goes on from a checkpoint (``ckpt_path``) does not read it.
        on_nonfinite: ``raise`` at the next logging step or epoch end when an operand of an update was not finite, or
            ``skip``.
        accelerator: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.

    Raises:
        MisconfigurationException: At setup, for several devices, half-precision parameters, value clipping with pulsed
            tiles, or an optimizer that re-evaluates the loss (LBFGS).

    Example:
        >>> import lightning.pytorch as pl, lightning_lrtt
        >>> trainer = pl.Trainer(strategy="lrtt", accelerator="cpu", logger=False, barebones=True)
        >>> type(trainer.strategy).__name__
        'LRTTStrategy'
    """

    strategy_name = "lrtt"

    def __init__(
        self,
        config: LRTTConfig | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        tile_lr_scale: float = 1.0,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        pretrained: str | Pretrained | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__("cpu", accelerator, checkpoint_io, precision_plugin)
        self._init_tiles(config, include, exclude, tile_lr_scale, on_nonfinite, pretrained)
        self._parallel_devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device; its setter is how the Trainer hands over the accelerator's choice."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise MisconfigurationException(
                f"LRTTStrategy: devices must be one device, got {len(devices)}; use Trainer(devices=1)"
            )
        self._parallel_devices = devices
        if devices:
            self._root_device = torch.device(devices[0])

    @override
    def teardown(self) -> None:
        self.executor = None  # a recorded step holds addresses that are about to move
        super().teardown()

    @override
    def _leaves_the_step(self) -> bool:
        return self.accumulating
