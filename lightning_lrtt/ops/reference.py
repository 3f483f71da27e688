"""The operators in plain PyTorch: the same numbers as the compiled kernels, bit for bit, slowly.

Each function takes the arguments of the operator of that name (``ops/schema.py``) on the CPU. Nothing here is vectorised
beyond one sample or one word of the pulse stream, so that a line can be held against the line of the specification it
implements. `reference_random` has the random numbers, `reference_pulses` the pulse trains, `reference_devices` the devices,
`reference_cells` what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lrtt.ops import reference_cells as cell
from lightning_lrtt.ops import reference_devices as models
from lightning_lrtt.ops import reference_random as rng
from lightning_lrtt.ops.reference_pulses import Coincidences, Rules, Train, plan_train, tile_numbers, transfer_words
from lightning_lrtt.ops.reference_random import f32
from lightning_lrtt.ops.schema import (
    COUNTER,
    COUNTS,
    CYCLE,
    FIXED_POINT,
    KEY,
    MINUS,
    STEP,
    A,
    B,
    C,
    planes,
)

_DIGITAL, _PULSED_RESIDUAL = 1, 3
_UNIFORM, _ORTHOGONAL = 2, 3


def _round(value: float) -> float:
    """``value`` rounded to float32. Exact for +, -, *, / and sqrt of float32 numbers computed in float64."""
    return float(f32(value))


def _largest(v: Tensor) -> float:
    """max |v|, or infinity where v holds an infinity or a NaN."""
    return float(v.abs().max()) if bool(torch.isfinite(v).all()) else math.inf


def _lane_sum(v: Tensor, lanes: int) -> float:
    """Sum of a vector in float64: lane l adds the elements l, l + lanes, ...; the lanes are added along a tree."""
    padded = torch.zeros(-(-len(v) // lanes) * lanes, dtype=torch.float64)
    padded[: len(v)] = v
    lane = torch.zeros(lanes, dtype=torch.float64)
    for row in padded.view(-1, lanes):
        lane = lane + row
    while len(lane) > 1:
        lane = lane[: len(lane) // 2] + lane[len(lane) // 2 :]
    return float(lane)


def _deal(cells: Iterator[Tensor], hyper: Tensor, array: int) -> Tensor | None:
    """The next of ``cells`` if the cells of ``array`` hold more than the weight."""
    return next(cells) if planes(hyper, array) else None


class _Arrays(NamedTuple):
    """The cells of an array within a block of samples; ``drawn`` counts the noise numbers that a cell has taken."""

    p: models.Params
    cells: list[models.Cells]
    own: list[Tensor]
    cut: Tensor
    touched: Tensor
    random: Tensor
    drawn: Tensor

    def noise(self, mask: Tensor) -> Tensor:
        """sigma xi of the cells in ``mask``, whose noise numbers go on; 0 elsewhere."""
        noise = torch.zeros(mask.shape)
        if self.p["dw_min_std"] > 0 and mask.any():
            start, increment = (words.expand_as(mask)[mask] for words in self.random[:2])
            noise[mask] = self.p["dw_min_std"] * rng.noise(start, increment, self.drawn[mask])
            self.drawn[mask] += 1
        return noise

    def write(self, plane: int, mask: Tensor, moved: Tensor) -> None:
        """Let the cells of ``mask`` move, within their bounds."""
        kept = cell.into_bounds(self.cells[plane], moved)
        self.cut.add_(torch.where(mask, (moved - kept).abs(), f32(0.0)))
        self.own[plane].copy_(torch.where(mask, kept, self.own[plane]))
        self.touched.logical_or_(mask)


def _pulse(a: _Arrays, hit: Tensor, up: Tensor) -> None:
    """One pulse on the cells of ``hit``."""
    if not hit.any():
        return
    noise, pair = a.noise(hit), len(a.own) == 2
    for plane, w in enumerate(a.own):
        # The cells of a pair take pulses upwards only, the first those that raise w, the second the others.
        mine = hit & (up == (plane == 0)) if pair else hit
        a.write(plane, mine, models.moved(a.p, a.cells[plane], w, up | pair, noise))


def _burst(a: _Arrays, n: Tensor, up: Tensor) -> None:
    """n pulses of one sample: at once where that is a small change, one by one elsewhere."""
    pair, large = len(a.own) == 2, torch.zeros_like(n, dtype=torch.bool)
    many = n.float()
    for plane, w in enumerate(a.own):
        mine = (n > 0) & (up == (plane == 0)) if pair else n > 0
        b = models.burst_of(a.p, a.cells[plane], up | pair)
        small = mine & (many <= b.most)
        large |= mine & ~small
        eta = a.noise(small) * many.double().sqrt().float()  # torch's own float32 sqrt may be one ulp off
        a.write(plane, small, models.burst(a.p, a.cells[plane], b, w, many, eta))
    for i in range(int(n[large].max()) if large.any() else 0):
        _pulse(a, large & (n > i), up)


def _apply_block(
    w: Tensor,
    held: Tensor | None,
    x: Tensor,
    d: Tensor,
    trains: list[Train],
    first_sample: int,
    descend: bool,
    state: Tensor,
    counts: Tensor,
    hyper: Tensor,
    array: int,
    rules: Rules,
) -> None:
    """Pulses of one block of samples on w, in order. ``descend``: a positive product lowers w."""
    if not any(train[0] for train in trains):
        return
    key, step = int(state[KEY]), int(state[STEP])
    stream = Coincidences(x, d, trains, rules, key, step, first_sample, array)
    p = models.device_params(hyper, array == C)
    index = cell.index_of(w)
    own = [w] if held is None else list(held)  # views
    cells = [models.cells(p, key, array + plane * MINUS, index) for plane in range(len(own))]
    cut, touched = torch.zeros_like(w), torch.zeros(w.shape, dtype=torch.bool)
    block = first_sample // rules.block_samples
    random = rng.philox(key, index, block, step, rng.counter3(rng.NOISE, array))
    arrays = _Arrays(p, cells, own, cut, touched, random, torch.zeros(w.shape, dtype=torch.int64))
    if models.takes_bursts(p) and max(train[0] for train in trains) > models.FEW_SLOTS:
        for n, opposite in stream.bursts():
            counts[COUNTS["pulses_a"] + array] += int(n.sum())
            _burst(arrays, n, opposite == descend)
    else:
        for start in range(0, stream.slots, 32):
            hit, opposite = stream.word(start)
            counts[COUNTS["pulses_a"] + array] += int(hit.sum())
            for slot in range(len(hit)):
                _pulse(arrays, hit[slot], opposite[slot] == descend)
    if array == C:
        counts[COUNTS["lost"]] += (cut.double() * FIXED_POINT + 0.5).long().sum()
    if len(own) == 2:
        w.copy_(torch.where(touched, own[0] - own[1], w))
    elif held is not None:
        w.copy_(torch.where(touched, cell.shown(p, key, array, index, own[0], cell.BY_PULSES, block, step), w))


def _count_nonfinite(counts: Tensor, step: int, samples: int) -> None:
    if samples:
        counts[COUNTS["nonfinite"]] += samples
        if counts[COUNTS["first_bad_step"]] < 0:
            counts[COUNTS["first_bad_step"]] = step


def pulsed_update_(
    w: list[Tensor],
    x: list[Tensor],
    d: list[Tensor],
    eta: list[Tensor],
    state: list[Tensor],
    counts: list[Tensor],
    hyper: list[Tensor],
    array: list[int],
    first_sample: list[int],
    cells: list[Tensor] | None = None,
) -> None:
    """w -= eta d x^T for every sample in order, as pulses on each cell's device."""
    given = iter(cells or ())
    for w_, x_, d_, eta_, state_, counts_, hyper_, array_, first in zip(
        w, x, d, eta, state, counts, hyper, array, first_sample, strict=True
    ):
        held = _deal(given, hyper_, array_)
        x_, d_, rate, rules = x_.float(), d_.float(), float(eta_), Rules.of_update(hyper_)
        granularity = float(models.device_params(hyper_, array_ == C)["granularity"])
        bad = 0
        for s0 in range(0, len(x_), rules.block_samples):
            xs, ds = x_[s0 : s0 + rules.block_samples], d_[s0 : s0 + rules.block_samples]
            largest = [(_largest(xs[s]), _largest(ds[s])) for s in range(len(xs))]
            bad += sum(not all(map(math.isfinite, (rate, *pair))) for pair in largest)
            trains = [plan_train(rate, x_max, d_max, granularity, rules) for x_max, d_max in largest]
            _apply_block(w_, held, xs, ds, trains, first + s0, rate >= 0, state_, counts_, hyper_, array_, rules)
        _count_nonfinite(counts_, int(state_[STEP]), bad)


