"""Single kernels against the floors: update, transfer, the segment tree, decoding."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import contenders as c
import torch
from measure import Options, Row, Step, captured, in_turn, relate
from torch import Tensor

from lightning_lrtt.nn import LRTTLinear, linear
from lightning_lrtt.ops import COUNTS, A, B
from lightning_lrtt.strategies.tree import sum_program, tree

LR, CALLS = 0.1, 16  # calls in a window


def update(o: Options) -> Iterator[Row]:
    """The pulsed update of A and B alone, one call for both; peer: the same outer products by two matrix products."""
    size, n, rank = o.size, o.samples, o.rank
    torch.manual_seed(0)
    x = (2 * torch.rand(n, size, device=o.device) - 1).bfloat16()
    eta = torch.full((), LR, device=o.device)
    rows: dict[str, Row] = {}
    runs: dict[str, list[Step]] = {}
    tiles: dict[str, LRTTLinear] = {}
    moved = 2 * n * 2 * (size + rank) + 2 * 4 * 2 * rank * size  # x, D, X_B, D_A in bf16; A and B read and written
    for weight, scale in (("light", 1e-4), ("heavy", 0.1)):
        for noise, device in (("", c.SOFT), (", no cycle-to-cycle noise", c.QUIET)):
            name = f"pulsed, {weight}{noise}"
            tile = LRTTLinear(size, size, bias=False, config=c.config(device, rank, 32), device=o.device, tile=0)
            a, b = tile.factors()
            a.normal_(0.0, 0.05 if weight == "heavy" else 1e-3)
            ring = [(scale * torch.randn(n, size, device=o.device)).bfloat16() for _ in range(4)]
            operands = [(x @ b.bfloat16().t(), d, d @ a.bfloat16()) for d in ring]

            def call(xb: Tensor, d: Tensor, da: Tensor, tile: LRTTLinear = tile, a: Tensor = a, b: Tensor = b) -> None:
                torch.ops.lrtt.pulsed_update_(
                    [a, b],
                    [xb, x],
                    [d, da],
                    [eta, eta],
                    [tile.tile_state] * 2,
                    [tile.tile_counts] * 2,
                    [tile.hyper] * 2,
                    [A, B],
                    [0, 0],
                )

            steps = [lambda one=one, call=call: call(*one) for one in operands]
            runs[name] = captured(steps, o.device, True) * (CALLS // len(steps))
            rows[name] = Row(name, bytes=moved, flops=4 * n * size * rank)
            tiles[name] = tile
    tile = LRTTLinear(size, size, bias=False, config=c.config(None, rank, 32), device=o.device, tile=0)
    xb, d = x @ tile.B.detach().bfloat16().t(), (1e-4 * torch.randn(n, size, device=o.device)).bfloat16()
    da = torch.randn_like(xb)

    def products() -> None:
        torch.mm(d.t(), xb)
        torch.mm(da.t(), x)

    rows["two matrix products (digital)"] = Row("two matrix products (digital)", bytes=moved, flops=4 * n * size * rank)
    runs["two matrix products (digital)"] = captured([products], o.device) * CALLS
    before: dict[str, Tensor] = {}

    def start() -> None:
        before.update({name: tile.tile_counts.clone() for name, tile in tiles.items()})

    times = in_turn(runs, o.rounds, o.device, list(runs), start)
    for name, row in rows.items():
        row.ms, row.worst = times[name].median, times[name].worst
        if name in tiles:
            delta = ((tiles[name].tile_counts - before[name]) / (o.rounds * CALLS)).tolist()
            pulses = delta[COUNTS["pulses_a"]] + delta[COUNTS["pulses_b"]]
            row.more |= {"pulses": f"{pulses:.4g}", "a cell and sample": pulses / (2 * rank * size * n)}
            row.more["ns a pulse"] = 1e6 * row.ms / pulses if pulses else None
    yield from rows.values()


def transfer(o: Options) -> Iterator[Row]:
    """The transfer of rank r into C with its reinit; the copies that set A and B before it are timed and taken off."""
    size, rank = o.size, o.rank
    torch.manual_seed(0)
    a = torch.randn(size, rank, device=o.device)
    b = torch.randn(rank, size, device=o.device) / rank**0.5
    rows: dict[str, Row] = {}
    runs: dict[str, list[Step]] = {}
    tiles: dict[str, LRTTLinear] = {}
    # About 1 and 18 pulses a cell: dw_min / E|a| E|b| / r = 0.001 / (0.64 scale r^0.5).
    for name, device, scale in (
        ("digital", None, 7e-3),
        ("pulsed, few", c.SOFT, 4e-4),
        ("pulsed, many", c.SOFT, 7e-3),
        ("pulsed, many, no cycle-to-cycle noise", c.QUIET, 7e-3),
    ):
        tile = LRTTLinear(size, size, bias=False, config=c.config(device, rank, 32), device=o.device, tile=0)
        operands = [(sign * scale) * a for sign in (1.0, -1.0)]  # so that C does not run into its bounds

        def load(values: Tensor, tile: LRTTLinear = tile) -> None:
            tile.A.detach().copy_(values)
            tile.B.detach().copy_(b)

        def both(values: Tensor, load=load, tile: LRTTLinear = tile) -> None:  # type: ignore[no-untyped-def]
            load(values)
            tile.flush()

        rows[name] = Row(name, bytes=4 * (2 * size * size + 4 * rank * size), flops=2 * size * size * rank)
        tiles[name] = tile
        for key, what in ((name, both), (f"{name} copies", load)):
            steps = [lambda values=values, what=what: what(values) for values in operands]
            runs[key] = captured(steps, o.device, True) * (CALLS // 2)
    before: dict[str, Tensor] = {}

    def start() -> None:
        before.update({name: tile.tile_counts.clone() for name, tile in tiles.items()})

    times = in_turn(runs, o.rounds, o.device, list(runs), start)
    for name, row in rows.items():
        copies = times[f"{name} copies"].median
        row.ms, row.worst = times[name].median - copies, times[name].worst - copies
        delta = ((tiles[name].tile_counts - before[name]) / (o.rounds * CALLS)).tolist()
        row.more = {"pulses a cell": delta[COUNTS["pulses_c"]] / size**2, "copies, ms": copies}
    yield from rows.values()


def small_layer(o: Options) -> Iterator[Row]:
    """A small pulsed layer's forward and backward pass, in one launch each and in several; 16 layers follow each other."""
    layers, n, d, k, rank = 16, o.samples, o.outputs, o.inputs, o.rank
    torch.manual_seed(0)
    grad = torch.randn(n, d, device=o.device)
    moved = 4 * (2 * d * k + 3 * n * k + 2 * n * d)  # C twice; x twice and its gradient; y and its gradient
    rows: dict[str, Row] = {}
    runs: dict[str, list[Step]] = {}
    for name, small in (("one launch each", True), ("several launches", False)):
        tiles = [LRTTLinear(k, d, config=c.config(c.SOFT, rank, 32), device=o.device) for _ in range(layers)]
        inputs = [torch.randn(n, k, device=o.device, requires_grad=True) for _ in tiles]
        rows[name] = Row(name, bytes=moved, flops=4 * n * d * k)
        if small and o.device == "cuda" and not linear.is_small(grad, tiles[0].weight, rank):
            rows[name].missing = "beyond the limits of small layers"
            continue

        def passes(tiles: list[LRTTLinear] = tiles, inputs: list[Tensor] = inputs, small: bool = small) -> None:
            with mock.patch.object(linear, "is_small", return_value=small):
                for tile, x in zip(tiles, inputs, strict=True):
                    tile.zero_grad()
                    tile.latch.clear()
                    x.grad = None
                    tile(x).backward(grad)

        runs[name] = captured([passes], o.device, True) * 4
    for name, times in in_turn(runs, o.rounds, o.device, list(runs)).items():
        rows[name].ms, rows[name].worst = times.median / layers, times.worst / layers
    relate(list(rows.values()), "several launches", "/ several")
    yield from rows.values()


