"""What the cells of an array hold beside the weight that is read, and what writes it otherwise than an update's pulses.

The functions of csrc/devices.h from `Held` on, in plain PyTorch and bit for bit. ``w`` is what is read; ``cells`` is
None where a cell holds nothing else, ``[1, ...]`` under write noise (the persistent weight), ``[2, ...]`` for pairs (two
conductances, whose difference is read).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt.ops import reference_devices as models
from lightning_lrtt.ops.reference_devices import Cells, Params
from lightning_lrtt.ops.reference_random import (
    DRAW,
    RESET,
    WRITE_NOISE,
    counter3,
    element_words,
    f32,
    fma,
    less,
    more,
    noise,
    normal,
    philox,
    uniform,
)
from lightning_lrtt.ops.schema import MINUS

BY_PULSES, BY_RELAX, BY_REINIT, BY_SET, BY_TRANSFER, BY_RESET = range(6)  # WriteEvent
_ZERO = f32(0.0)


def index_of(w: Tensor) -> Tensor:
    """Cell numbers in the shape of w."""
    return torch.arange(w.numel()).view(w.shape)


def into_bounds(c: Cells, w: Tensor) -> Tensor:
    """w, clipped."""
    return more(less(w + 0.0, c.b_max), c.b_min)  # no negative zero


def shown(p: Params, key: int, array: int, index: Tensor, w: Tensor, event: int, c1: int, c2: int) -> Tensor:
    """What a read shows of cells that hold w."""
    words = element_words(key, index.flatten(), c1, c2, counter3(WRITE_NOISE, array, event)).view(index.shape)
    return fma(p["write_noise_std"] * p["dw_min"], normal(words), w)


def set_cells(
    p: Params, key: int, array: int, index: Tensor, w: Tensor, cells: Tensor | None, event: int, c2: int
) -> None:
    """Programs cells to what stands in w; ``index`` are their numbers, ``w`` and ``cells`` may be views of rows."""
    plus = models.cells(p, key, array, index)
    if p["pair"]:
        assert cells is not None
        minus = models.cells(p, key, array + MINUS, index)
        held = torch.stack([into_bounds(plus, more(w, _ZERO)), into_bounds(minus, more(-w, _ZERO))])
        cells.copy_(held)
        w.copy_(held[0] - held[1])
        return
    w.copy_(into_bounds(plus, w))
    if cells is not None:
        cells[0] = w
        if p["apply_write_noise_on_set"]:
            w.copy_(shown(p, key, array, index, w, event, 0, c2))


def at_bound(p: Params, key: int, array: int, w: Tensor, cells: Tensor | None, target: bool) -> Tensor:
    """Which cells stand at a bound; ``target``: which would if w were written."""
    index = index_of(w)
    c = models.cells(p, key, array, index)
    if p["pair"]:
        assert cells is not None
        other = models.cells(p, key, array + MINUS, index)
        plus, minus = (more(w, _ZERO), more(-w, _ZERO)) if target else (cells[0], cells[1])
        return (plus >= c.b_max) | (minus >= other.b_max)
    held = w if target or cells is None else cells[0]
    return (held >= c.b_max) | (held <= c.b_min)


def _reset_value(p: Params, key: int, array: int, index: Tensor, word: Tensor) -> Tensor:
    target = fma(p["reset_dtod"], normal(philox(key, index, 3, 0, counter3(DRAW, array))[1]), p["reset"])
    return into_bounds(models.cells(p, key, array, index), fma(p["reset_std"], normal(word), target))


def reset(
    p: Params,
    key: int,
    array: int,
    w: Tensor,
    cells: Tensor | None,
    columns: slice,
    share: float,
    number: int,
    step: int,
) -> None:
    """Resets cells of ``columns`` with probability ``share``."""
    index = index_of(w)
    inside = torch.zeros(w.shape, dtype=torch.bool)
    inside[:, columns] = True
    values, hits = [], []
    for own in (array, array + MINUS) if p["pair"] else (array,):
        words = philox(key, index, number, step, counter3(RESET, own))
        hits.append(inside & (uniform(words[1]) < f32(share)))
        values.append(_reset_value(p, key, own, index, words[0]))
    if cells is None:
        w.copy_(torch.where(hits[0], values[0], w))
        return
    cells.copy_(torch.where(torch.stack(hits), torch.stack(values), cells))
    seen = cells[0] - cells[1] if p["pair"] else shown(p, key, array, index, cells[0], BY_RESET, number, step)
    w.copy_(torch.where(inside if p["pair"] else hits[0], seen, w))


def _refresh(p: Params, key: int, array: int, cells: Tensor, step: int) -> None:
    """Pairs near their upper bounds: reset, then verified up pulses on the one that was larger."""
    index = index_of(cells[0])
    plus, minus = cells.clone()
    due = (more(plus, minus) > p["refresh_upper_thres"] * p["w_max"]) & (
        less(plus, minus) > p["refresh_lower_thres"] * p["w_max"]
    )
    on_plus, want = plus > minus, (plus - minus).abs()
    arrays = (array, array + MINUS)
    fresh = [
        _reset_value(p, key, own, index, philox(key, index, 0, step, counter3(RESET, own, 1))[0]) for own in arrays
    ]
    up = torch.ones(index.shape, dtype=torch.bool)
    for plane, own in enumerate(arrays):
        chosen = due & (on_plus == (plane == 0))
        drawn = models.cells(p, key, own, index)
        g, goal = fresh[plane], want + fresh[1 - plane]
        start, increment = philox(key, index, 1, step, counter3(RESET, own, 1))[:2]
        for n in range(int(p["refresh_max_pulses"])):
            going = chosen & (g < goal)
            if not going.any():
                break
            shake = p["dw_min_std"] * noise(start, increment, torch.full_like(start, n))
            g = torch.where(going, into_bounds(drawn, models.moved(p, drawn, g, up, shake)), g)
        cells[plane] = torch.where(chosen, g, cells[plane])
        cells[1 - plane] = torch.where(chosen, fresh[1 - plane], cells[1 - plane])


def relax(p: Params, key: int, array: int, w: Tensor, cells: Tensor | None, step: int) -> None:
    """Decay, diffusion and refresh of one optimizer step."""
    index = index_of(w)
    if cells is None:
        w.copy_(models.relax(p, key, array, index, w, step))
        return
    for plane, held in enumerate(cells):
        held.copy_(models.relax(p, key, array + plane * MINUS, index, held, step))
    if not p["pair"]:
        w.copy_(shown(p, key, array, index, cells[0], BY_RELAX, 0, step))
        return
    if p["refresh_every"] > 0 and (step + 1) % int(p["refresh_every"]) == 0:
        _refresh(p, key, array, cells, step)
    w.copy_(cells[0] - cells[1])
