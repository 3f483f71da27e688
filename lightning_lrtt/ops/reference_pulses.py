"""Pulse trains in plain PyTorch: how long they are, which slots fire, which cells they meet.

The numbers of csrc/jobs.h, bit for bit; formulas and meaning in docs/pulses.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lrtt._compiled import LAYOUT
from lightning_lrtt.ops import reference_random as rng
from lightning_lrtt.ops.reference_random import f32
from lightning_lrtt.ops.schema import BLOCK_SAMPLES

MEAN_COUNT, DETERMINISTIC_IMPLICIT = 3, 4  # PulseType
Train = tuple[int, float, float]  # BL, S_x, S_d


def tile_numbers(hyper: Tensor) -> dict[str, float]:
    """The tile's packed numbers by name."""
    return dict(zip(LAYOUT["tile"], hyper.tolist(), strict=False))


class Rules(NamedTuple):
    """PulseParams: how trains are made."""

    bl: int
    management: bool
    bl_management: bool
    kind: int
    fixed: bool
    max_bl: int
    sto_round: bool
    x_res: float
    d_res: float
    grad_scale: float

    @classmethod
    def of_update(cls, hyper: Tensor) -> Rules:
        """Those of the updates of A and B."""
        t = tile_numbers(hyper)
        return cls(
            int(t["desired_bl"]),
            bool(t["update_management"]),
            bool(t["update_bl_management"]),
            int(t["pulse_type"]),
            bool(t["fixed_bl"]),
            int(t["max_bl"]),
            bool(t["sto_round"]),
            t["x_res"],
            t["d_res"],
            t["um_grad_scale"],
        )

    @classmethod
    def of_transfer(cls, hyper: Tensor) -> Rules:
        """Those of the transfer into C."""
        t = tile_numbers(hyper)
        return cls(
            int(t["transfer_bl"]),
            bool(t["transfer_update_management"]),
            bool(t["transfer_update_bl_management"]),
            int(t["transfer_pulse_type"]),
            True,
            0,
            bool(t["transfer_sto_round"]),
            t["transfer_x_res"],
            t["transfer_d_res"],
            1.0,
        )

    @property
    def most_slots(self) -> int:
        """Length of the longest train."""
        return self.bl if self.fixed else max(self.bl, self.max_bl)

    @property
    def block_samples(self) -> int:
        """Samples of a block: a power of two whose trains fit the words of 512 samples of 31 slots."""
        samples = BLOCK_SAMPLES
        while samples > 1 and samples * self.most_slots > BLOCK_SAMPLES * LAYOUT["short_slots"]:
            samples //= 2
        return samples


def plan_train(eta: float, x_max: float, d_max: float, granularity: float, rules: Rules) -> Train:
    """One sample's (BL, S_x, S_d), or BL = 0 where there is no update.

    ``eta``, ``x_max``, ``d_max`` and ``granularity`` are float32 values.
    """
    if not all(map(math.isfinite, (eta, x_max, d_max))) or 0.0 in (eta, x_max, d_max):
        return 0, 0.0, 0.0
    lr = abs(eta)
    d_max = d_max * rules.grad_scale
    kappa = lr * x_max * d_max / granularity
    slots, s = rules.bl, 0.0
    if rules.bl_management and kappa < slots:
        slots = max(math.ceil(kappa), 0)
    elif not rules.fixed and granularity * slots < lr:
        slots = rules.most_slots
        if lr / granularity <= slots:
            slots, s = math.ceil(lr / granularity), 1.0
    if slots < 1:
        return 0, 0.0, 0.0
    s = s or math.sqrt(lr / (granularity * slots))
    ratio = 1.0
    if rules.management:
        ratio = math.sqrt(x_max / (d_max * (rules.bl / kappa) if kappa > rules.bl else d_max))
    largest = torch.finfo(torch.float32).max  # an infinite scale would let a zero operand fire
    return slots, float(f32(min(s / ratio, largest))), float(f32(min(s * ratio, largest)))


def transfer_words(tau: float, x_max: float, d_max: float, granularity: float, bl: int, cap: int) -> int:
    """Words of one term of a transfer: ``min(ceil(kappa / BL), cap)``, at least one."""
    if not (math.isfinite(x_max) and math.isfinite(d_max)):
        return 1
    words = abs(tau) * x_max * d_max / granularity / bl
    return max(math.ceil(words), 1) if words < cap else cap