def segment_tree(o: Options) -> Iterator[Row]:
    """The segment sum of 12 slots, alone and with norms and flags; peer: zero, 12 additions, scale."""
    size = o.floats
    slots = [torch.randn(size, device=o.device) for _ in range(12)]
    out = torch.empty(size, device=o.device)
    ones, scale = (torch.full((n,), v, dtype=torch.float64, device=o.device) for n, v in ((12, 1.0), (1, 1 / 12)))
    stats, none = ones.new_zeros(12, 2), ones.new_zeros(0)
    program = sum_program((tree(12),))

    def adds() -> None:
        out.zero_()
        for slot in slots:
            out.add_(slot)
        out.mul_(1 / 12)

    runs: dict[str, Step] = {
        "tree": lambda: torch.ops.lrtt.segment_sum_([out], slots, ones, scale, none, program, False),
        "tree, norms and flags": lambda: torch.ops.lrtt.segment_sum_([out], slots, ones, scale, stats, program, False),
        "zero, 12 additions, scale": adds,
    }
    times = in_turn({name: [run] * 4 for name, run in runs.items()}, o.rounds, o.device)
    rows = [Row(name, found.median, found.worst, bytes=4 * 13 * size) for name, found in times.items()]
    relate(rows, "zero, 12 additions, scale", "/ additions")
    yield from rows
