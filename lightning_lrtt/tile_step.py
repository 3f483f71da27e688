"""One optimizer step of tiles as functions of what they latched: pulses or exact updates, relaxation, transfer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lrtt.nn.tile import TileModule
from lightning_lrtt.ops import A, B, C
from lightning_lrtt.ops.schema import ABSENT, BLOCK_SAMPLES


def has_update(tile: TileModule) -> bool:
    """Whether backward has left something for the tile's next step.

    Raises:
        RuntimeError: If one factor of a pulsed tile is frozen.
    """
    if not tile.config.is_pulsed:
        return tile.A.grad is not None or tile.B.grad is not None
    if tile.A.requires_grad != tile.B.requires_grad:
        raise RuntimeError(
            f"LRTT: A and B of a pulsed tile must both learn, got requires_grad {tile.A.requires_grad} and "
            f"{tile.B.requires_grad}; freeze both, or use a digital tile (fast_device=None), which may learn by one of them"
        )
    return bool(tile.latch.calls) and tile.A.grad is not None and tile.B.grad is not None


def update(members: list[tuple[TileModule, Tensor]], device: torch.device) -> None:
    """Move A and B of tiles that have an update, and let cells decay and diffuse.

    Args:
        members: Tiles on ``device`` with their learning rates, float64 ``[]`` there.
        device: Where the work runs.
    """
    pulsed = [(tile, lr) for tile, lr in members if tile.config.is_pulsed]
    if pulsed:
        _pulse(pulsed, device)
    exact = [(tile, lr) for tile, lr in members if not tile.config.is_pulsed]
    if exact:
        pairs = [(tile, lr, p) for tile, lr in exact for p in (tile.A, tile.B) if p.grad is not None]
        torch.ops.lrtt.digital_update_(
            [p.detach() for _, _, p in pairs],
            [p.grad for _, _, p in pairs],
            [lr for _, lr, _ in pairs],
            [tile.tile_state for tile, _, _ in pairs],
            [tile.tile_counts for tile, _, _ in pairs],
            [tile.config.factor_scale for tile, _, _ in pairs],
        )
    _bound([tile for tile, _ in exact])
    _relax([tile for tile, _ in members])


def transfer(modules: list[TileModule]) -> None:
    """Count the step, and where it is due ``C += tau A B`` and fresh factors."""
    torch.ops.lrtt.transfer_(
        [tile.A.detach() for tile in modules],
        [tile.B.detach() for tile in modules],
        [tile.matrix for tile in modules],
        [tile.tile_state for tile in modules],
        [tile.tile_counts for tile in modules],
        [tile.hyper for tile in modules],
        [tile.latch.samples if tile.config.transfer_unit == "samples" else 1 for tile in modules],
        False,
        [cells for tile in modules for cells in tile.cells(A, B, C)],
    )


def _pulse(members: list[tuple[TileModule, Tensor]], device: torch.device) -> None:
    ops = torch.ops.lrtt
    eta = torch.empty(2 * len(members), dtype=torch.float32, device=device).unbind()
    first, grads, scale, rates = [], [], [], []
    for tile, lr in members:
        first += [tile.latch.grad_a, tile.latch.grad_b]
        grads += [tile.A.grad, tile.B.grad]
        scale += [tile.config.alpha * tile.config.factor_scale] * 2
        rates += [lr, lr]
    ops.pulse_scale_(list(eta), grads, first, rates, scale)
    chunks = [factor_jobs(tile, array, eta[2 * i + array]) for i, (tile, _) in enumerate(members) for array in (A, B)]
    # Chunks of one array follow each other; only the round that runs is unfolded.
    while jobs := [job for job in (next(chunk, None) for chunk in chunks) if job is not None]:
        *columns, cells, x_top, d_top = (list(column) for column in zip(*jobs, strict=True))
        ops.pulsed_update_(*columns, [held for own in cells for held in own], x_top, d_top)


def _bound(modules: list[TileModule]) -> None:
    """Clip A and B of ``none_with_device`` to their cells' bounds after the floating-point update."""
    for tile in modules:
        if tile.config.fast_device is not None:
            for array, w in ((A, tile.A.detach()), (B, tile.B.detach())):
                torch.ops.lrtt.clip_(w, tile.tile_state, tile.hyper, array, True, [])


def _relax(modules: list[TileModule]) -> None:
    """Decay and diffusion of the arrays whose device has them, once per step."""
    jobs = []
    for tile in modules:
        fast, visible = tile.config.fast_device, tile.config.visible_device
        arrays = [(A, tile.A.detach()), (B, tile.B.detach())] if fast is not None and fast.relaxes else []
        arrays += [(C, tile.matrix)] if visible is not None and visible.relaxes else []
        jobs += [(w, tile.tile_state, tile.hyper, array, tile.cells(array)) for array, w in arrays]
    if jobs:
        *columns, cells = (list(column) for column in zip(*jobs, strict=True))
        torch.ops.lrtt.relax_(*columns, [held for own in cells for held in own])


class FactorJob(NamedTuple):
    """Arguments of ``pulsed_update_`` for A or B, in their order; of ``cells`` what one array holds."""

    w: Tensor
    x: Tensor
    d: Tensor
    eta: Tensor
    state: Tensor
    counts: Tensor
    hyper: Tensor
    array: int
    first_sample: int
    cells: list[Tensor]
    x_top: Tensor
    d_top: Tensor


def factor_jobs(tile: TileModule, array: int, eta: Tensor) -> Iterator[FactorJob]:
    """The update of A or B, in chunks that must run one after the other."""
    first = 0  # sample index of the call; calls that cannot be merged start at whole blocks
    w, own = (tile.A, tile.B)[array].detach(), (tile.tile_state, tile.tile_counts, tile.hyper, array)
    for call in tile.latch.merged():
        d_top, x_top = (ABSENT if top is None else top for top in (call.d_top, call.x_top))
        if array == A:
            x, d = tile.samples(call.xb), tile.samples(call.d)
            yield FactorJob(w, x, d, eta, *own, first, tile.cells(A), ABSENT, d_top)
        else:
            d = tile.samples(call.da)
            for offset, x in tile.patches(call.x):  # where x_top is given, they are one piece
                part = d[offset : offset + x.shape[0]]
                yield FactorJob(w, x, part, eta, *own, first + offset, tile.cells(B), x_top, ABSENT)
        first += -(-d.shape[0] // BLOCK_SAMPLES) * BLOCK_SAMPLES
