"""When histograms and images of the tiles are taken, and what goes into them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning_lrtt.callbacks import _tile_pictures as pictures
from lightning_lrtt.callbacks._cell_bounds import CellBounds
from lightning_lrtt.callbacks._metric_ring import MetricRing
from lightning_lrtt.callbacks._pulse_counts import factor_pulses, transfer_pulses
from torch import Tensor

from lightning_lrtt import LRTT
from lightning_lrtt.nn import TileModule


class Snapshots:
    """Histograms and images of the last step of every n-th epoch, and of the last step of a run.

    Args:
        histograms: Epochs between histograms; 0: never.
        images: Epochs between images; 0: never.
    """

    def __init__(self, histograms: int, images: int) -> None:
        self.bounds = CellBounds()
        self._every = {"histograms": histograms, "images": images}
        self._kinds: set[str] = set()  # of the step in progress
        self._last: dict[str, int] = {}  # step of the last ones
        self._seen: set[str] = set()
        self._pictures: list[pictures.Picture] = []
        self._pieces: list[Tensor] = []

    @property
    def armed(self) -> bool:
        """Whether the step in progress is taken."""
        return bool(self._kinds)

    def begin(self) -> None:
        """A run begins: nothing was taken, and a checkpoint may have brought other cells."""
        self._last.clear()
        self.bounds = CellBounds()

    def arm(self, epoch: int, last: bool) -> None:
        """The last step of ``epoch`` (from 0) begins, ``last``: of the run."""
        self._kinds = {kind for kind, every in self._every.items() if every and (last or (epoch + 1) % every == 0)}

    def disarm(self) -> None:
        """Forget the step in progress."""
        self._kinds, self._seen, self._pictures, self._pieces = set(), set(), [], []

    def observe(self, event: str, optimizer: LRTT, tiles: Mapping[str, TileModule]) -> None:
        """An event of the optimizer: pulses before the update, everything else between update and transfer."""
        if event == "before_update" and "histograms" in self._kinds:
            groups = {id(tile): group for tile, group in optimizer.tiles()}
            for name, tile in tiles.items():
                self._count(name, factor_pulses(optimizer, tile, groups[id(tile)]))
        elif event == "before_transfer":
            self._take(tiles)

    def complete(self, tiles: Mapping[str, TileModule]) -> None:
        """Take the tiles that were not updated in this step."""
        self._take({name: tile for name, tile in tiles.items() if name not in self._seen})

    def finish(self, step: int, tiles: Mapping[str, TileModule]) -> bool:
        """At the end of training that nobody foresaw: take what step ``step`` was not taken of; whether there is any."""
        self._kinds = {kind for kind, every in self._every.items() if every and self._last.get(kind) != step}
        self._take(tiles)
        return self.armed

    def send(self, ring: MetricRing, step: int) -> None:
        """Put what was taken on its way."""
        self._last |= dict.fromkeys(self._kinds, step)
        ring.push(torch.cat(self._pieces), ("pictures", step, self._pictures, {}))
        self.disarm()

    def _take(self, tiles: Mapping[str, TileModule]) -> None:
        self._seen |= set(tiles)
        if "images" in self._kinds:
            self._add(*pictures.images(tiles, self.bounds))
        if "histograms" in self._kinds:
            self._add(*pictures.histograms(tiles))
            for name, tile in tiles.items():
                self._count(name, transfer_pulses(tile))

    def _add(self, found: list[pictures.Picture], pieces: list[Tensor]) -> None:
        self._pictures += found
        self._pieces += pieces

    def _count(self, name: str, pulses: Mapping[str, Tensor]) -> None:
        for array, counts in pulses.items():
            self._pictures.append(pictures.Picture(f"histogram/{name}/pulses_{array}", 4 + pictures.BINS))
            self._pieces.append(pictures.histogram(counts))
