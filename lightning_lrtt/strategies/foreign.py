"""Strategies that are not ours, on modules that bring their own tiles."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lrtt.nn import find_tiles
from lightning_lrtt.strategies.tiles import TileStrategy


def refuse_foreign(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what shards parameters, and several workers with pulsed tiles; `LRTT` itself finds out only later.

    Raises:
        MisconfigurationException: If the module has tiles and the strategy cannot train them.
    """
    tiles, strategy = find_tiles(module).values(), trainer.strategy
    name = type(strategy).__name__
    if tiles and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"strategy: it must leave parameters whole for LR-TT tiles, got {name}; use Trainer(strategy='lrtt')"
        )
    pulsed = any(tile.config.is_pulsed for tile in tiles)
    if pulsed and trainer.world_size > 1 and not isinstance(strategy, TileStrategy):
        raise MisconfigurationException(
            f"strategy: with pulsed tiles it must give every worker the same pulses, got {name}; use "
            "Trainer(strategy='lrtt', devices=1) or digital tiles"
        )
