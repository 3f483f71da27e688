"""What Lightning's entry point for callbacks gets: nothing, unless it is asked for."""

from __future__ import annotations

import os

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning_lrtt.callbacks.tile_monitor import TileMonitor
from typing_extensions import override

from lightning_lrtt.nn import find_tiles


def default_callbacks() -> list[Callback]:
    """Callbacks for every Trainer of the environment: a `TileMonitor` if ``LRTT_AUTO_CALLBACKS=1``, else none.

    Lightning calls this for Trainers that have nothing to do with tiles too, so the monitor watches only where there
    are tiles and no monitor of the user's own.

    Example:
        >>> default_callbacks() if "LRTT_AUTO_CALLBACKS" not in os.environ else []
        []
    """
    return [_AutoTileMonitor()] if os.environ.get("LRTT_AUTO_CALLBACKS") == "1" else []


class _AutoTileMonitor(TileMonitor):
    """A `TileMonitor` that stands back; a class of its own, so that its state collides with no other monitor's."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        self._stands_back = any(isinstance(other, TileMonitor) and other is not self for other in callbacks)
        super().setup(trainer, pl_module, stage)

    @override
    def _find(self, pl_module: pl.LightningModule) -> None:
        if find_tiles(pl_module) and not self._stands_back:
            super()._find(pl_module)