def _transfer_digital(a: Tensor, b: Tensor, c: Tensor, held: Tensor | None, state: Tensor, hyper: Tensor) -> None:
    tau, p, key = tile_numbers(hyper)["tau"], models.device_params(hyper, True), int(state[KEY])
    if held is not None and not p["pair"]:  # it adds to what the cells hold, not to what a read shows
        c.copy_(held[0])
    total = torch.zeros_like(c)
    for q in range(a.shape[1]):
        total = total + a[:, q, None] * b[None, q]
    c.copy_(c + torch.tensor(tau, dtype=c.dtype) * total)
    if p["kind"]:
        cell.set_cells(p, key, C, cell.index_of(c), c, held, cell.BY_TRANSFER, int(state[STEP]))


def _transfer_pulsed(
    a: Tensor, b: Tensor, c: Tensor, held: Tensor | None, state: Tensor, counts: Tensor, hyper: Tensor, residual: bool
) -> None:
    tile, tau = tile_numbers(hyper), _round(tile_numbers(hyper)["tau"])
    rules, cap = Rules.of_transfer(hyper), int(tile["max_words"])
    granularity = float(models.device_params(hyper, True)["granularity"])
    rows, trains = [], []
    for q in range(len(b)):
        x_max, d_max = _largest(b[q]), _largest(a[:, q])
        words = transfer_words(tau, x_max, d_max, granularity, rules.bl, cap)
        train = plan_train(_round(tau / words), x_max, d_max, granularity, rules)
        if not (math.isfinite(x_max) and math.isfinite(d_max)):
            _count_nonfinite(counts, int(state[STEP]), 1)
        if train[0]:
            intended = abs(tau) * _lane_sum(a[:, q].abs(), 32) * _lane_sum(b[q].abs(), 32)
            counts[COUNTS["intended"]] += int(intended * FIXED_POINT + 0.5)
            if not residual:
                share = 1.0
                for v, scale in ((b[q], train[1]), (a[:, q], train[2])):
                    p = v.abs() * f32(scale)
                    share *= _lane_sum(rng.less(p, f32(1.0)), 32) / _lane_sum(p, 32)
                counts[COUNTS["lost"]] += int(intended * (1.0 - share) * FIXED_POINT + 0.5)
        rows += [q] * words
        trains += [train] * words
    for s0 in range(0, len(rows), rules.block_samples):  # one sample of the stream for each word of each term
        block = slice(s0, s0 + rules.block_samples)
        _apply_block(
            c, held, b[rows[block]], a.t()[rows[block]], trains[block], s0, tau < 0, state, counts, hyper, C, rules
        )


