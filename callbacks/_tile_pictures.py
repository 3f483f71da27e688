"""Histograms and images of tiles, made small on the device before they travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_lrtt.callbacks._cell_bounds import CellBounds
from torch import Tensor
from torch.nn import functional as F

from lightning_lrtt.nn import TileModule
from lightning_lrtt.ops import A, B, C

BINS = 64
SIDE = 128  # most pixels of a side
_MOST_BINNED = 2**20  # larger arrays: every n-th cell


@dataclass(frozen=True)
class Picture:
    """What one piece of a row becomes: a histogram (``shape`` None), or an image ``[height, width]``."""

    tag: str
    size: int
    shape: tuple[int, int] | None = None
    signed: bool = True


@torch.no_grad()
def histogram(values: Tensor) -> Tensor:
    """``[4 + BINS]`` float64: smallest, largest, sum, sum of squares, counts of equal bins between the extremes.

    Nothing is read back, unlike in `torch.histc`.
    """
    flat = values.detach().reshape(-1)
    flat = flat[:: -(-flat.numel() // _MOST_BINNED)].nan_to_num().double()
    low, high = torch.aminmax(flat)
    width = torch.where(high > low, high - low, 1.0)
    index = ((flat - low) / width * BINS).long().clamp_(0, BINS - 1)
    counts = flat.new_zeros(BINS).index_add_(0, index, torch.ones_like(flat))
    return torch.cat([torch.stack([low, high, flat.sum(), flat.square().sum()]), counts])


@torch.no_grad()
def shrink(matrix: Tensor) -> Tensor:
    """Means of blocks, so that no side is above `SIDE`."""
    rows, columns = (-(-side // SIDE) for side in matrix.shape)
    if rows == columns == 1:
        return matrix.float()
    return F.avg_pool2d(matrix.float()[None, None], (rows, columns), ceil_mode=True)[0, 0]


@torch.no_grad()
def product(tile: TileModule) -> Tensor:
    """A B, shrunk: the mean of a block of a product is the product of the factors' means."""
    a, b = (factor.float() for factor in tile.factors())
    d, k = tile.tile_shape
    rows, columns = -(-d // SIDE), -(-k // SIDE)
    if rows > 1:
        a = F.avg_pool1d(a.t()[None], rows, ceil_mode=True)[0].t()
    if columns > 1:
        b = F.avg_pool1d(b[None], columns, ceil_mode=True)[0]
    return a @ b


def histograms(tiles: Mapping[str, TileModule]) -> tuple[list[Picture], list[Tensor]]:
    """A, B and C of every tile."""
    pictures, pieces = [], []
    for name, tile in tiles.items():
        for array, values in zip("ABC", (*tile.factors(), tile.matrix), strict=True):
            pictures.append(Picture(f"histogram/{name}/{array}", 4 + BINS))
            pieces.append(histogram(values))
    return pictures, pieces


def images(tiles: Mapping[str, TileModule], bounds: CellBounds) -> tuple[list[Picture], list[Tensor]]:
    """C, A B and, on devices, the cells at a bound of every tile."""
    pictures, pieces = [], []
    for name, tile in tiles.items():
        found = {"C": shrink(tile.matrix), "AB": product(tile)}
        for array, letter in ((A, "A"), (B, "B"), (C, "C")):
            mask = bounds.mask(tile, array)
            if mask is not None:
                found[f"at_bounds_{letter}"] = shrink(mask)
        for what, matrix in found.items():
            height, width = matrix.shape
            tag, signed = f"image/{name}/{what}", not what.startswith("at_bounds")
            pictures.append(Picture(tag, matrix.numel(), (height, width), signed))
            pieces.append(matrix.reshape(-1).double())
    return pictures, pieces


def write(writer: Any, pictures: list[Picture], values: list[float], step: int) -> None:
    """Give a row that has arrived to a SummaryWriter."""
    row, first = np.asarray(values), 0
    for picture in pictures:
        piece = row[first : first + picture.size]
        first += picture.size
        if picture.shape is None:
            _add_histogram(writer, picture.tag, piece, step)
        else:
            image = colours(piece.reshape(picture.shape), picture.signed)
            writer.add_image(picture.tag, image, step, dataformats="HWC")


def _add_histogram(writer: Any, tag: str, piece: np.ndarray, step: int) -> None:
    low, high, total, squares = piece[:4].tolist()
    width = (high - low if high > low else 1.0) / BINS
    writer.add_histogram_raw(
        tag,
        min=low,
        max=high,
        num=int(piece[4:].sum()),
        sum=total,
        sum_squares=squares,
        bucket_limits=[low + width * (i + 1) for i in range(BINS)],
        bucket_counts=piece[4:].tolist(),
        global_step=step,
    )


def colours(values: np.ndarray, signed: bool) -> np.ndarray:
    """An image ``[H, W, 3]`` uint8: blue below 0, white at 0, red above, full at the largest magnitude; or, for shares,
    white at 0 to dark at 1. Small matrices get larger pixels.
    """
    values = np.nan_to_num(values.astype(np.float64))
    if signed:
        largest = np.abs(values).max()
        v = values / largest if largest > 0 else values
        red, blue = np.clip(1 + v, 0, 1), np.clip(1 - v, 0, 1)
        image = np.stack([red, np.minimum(red, blue), blue], axis=-1)
    else:
        image = np.repeat(1.0 - 0.9 * np.clip(values, 0, 1)[..., None], 3, axis=-1)
    zoom = max(1, SIDE // max(values.shape))
    return np.asarray(np.kron((image * 255).round(), np.ones((zoom, zoom, 1))), dtype=np.uint8)
