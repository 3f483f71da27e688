"""The converters of csrc/io.h in plain PyTorch: the bits of ``lrtt::io_input`` and ``lrtt::io_output_``.

`read` is a whole read with an exact matrix product, for tests of what a chain does on average.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lrtt._compiled import LAYOUT
from lightning_lrtt.ops.reference_random import counter3, f32, fma, less, more, normal, philox, uniform
from lightning_lrtt.ops.schema import KEY

READ = 16  # purpose
LANES: int = LAYOUT["read_lanes"]
INPUT_NOISE, INPUT_ROUNDING, OUTPUT_NOISE, OUTPUT_ROUNDING = range(4)
NEAREST, STOCHASTIC = 1, 2
ABS_MAX, CONSTANT = 1, 2


def _numbers(io: Tensor) -> dict[str, Tensor]:
    """Each number as a float32 scalar."""
    return dict(zip(LAYOUT["io"], io.float().unbind(), strict=True))


def _words(state: Tensor, ticket: Tensor, array: int, round: int, sample: int, stage: int, n: int) -> Tensor:
    """One word for each of ``n`` elements of a sample."""
    e = torch.arange(n)
    calls = philox(
        int(state[KEY]), e // 64 * 16 + e % 16, sample, int(ticket), counter3(READ, array) | round * 8 + stage
    )
    return calls.gather(0, (e // 16 % 4)[None])[0]


def _dither(words: Tensor) -> Tensor:
    return uniform(words) - 0.5


def _round_even(t: Tensor) -> Tensor:
    return torch.where(t.abs() < 2.0**22, t.round(), t) + 0.0  # + 0: what rounds to zero is a positive zero


def _into_range(t: Tensor, limit: Tensor) -> Tensor:
    t = torch.where(t > limit, limit, t)
    return torch.where(t < -limit, -limit, t)


def _sum(v: Tensor) -> float:
    """Sum in float64: lane l adds the elements l, l + 128, ...; the lanes are added along a tree."""
    padded = torch.zeros(-(-len(v) // LANES) * LANES, dtype=torch.float64)
    padded[: len(v)] = v
    lane = torch.zeros(LANES, dtype=torch.float64)
    for row in padded.view(-1, LANES):
        lane = lane + row
    while len(lane) > 1:
        lane = lane[: len(lane) // 2] + lane[len(lane) // 2 :]
    return float(lane)


def scale(p: dict[str, Tensor], x: Tensor, round: int) -> Tensor:
    """alpha of one sample ``[k]``."""
    alpha = f32(1.0)
    if p["management"] == CONSTANT:
        alpha = p["nm_thres"]
    if p["management"] == ABS_MAX:
        if x.isnan().any():
            return f32(math.nan)
        alpha = less(x.abs().max(), p["nm_thres"])
    if round == 0:
        return alpha
    if p["worst_case"] == 0:
        return alpha * 2.0**round
    zero = f32(0.0)
    total = max(_sum(more(x, zero).double()), _sum(more(-x, zero).double()))
    worst = min(total * float(p["worst_case"]), float(alpha) * float(p["worst_cap"]))
    return more(f32(worst), alpha) * 2.0 ** (round - 1)


def io_input(
    x: Tensor,
    ticket: Tensor,
    state: Tensor,
    io: Tensor,
    array: int,
    round: int,
    first_sample: int,
    pending: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The operand ``[N, k]`` in units of the step, and alpha and sigma of each sample ``[2, N]``."""
    p, x = _numbers(io), x.float()
    n, k = x.shape
    operand, per = torch.zeros(n, k), torch.zeros(2, n)
    for s in range(n):
        if pending is not None and not pending[s]:
            continue
        alpha = scale(p, x[s], round)
        where = (state, ticket, array, round, first_sample + s)
        if alpha != 0:
            t = x[s] / alpha * p["inp_scale"]
            if p["inp_round"] == STOCHASTIC:
                t = t + _dither(_words(*where, INPUT_ROUNDING, k))
            if p["inp_round"]:
                t = _round_even(t)
            t = _into_range(t, p["inp_limit"])
            operand[s] = fma(p["inp_noise"], normal(_words(*where, INPUT_NOISE, k)), t) if p["inp_noise"] else t
        squares = float(p["w_noise"]) ** 2 * _sum(operand[s].double().square()) if p["w_noise"] else 0.0
        sigma = math.sqrt(float(p["out_noise"]) ** 2 + squares) if math.isfinite(squares) else math.nan
        per[0, s], per[1, s] = alpha, sigma
    return operand.to(dtype), per


def io_product(u: Tensor, w: Tensor, pending: Tensor) -> Tensor:
    """Products ``[N, d]`` of the pending samples."""
    return torch.where(pending.bool()[:, None], u.float() @ w.to(u.dtype).float().t(), 0.0)


def io_output_(
    y: Tensor,
    acc: Tensor,
    per: Tensor,
    ticket: Tensor,
    state: Tensor,
    io: Tensor,
    array: int,
    round: int,
    first_sample: int,
    pending: Tensor | None,
) -> Tensor:
    """Writes y ``[N, d]`` in place; returns which samples were clipped, int32 ``[N]``."""
    p, (n, d) = _numbers(io), acc.shape
    clipped = torch.zeros(n, dtype=torch.int32)
    for s in range(n):
        if pending is not None and not pending[s]:
            continue
        alpha, sigma = per[:, s]
        if alpha == 0:
            y[s] = 0.0
            continue
        where = (state, ticket, array, round, first_sample + s)
        v = acc[s] * p["inp_unit"]
        v = fma(sigma, normal(_words(*where, OUTPUT_NOISE, d)), v) if sigma else v + 0.0
        t = v * p["out_scale"]
        if p["out_round"] == STOCHASTIC:
            t = t + _dither(_words(*where, OUTPUT_ROUNDING, d))
        if p["out_round"]:
            t = _round_even(t)
        clipped[s] = bool((t.abs() > p["out_limit"]).any())
        y[s] = _into_range(t, p["out_limit"]) * p["out_unit"] * alpha
    return clipped


def read(x: Tensor, w: Tensor, ticket: Tensor, state: Tensor, io: Tensor, array: int, rounds: int) -> Tensor:
    """``x w^T`` through the chain, with at most ``rounds`` repetitions; x ``[N, k]``, w ``[d, k]``."""
    y, pending = torch.zeros(x.shape[0], w.shape[0]), torch.ones(x.shape[0], dtype=torch.int32)
    for round in range(rounds + 1):
        u, per = io_input(x, ticket, state, io, array, round, 0, pending, torch.float32)
        pending = io_output_(y, u @ w.t(), per, ticket, state, io, array, round, 0, pending)
    return y


__all__ = ["LANES", "READ", "io_input", "io_output_", "read", "scale"]