def _residual(a: Tensor, b: Tensor, hyper: Tensor, q: int) -> Tensor:
    """What the words of term q could not express stays in A[:, q]."""
    tile, tau = tile_numbers(hyper), _round(tile_numbers(hyper)["tau"])
    rules = Rules.of_transfer(hyper)._replace(management=True)
    granularity = float(models.device_params(hyper, True)["granularity"])
    x_max, d_max = _largest(b[q]), _largest(a[:, q])
    words = transfer_words(tau, x_max, d_max, granularity, rules.bl, int(tile["max_words"]))
    slots, _, sd = plan_train(_round(tau / words), x_max, d_max, granularity, rules)
    if slots == 0 or _round(d_max * sd) <= _round(1.000001):
        return torch.zeros_like(a[:, q])
    over = a[:, q].abs() - f32(_round(1.0 / sd))
    return torch.where(over > 0, torch.copysign(over, a[:, q]), f32(0.0))


def _orthogonalise(b: Tensor, std: float) -> None:
    """Gram-Schmidt of the rows in float64, each stored in b's dtype with squared norm std^2 k."""
    unit = std * std * b.shape[1]
    for q in range(len(b)):
        for p in range(q):
            share = _lane_sum(b[q].double() * b[p].double(), 32) / unit
            b[q] = b[q].double() - share * b[p].double()
        b[q] = b[q].double() * math.sqrt(unit / _lane_sum(b[q].double() * b[q].double(), 32))


