"""One line per finished cycle of a tile."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from lightning_lrtt.callbacks import _tile_statistics as statistics
from torch import Tensor

from lightning_lrtt.nn import TileModule
from lightning_lrtt.ops import COUNTER, CYCLE

log = logging.getLogger("lightning_lrtt")


class Trace:
    """Follows cycles by the optimizer's events. Reads from the device at every step.

    Args:
        write: Gets a tile's name and its line.
    """

    def __init__(self, write: Callable[[str, str], None]) -> None:
        self.updates: dict[str, int] = {}  # of the cycle in progress
        self._before: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self._write = write

    def observe(self, event: str, tiles: dict[str, TileModule]) -> None:
        """Take note of one event of the optimizer's step."""
        if event == "before_update":
            return
        states = torch.stack([tile.tile_state for tile in tiles.values()]).tolist()
        for (name, tile), state in zip(tiles.items(), states, strict=True):
            if event == "before_transfer":
                steps = tile.config.transfer_unit == "steps"  # the counter itself, right after a resume too
                self.updates[name] = 1 + (state[COUNTER] if steps else self.updates.get(name, 0))
                self._before[name] = state[CYCLE], statistics.norms(tile)
                continue
            cycle, before = self._before.pop(name)
            if state[CYCLE] != cycle:
                numbers = ", ".join(
                    f"|{array}| {float(before[array]):.4g} -> {float(after):.4g}"
                    for array, after in statistics.norms(tile).items()
                )
                order = f"reinit -> {self.updates.pop(name)} updates -> transfer"
                self._write(name, f"{name} cycle {cycle}: {order}; {numbers}")

    def forget(self) -> None:
        """Leave a step that was broken off."""
        self._before.clear()


def show(logger: logging.Logger) -> Callable[[], None]:
    """Make INFO visible on a logger that nobody has configured; returns what undoes it."""
    level, handler = logger.level, logging.StreamHandler()
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    missing = not logger.hasHandlers()
    if missing:
        logger.addHandler(handler)

    def undo() -> None:
        logger.setLevel(level)
        if missing:
            logger.removeHandler(handler)

    return undo
