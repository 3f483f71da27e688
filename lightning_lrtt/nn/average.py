"""Averages of models with tiles: of effective weights, because averages of factors are not averages of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_lrtt.nn.tile import TileModule, find_tiles
from lightning_lrtt.ops import A, B


@contextmanager
def effective_weights(averaged: nn.Module, model: nn.Module) -> Iterator[None]:
    """Within it, tiles of both models show ``weight`` and ``bias`` only, that of ``model`` being ``C + alpha A B``.

    So whatever averages parameters averages effective weights into the C of ``averaged``. Afterwards each averaged tile
    holds A = 0 and otherwise the state of its original: a model that can be evaluated, saved and trained on. The
    original is left as it was, to the bit.

    The average of effective weights may exceed the bounds of a device by what A B adds; nothing is clipped until the
    averaged model is trained.

    Args:
        averaged: The copy that holds the averages.
        model: The model in training, with the same tiles.

    Raises:
        ValueError: If their tiles differ.
    """
    copies, originals = find_tiles(averaged), find_tiles(model)
    if copies.keys() != originals.keys():
        raise ValueError(
            f"effective_weights: tiles must be the same in both models, got {sorted(copies)} and "
            f"{sorted(originals)}; copy the model after convert_to_lrtt"
        )
    pairs = [(copies[name], originals[name]) for name in originals]
    shown = [(tile, tile._parameters, tile._buffers) for pair in pairs for tile in pair]
    try:
        for copy, original in pairs:
            _rescale(copy, None)
            _show(copy, copy.weight)
            _show(original, nn.Parameter(original.effective_weight(), requires_grad=False))
        yield
    finally:
        for tile, parameters, buffers in shown:
            tile._parameters, tile._buffers = parameters, buffers
        with torch.no_grad():
            for copy, original in pairs:
                copy.A.zero_()
                copy.B.copy_(original.B)
                for held, source in zip(copy.cells(A, B), original.cells(A, B), strict=True):
                    held.copy_(source)
                _hold(copy.A, copy.A_cells)
                _hold(copy.matrix, copy.C_cells)
                copy.tile_state.copy_(original.tile_state)
                copy.tile_counts.copy_(original.tile_counts)
                if copy.tile_reads is not None and original.tile_reads is not None:
                    copy.tile_reads.copy_(original.tile_reads)
                _rescale(copy, original.output_scale)


def average_effective_weights(averaged: AveragedModel) -> AveragedModel:
    """Make ``averaged.update_parameters`` average effective weights; for loops of your own.

    The strategies do it for Lightning's WeightAveraging and StochasticWeightAveraging.

    Args:
        averaged: The averaged model of `torch.optim.swa_utils`; changed in place. Twice is once.

    Returns:
        ``averaged``.

    Example:
        >>> from lightning_lrtt import LRTTConfig
        >>> from lightning_lrtt.nn import LRTTLinear
        >>> layer = LRTTLinear(4, 4, config=LRTTConfig(rank=1))
        >>> averaged = average_effective_weights(AveragedModel(layer))
        >>> averaged.update_parameters(layer)
        >>> bool(averaged.module.A.any())
        False
    """
    if "update_parameters" not in averaged.__dict__:
        update = MethodType(_update_parameters, averaged)
        averaged.update_parameters = update  # type: ignore[method-assign]  # of this instance only
    return averaged


def _update_parameters(averaged: AveragedModel, model: nn.Module) -> None:
    with effective_weights(averaged.module, model):
        type(averaged).update_parameters(averaged, model)


def _hold(w: Tensor, cells: Tensor | None) -> None:
    """Let the cells hold what is read, exactly: an average was never written to a device."""
    if cells is not None:
        cells.copy_(w if len(cells) == 1 else torch.stack([w.clamp(min=0), (-w).clamp(min=0)]))


def _rescale(tile: TileModule, scale: Tensor | None) -> None:
    """Change the output scale of a tile with A = 0 and leave its effective weight; exact for powers of two."""
    with torch.no_grad():
        if tile.output_scale is not None:
            tile.weight.mul_(tile.output_scale)
        tile.output_scale = None if scale is None else scale.clone()
        if scale is not None:
            tile.weight.div_(scale)


def _show(tile: TileModule, weight: nn.Parameter) -> None:
    tile._parameters = {"weight": weight, "bias": tile._parameters["bias"]}
    tile._buffers = {}