class Coincidences:
    """The slots of a block of samples end to end, and the cells that each of them pulses.

    Args:
        x: Operand ``[samples, columns]``.
        d: Operand ``[samples, rows]``.
        trains: One a sample.
        rules: How they are made.
        key: Of the tile.
        step: Optimizer step.
        first_sample: Random counter of the first sample.
        array: Which array of the tile.
    """

    def __init__(
        self,
        x: Tensor,
        d: Tensor,
        trains: list[Train],
        rules: Rules,
        key: int,
        step: int,
        first_sample: int,
        array: int,
    ) -> None:
        # The sample of each slot, and its number in the sample's train.
        self.sample = torch.tensor(
            [s for s, (slots, _, _) in enumerate(trains) for _ in range(slots)], dtype=torch.int64
        )
        self.place = torch.tensor([i for slots, _, _ in trains for i in range(slots)], dtype=torch.int64)
        self.opposite = torch.signbit(d)[:, :, None] ^ torch.signbit(x)[:, None, :]
        self.slots = len(self.sample)
        chances = [
            [
                _chance(
                    v[s].abs() * f32(train[1 + side]),
                    (rules.x_res, rules.d_res)[side],
                    rules.sto_round,
                    key,
                    step,
                    first_sample + s,
                    array,
                    side,
                )
                for s, train in enumerate(trains)
            ]
            for side, v in enumerate((x, d))
        ]
        self.counts: Tensor | None = None
        if rules.kind in (MEAN_COUNT, DETERMINISTIC_IMPLICIT):
            self.counts = torch.stack(
                [_counts(rules.kind, chances[0][s], chances[1][s], train[0]) for s, train in enumerate(trains)]
            )
        else:
            self.x, self.d = (
                torch.cat(
                    [
                        rng.bernoulli(key, chances[side][s], train[0], first_sample + s, step, purpose, array)
                        for s, train in enumerate(trains)
                        if train[0]
                    ]
                    or [torch.zeros(0, v.shape[1], dtype=torch.bool)]
                )
                for side, (v, purpose) in enumerate(((x, rng.BIT_X), (d, rng.BIT_D)))
            )

    def bursts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What each sample gives the cells, 32 slots at a time: (pulses of a cell, x d is negative), ``[rows, columns]``."""
        for s in self.sample.unique().tolist():
            if self.counts is not None:
                yield self.counts[s], self.opposite[s]
                continue
            slots = (self.sample == s).nonzero().flatten()
            for piece in slots.split(32):
                yield (self.d[piece, :, None] & self.x[piece, None, :]).sum(0), self.opposite[s]

    def word(self, start: int) -> tuple[Tensor, Tensor]:
        """32 slots from ``start`` on: (a cell is pulsed, x d is negative), ``[slots, rows, columns]`` booleans."""
        slots = slice(start, start + 32)
        opposite = self.opposite[self.sample[slots]]
        if self.counts is not None:
            return self.place[slots, None, None] < self.counts[self.sample[slots]], opposite
        return self.d[slots, :, None] & self.x[slots, None, :], opposite


def _chance(p: Tensor, res: float, sto_round: bool, key: int, step: int, sample: int, array: int, side: int) -> Tensor:
    """The probability as it is used: on the grid of its side."""
    words = None
    if sto_round:
        words = rng.element_words(key, torch.arange(len(p)), sample * 64 + side, step, rng.counter3(rng.ROUND, array))
    return rng.on_grid(p, res, words)


def _counts(kind: int, p_x: Tensor, p_d: Tensor, bl: int) -> Tensor:
    """Pulses of every cell by one sample of a counted train, ``[rows, columns]``."""
    q_x, q_d = (rng.less(p, f32(1.0)) for p in (p_x, p_d))
    if kind == DETERMINISTIC_IMPLICIT:
        return (f32(float(bl)) * q_d[:, None] * q_x[None, :]).round().long()
    if bl == 0:
        return torch.zeros(len(q_d), len(q_x), dtype=torch.int64)
    c_x, c_d = ((f32(float(bl)) * q).round().long() for q in (q_x, q_d))
    product = c_d[:, None] * c_x[None, :]
    whole, rest = product // bl, 2 * (product % bl)
    return whole + ((rest > bl) | ((rest == bl) & (whole % 2 == 1))).long()
