"""Which cells stand at a bound of their device."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt.devices import Device
from lightning_lrtt.nn import TileModule
from lightning_lrtt.ops import A, B, C
from lightning_lrtt.ops.schema import MINUS

_KEPT = 2**20  # cells of the largest array whose bounds are kept (8 bytes a cell)
MOST_DRAWN = 2**22  # of the largest array whose bounds are drawn at all


class CellBounds:
    """The bounds that every cell was drawn with, which do not change in a run: drawn once and kept.

    Drawing costs a normal a bound. In arrays above a million cells the core counts, drawing again every time, rather than
    that twice the array is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def shares(self, tile: TileModule) -> dict[str, Tensor]:
        """Share of cells at a bound, float64, for the arrays that have a device."""
        found = {}
        for array, name, w in _arrays(tile):
            mask = self.mask(tile, array) if w.numel() <= _KEPT else None
            if mask is not None:
                found[name] = mask.double().mean()
            elif w.numel() > _KEPT and _device(tile, array) is not None:
                count = torch.ops.lrtt.clip_(w, tile.tile_state, tile.hyper, array, False, tile.cells(array))
                found[name] = count.double() / w.numel()
        return found

    @torch.no_grad()
    def mask(self, tile: TileModule, array: int) -> Tensor | None:
        """Which cells stand at a bound, ``[rows, columns]`` bool; None for digital arrays and very large ones."""
        device = _device(tile, array)
        w = (*tile.factors(), tile.matrix)[array]
        if device is None or w.numel() > MOST_DRAWN:
            return None
        pair, cells = device.planes == 2, tile.cells(array)
        first, second = self._bounds(tile, array, pair, w)
        if pair:
            return (cells[0][0] >= first) | (cells[0][1] >= second)
        held = cells[0][0] if cells else w
        return (held >= first) | (held <= second)

    def _bounds(self, tile: TileModule, array: int, pair: bool, w: Tensor) -> tuple[Tensor, Tensor]:
        """Upper and lower bound of each cell; of pairs the upper bounds of both cells."""
        key = (id(tile), array)
        if key in self._kept:
            return self._kept[key]
        drawn = torch.ops.lrtt.draw_cells(tile.tile_state, tile.hyper, array, *w.shape)
        if pair:
            other = torch.ops.lrtt.draw_cells(tile.tile_state, tile.hyper, array + MINUS, *w.shape)
            bounds = (drawn[0].clone(), other[0].clone())
        else:
            bounds = (drawn[0].clone(), drawn[1].clone())
        if w.numel() <= _KEPT:
            self._kept[key] = bounds
        return bounds


def _device(tile: TileModule, array: int) -> Device | None:
    return tile.config.visible_device if array == C else tile.config.fast_device


def _arrays(tile: TileModule) -> list[tuple[int, str, Tensor]]:
    a, b = tile.factors()
    return [(A, "A", a), (B, "B", b), (C, "C", tile.matrix)]