def _reinit(
    a: Tensor, b: Tensor, held: tuple[Tensor | None, Tensor | None], state: Tensor, hyper: Tensor, residual: bool
) -> None:
    tile, key, k, cycle = tile_numbers(hyper), int(state[KEY]), b.shape[1], int(state[CYCLE])
    std, p, orthogonal = f32(tile["reinit_std"]), models.device_params(hyper, False), int(tile["reinit"]) == _ORTHOGONAL
    index = cell.index_of(b)

    def write(rows: slice) -> None:
        cells = None if held[1] is None else held[1][:, rows]
        if p["kind"]:
            cell.set_cells(p, key, B, index[rows], b[rows], cells, cell.BY_REINIT, cycle)

    for q in range(len(b)):
        a[:, q] = _residual(a, b, hyper, q) if residual else 0.0
        if a[:, q].any():
            continue  # B[q] still belongs to what is left in A[:, q]
        words = rng.element_words(key, torch.arange(q * k, (q + 1) * k), 0, cycle, rng.counter3(rng.REINIT, 1))
        if int(tile["reinit"]) == _UNIFORM:
            b[q] = std * (f32(1.7320508) * rng.fma(f32(2.0), rng.uniform(words), f32(-1.0)))
        else:
            b[q] = std * rng.normal(words)
        if not orthogonal:
            write(slice(q, q + 1))
    if orthogonal:
        _orthogonalise(b, tile["reinit_std"])
        write(slice(None))
    if p["kind"]:  # a stuck cell does not go to 0
        cell.set_cells(p, key, A, cell.index_of(a), a, held[0], cell.BY_REINIT, cycle)


def transfer_(
    a: list[Tensor],
    b: list[Tensor],
    c: list[Tensor],
    state: list[Tensor],
    counts: list[Tensor],
    hyper: list[Tensor],
    samples: list[int],
    force: bool,
    cells: list[Tensor] | None = None,
) -> None:
    """Ends an optimizer step; where a tile is due, C += tau A B and fresh factors."""
    given = iter(cells or ())
    for a_, b_, c_, state_, counts_, hyper_, increment in zip(a, b, c, state, counts, hyper, samples, strict=True):
        tile = tile_numbers(hyper_)
        held_a, held_b, held_c = (_deal(given, hyper_, array) for array in (A, B, C))
        counter = int(state_[COUNTER]) + increment
        if force or counter >= int(tile["transfer_every"]):
            mode = int(tile["transfer_mode"])
            residual = mode == _PULSED_RESIDUAL and not force
            if mode == _DIGITAL:
                _transfer_digital(a_, b_, c_, held_c, state_, hyper_)
            else:
                _transfer_pulsed(a_, b_, c_, held_c, state_, counts_, hyper_, residual)
            state_[CYCLE] += 1
            counter = 0
            counts_[COUNTS["transfers"]] += 1
            _reinit(a_, b_, (held_a, held_b), state_, hyper_, residual)
        state_[COUNTER] = counter
        state_[STEP] += 1


