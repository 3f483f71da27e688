"""CPU time of the pulsed kernels beside IBM's aihwkit, and of a whole step beside a digital layer's.

    python benchmarks/against_aihwkit.py --aihwkit aihw/bin/python [--size 1024] [--rank 8] [--rounds 7]

`tests/peers/aihwkit_statistics.py` tells how to build aihwkit. It runs in a process of its own that waits for orders, so
that both are timed in turn, round by round; figures are medians and the ratio is the median of the rounds' ratios. Both get
the same operands, trains of at most 31 slots and SoftBounds devices with 30% variations and cycle-to-cycle noise. Rows:

- update of A and B: two tiles there (`out x r` and `r x in`), one op call here, for a batch;
- transfer: `rank` rank-1 updates of a square SoftBounds array, one pulse train each on both sides;
- step: forward, backward and update of one square layer, LR-TT on devices here, `torch.nn.Linear` with SGD as the peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

LR = 0.1
Run = Callable[[], None]


def operands(size: int, rank: int, batch: int) -> dict[str, torch.Tensor]:
    """x, D and the factors: the same numbers in both processes."""
    rng = np.random.default_rng(0)
    a, b = 0.05 * rng.standard_normal((size, rank)), rng.standard_normal((rank, size)) / rank**0.5
    x, d = rng.uniform(-1, 1, (batch, size)), 0.1 * rng.standard_normal((batch, size))
    named = {"a": a, "b": b, "x": x, "d": d, "xb": x @ b.T, "da": d @ a}
    return {name: torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32)) for name, v in named.items()}


# ---------------------------------------------------------------- aihwkit's side, in its own interpreter


def aihwkit_cases(size: int, rank: int) -> dict[str, Run]:
    """What aihwkit is timed with."""
    from aihwkit.simulator.configs import SingleRPUConfig, UpdateParameters
    from aihwkit.simulator.configs.devices import SoftBoundsDevice
    from aihwkit.simulator.tiles.analog import AnalogTile

    def tile(rows: int, columns: int) -> Any:
        pulses = UpdateParameters(desired_bl=31)
        made = AnalogTile(rows, columns, SingleRPUConfig(device=SoftBoundsDevice(), update=pulses))
        made.set_learning_rate(LR)
        return made

    cases: dict[str, Run] = {}
    for batch in (32, 128):
        o, tile_a, tile_b = operands(size, rank, batch), tile(size, rank), tile(rank, size)

        def update(o: dict[str, torch.Tensor] = o, tile_a: Any = tile_a, tile_b: Any = tile_b) -> None:
            tile_a.update(o["xb"], o["d"])
            tile_b.update(o["x"], o["da"])

        cases[f"update of A and B, batch {batch}"] = update
    visible, o = tile(size, size), operands(size, rank, 1)
    visible.set_learning_rate(1.0)
    columns = o["a"].t().contiguous()

    def transfer() -> None:
        visible.update(o["b"], -columns)

    cases["transfer"] = transfer
    return cases


def serve(size: int, rank: int) -> None:
    """Time the cases that stdin names, one a line."""
    cases = aihwkit_cases(size, rank)
    for line in sys.stdin:
        print(json.dumps(seconds(cases[line.strip()])), flush=True)


# ---------------------------------------------------------------- our side


def own_cases(size: int, rank: int) -> dict[str, Run]:
    """What this package is timed with."""
    from lightning_lrtt import LRTT, LRTTConfig, PulseConfig, devices
    from lightning_lrtt.nn import LRTTLinear

    soft = devices.SoftBounds()
    config = LRTTConfig(
        rank=rank,
        transfer_every=1,
        fast_device=soft,
        visible_device=soft,
        transfer_max_words=1,
        pulse=PulseConfig(desired_bl=31),
    )
    cases: dict[str, Run] = {}
    for batch in (32, 128):
        layer, o = LRTTLinear(size, size, bias=False, config=config), operands(size, rank, batch)
        eta = torch.tensor(LR)

        def update(layer: Any = layer, o: dict[str, torch.Tensor] = o, eta: torch.Tensor = eta) -> None:
            torch.ops.lrtt.pulsed_update_(
                [layer.A.detach(), layer.B.detach()],
                [o["xb"], o["x"]],
                [o["d"], o["da"]],
                [eta, eta],
                [layer.tile_state] * 2,
                [layer.tile_counts] * 2,
                [layer.hyper] * 2,
                [0, 1],
                [0, 0],
            )

        cases[f"update of A and B, batch {batch}"] = update
    tile, o = LRTTLinear(size, size, bias=False, config=config), operands(size, rank, 1)

    def transfer() -> None:
        with torch.no_grad():
            tile.A.copy_(o["a"])
            tile.B.copy_(o["b"])
        torch.ops.lrtt.transfer_(
            [tile.A.detach()],
            [tile.B.detach()],
            [tile.matrix],
            [tile.tile_state],
            [tile.tile_counts],
            [tile.hyper],
            [1],
            False,
        )

    cases["transfer"] = transfer

    every = LRTTConfig(rank=rank, transfer_every=32, fast_device=soft, visible_device=soft)
    o = operands(size, rank, 128)
    for name, layer, kind in (
        ("step, batch 128", LRTTLinear(size, size, config=every), LRTT),
        ("nn.Linear", torch.nn.Linear(size, size), torch.optim.SGD),
    ):
        optimizer, x = kind(layer.parameters(), lr=LR), o["x"].clone().requires_grad_()

        def step(layer: Any = layer, optimizer: Any = optimizer, x: torch.Tensor = x, d: torch.Tensor = o["d"]) -> None:
            optimizer.zero_grad()
            layer(x).backward(d)
            optimizer.step()

        cases[name] = step
    return cases


def seconds(run: Run) -> float:
    """Of one call, the second after a pause: threads of the process that had its turn before spin for a while."""
    time.sleep(0.05)
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aihwkit", help="a Python that has aihwkit")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if args.serve:
        serve(args.size, args.rank)
        return
    if args.aihwkit is None:
        parser.error("--aihwkit must name a Python that has aihwkit")
    own = own_cases(args.size, args.rank)
    peer = subprocess.Popen(
        [args.aihwkit, __file__, "--serve", "--size", str(args.size), "--rank", str(args.rank)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert peer.stdin is not None and peer.stdout is not None

    def ask(case: str) -> float:
        peer.stdin.write(case + "\n")
        peer.stdin.flush()
        return float(json.loads(peer.stdout.readline()))

    print(f"{args.size}x{args.size}, r = {args.rank}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| case | peer, ms | here, ms | peer / here |\n|---|---|---|---|")
    rows = [(case, lambda case=case: ask(case)) for case in own if case not in ("step, batch 128", "nn.Linear")]
    rows.append(("step, batch 128", lambda: seconds(own["nn.Linear"])))
    for case, time_peer in rows:
        time_peer(), seconds(own[case])
        pairs = [(time_peer(), seconds(own[case])) for _ in range(args.rounds)]
        there, here = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        name = case + (" (peer: nn.Linear + SGD)" if case.startswith("step") else "")
        print(f"| {name} | {there:.1f} | {here:.1f} | {statistics.median(t / h for t, h in pairs):.2f} |", flush=True)
    peer.stdin.close()
    peer.wait()


if __name__ == "__main__":
    main()
