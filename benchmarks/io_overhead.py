"""What reading through converters costs: the same training step with and without them, of one layer.

Forward, backward with the gradient of the input, and the optimizer's step. Contenders take turns step by step, so that
what disturbs one disturbs all; the table has medians and the fastest step, and the median of the ratios of a turn's
steps and the ratio of the fastest. With one thread on the CPU time is CPU time of the process, which other users of the
machine disturb less than the clock on the wall.

    python benchmarks/io_overhead.py --threads 2                       # 1024x1024, batch 128, rank 8, on the CPU
    python benchmarks/io_overhead.py --device cuda --batch 4096 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from lightning_lrtt import LRTT, IOConfig, LRTTConfig, build_info, devices
from lightning_lrtt.nn import LRTTLinear

SOFT = devices.SoftBounds(dw_min=5e-4, w_max=1.0, w_min=-1.0)
READS: dict[str, IOConfig | None] = {
    "exact": None,
    "converters": IOConfig(),
    "no bound management": IOConfig(bound_management="none"),
    "worst case": IOConfig(bound_management="iterative_worst_case"),
    "all noise": IOConfig(inp_noise=0.01, w_noise=0.01, inp_sto_round=True, out_sto_round=True),
}


class Step:
    """One layer, its optimizer and a batch."""

    def __init__(self, io: IOConfig | None, args: argparse.Namespace) -> None:
        device = SOFT if args.pulsed else None
        config = LRTTConfig(rank=args.rank, io=io, fast_device=device, visible_device=device, reinit_gain=0.05)
        torch.manual_seed(0)
        self.layer = LRTTLinear(args.size, args.size, config=config, device=args.device, tile=0)
        self.optimizer = LRTT(self.layer.parameters(), lr=1e-3)
        self.x = torch.randn(args.batch, args.size, device=args.device, requires_grad=True)
        own = args.device == "cpu" and args.threads == 1
        self.clock = time.process_time if own else time.perf_counter
        self.d = torch.randn(args.batch, args.size, device=args.device) / args.size

    def __call__(self) -> float:
        """Seconds of one step."""
        start = self.clock()
        self.optimizer.zero_grad()
        self.x.grad = None
        self.layer(self.x).backward(self.d)
        self.optimizer.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return self.clock() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pulsed", action="store_true", help="A, B and C on SoftBounds devices")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    contenders = {name: Step(io, args) for name, io in READS.items()}
    names, seconds = list(contenders), {name: [] for name in contenders}
    for turn in range(args.steps + 10):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = contenders[name]()
            if turn >= 10:
                seconds[name].append(taken)
    rows = {
        name: {
            "ms": 1e3 * statistics.median(times),
            "fastest": 1e3 * min(times),
            "ratio": statistics.median(t / e for t, e in zip(times, seconds["exact"], strict=True)),
            "ratio of fastest": min(times) / min(seconds["exact"]),
        }
        for name, times in seconds.items()
    }
    where = (
        torch.cuda.get_device_name()
        if args.device != "cpu"
        else f"CPU, {args.threads} threads, {build_info()['cpu_instructions']}"
    )
    print(
        f"{args.size}x{args.size}, batch {args.batch}, rank {args.rank}, "
        f"{'pulsed' if args.pulsed else 'digital'} tile, {where}, "
        f"torch {torch.__version__}, {args.steps} steps"
    )
    print("| reads | ms a step (fastest) | ratio (of the fastest) |\n|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['ms']:.2f} ({row['fastest']:.2f}) | {row['ratio']:.2f} ({row['ratio of fastest']:.2f}) |"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