def reinit_(
    a: list[Tensor], b: list[Tensor], state: list[Tensor], hyper: list[Tensor], cells: list[Tensor] | None = None
) -> None:
    """A <- 0, B <- the draw of the present cycle."""
    given = iter(cells or ())
    for a_, b_, state_, hyper_ in zip(a, b, state, hyper, strict=True):
        _reinit(a_, b_, (_deal(given, hyper_, A), _deal(given, hyper_, B)), state_, hyper_, residual=False)


def digital_update_(
    w: list[Tensor], grad: list[Tensor], lr: list[Tensor], state: list[Tensor], counts: list[Tensor], scale: list[float]
) -> None:
    """w -= lr scale grad, skipped and counted where grad is not finite."""
    for w_, g, lr_, state_, counts_, s in zip(w, grad, lr, state, counts, scale, strict=True):
        if bool(torch.isfinite(g).all()):
            w_.copy_(w_ - torch.tensor(float(lr_) * s, dtype=w_.dtype) * g)
        else:
            _count_nonfinite(counts_, int(state_[STEP]), 1)


def pulse_scale_(
    eta: list[Tensor], grad: list[Tensor], first: list[Tensor], lr: list[Tensor], scale: list[float]
) -> None:
    """eta = lr scale <grad, first> / <first, first>."""
    for eta_, g, f, lr_, s in zip(eta, grad, first, lr, scale, strict=True):
        g, f = g.flatten().double(), f.flatten().double()
        square = _lane_sum(f * f, 1024)
        eta_.fill_(float(lr_) * s * (_lane_sum(g * f, 1024) / square) if square != 0 else 0.0)


def relax_(
    w: list[Tensor], state: list[Tensor], hyper: list[Tensor], array: list[int], cells: list[Tensor] | None = None
) -> None:
    """Decay and diffusion of every cell and the refresh of pairs, one optimizer step."""
    given = iter(cells or ())
    for w_, state_, hyper_, array_ in zip(w, state, hyper, array, strict=True):
        p = models.device_params(hyper_, array_ == C)
        cell.relax(p, int(state_[KEY]), array_, w_, _deal(given, hyper_, array_), int(state_[STEP]))


def draw_cells(state: Tensor, hyper: Tensor, array: int, rows: int, columns: int) -> Tensor:
    """The drawn cells of an array, ``[7, rows, columns]``, in the order of `reference_devices.Cells`."""
    index = torch.arange(rows * columns).view(rows, columns)
    cells = models.cells(models.device_params(hyper, array & ~MINUS == C), int(state[KEY]), array, index)
    return torch.stack(list(cells))


def clip_(
    w: Tensor, state: Tensor, hyper: Tensor, array: int, write: bool, cells: list[Tensor] | None = None
) -> Tensor:
    """Counts the cells at a bound; ``write`` programs them to w and counts what of w is at or beyond a bound."""
    p, key, held = models.device_params(hyper, array == C), int(state[KEY]), _deal(iter(cells or ()), hyper, array)
    count = cell.at_bound(p, key, array, w, held, write).sum()
    if write:
        cell.set_cells(p, key, array, cell.index_of(w), w, held, cell.BY_SET, int(state[STEP]))
    return count


def reset_cells_(
    w: Tensor,
    state: Tensor,
    hyper: Tensor,
    array: int,
    first: int,
    last: int,
    share: float,
    number: int,
    cells: list[Tensor] | None = None,
) -> None:
    """Resets the cells of columns [first, last) with probability ``share``."""
    p, held = models.device_params(hyper, array == C), _deal(iter(cells or ()), hyper, array)
    cell.reset(p, int(state[KEY]), array, w, held, slice(first, last), share, number, int(state[STEP]))
