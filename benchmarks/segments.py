"""What segments cost on CPU cores: step time against plain DDP, exchanged bytes, the tree kernel.

Usage:  python benchmarks/segments.py [--workers 1 2] [--models transformer conv] [--rounds 3] [--json out.json]
        python benchmarks/segments.py --bytes       the table of docs/segments.md instead
        python benchmarks/segments.py --profile     where a step of lrtt_ddp spends its time, one worker

Step times are CPU times of all workers per step (wall time means little on a shared machine), with LR-TT tiles on
both sides, 64 rows a segment, fits interleaved; the median of the rounds' ratios is printed with the bound: 1.15, times
ceil(12 / W) * W / 12 where W does not divide 12. Every group of workers has ``--limit`` seconds; results come as they are
known. Exit status 1 if a group failed; ratios are only printed, as other work on the machine moves them.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from segments_gpu import DIGITAL, PULSED, Report, train, tree_kernel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from worker_group import GroupError, group

from lightning_lrtt import LRTTDDPStrategy

BOUND = 1.15
WARM = 2  # steps that are not counted


class CpuTime(Callback):
    """Process time at the end of each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """One more."""
        self.marks.append(time.process_time())

    def ms(self) -> float:
        """Median of the steps after the first ones."""
        marks = self.marks[WARM:]
        return 1e3 * statistics.median(b - a for a, b in pairwise(marks))


def steps_of(rank: int, workers: int, models: list[str], rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """CPU ms of one worker's steps."""
    for round_ in range(rounds):
        for name in models:
            for how in ("ddp", "lrtt_ddp"):
                clock = CpuTime()
                train(name, DIGITAL, workers, "cpu", 64, steps, how, callbacks=[clock], exchange="auto")
                yield {"model": name, "strategy": how, "round": round_, "cpu_ms": clock.ms()}


def profiled(rank: int, workers: int, models: list[str], steps: int) -> Iterator[str]:
    """The functions that take most of a fit's time."""
    for name in models:
        profile = cProfile.Profile()
        profile.enable()
        train(name, DIGITAL, workers, "cpu", 64, steps, exchange="auto")
        profile.disable()
        stats = pstats.Stats(profile)
        stats.sort_stats("tottime")
        for function in stats.fcn_list[:25]:  # type: ignore[attr-defined]
            calls, _, own, total, _ = stats.stats[function]  # type: ignore[attr-defined]
            file, line, what = function
            yield f"{name}: {own:7.3f} s own {total:7.3f} s in all {calls:7d} calls  {file.rpartition('/')[2]}:{line} {what}"


class Wide(pl.LightningModule):
    """One 4096 x 4096 layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4096, 4096, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Mean square."""
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Sizes(Callback):
    """What the step exchanged."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Of the last step."""
        fit = trainer.strategy.fit
        self.seen = {
            "gradient": fit.reducer.gradient_bytes,
            "operands": fit.reducer.operand_bytes,
            "sent": fit.last_bytes_sent,
        }


def bytes_of(rank: int, workers: int) -> Iterator[dict[str, Any]]:
    """One step of the 4096 x 4096 layer as a dense layer, on a digital and on a pulsed tile."""
    for name, config in (("dense", None), ("digital", DIGITAL), ("pulsed", replace(PULSED, rank=8))):
        pl.seed_everything(1, verbose=False)
        sizes = Sizes()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=workers,
            strategy=LRTTDDPStrategy(config=config, timeout=120, exclude=None if config else ["*"]),
            max_steps=1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[sizes],
        )
        trainer.fit(Wide(), DataLoader(TensorDataset(torch.randn(768, 4096)), batch_size=768, drop_last=True))
        yield {"layer": "4096x4096, r=8, 768 rows", "workers": workers, "mode": name, **sizes.seen}


def bound(workers: int) -> float:
    """The largest ratio that is asked for: workers with fewer segments wait for those with more."""
    return BOUND * -(-12 // workers) * workers / 12


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=["transformer", "conv", "mlp"], default=["transformer", "conv"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one group of workers")
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    report, failed = Report(args.json), False
    if args.profile:
        for _, line in group(1, profiled, args.models, args.steps, limit=args.limit):
            sys.stdout.write(line + "\n")
        return
    for workers in args.workers:
        found: dict[tuple[str, str], list[float]] = {}
        try:
            if args.bytes:
                for rank, line in group(workers, bytes_of, limit=args.limit):
                    if rank == 0:
                        report.add(line)
                continue
            rows: dict[tuple[str, str, int], list[float]] = {}
            for _, line in group(workers, steps_of, args.models, args.rounds, args.steps, limit=args.limit):
                own = rows.setdefault((line["model"], line["strategy"], line["round"]), [])
                own.append(line["cpu_ms"])
                if len(own) == workers:
                    found.setdefault((line["model"], line["strategy"]), []).append(sum(own))
                    report.add({**line, "cpu_ms": round(sum(own), 1), "workers": workers})
        except GroupError as error:
            failed = True
            report.add({"error": str(error)})
        for name in args.models:
            ddp, ours = (found.get((name, how), []) for how in ("ddp", "lrtt_ddp"))
            if ddp and ours:
                ratios = [b / a for a, b in zip(ddp, ours, strict=False)]
                report.add(
                    {
                        "model": name,
                        "workers": workers,
                        "ddp_ms": [round(t, 1) for t in ddp],
                        "lrtt_ddp_ms": [round(t, 1) for t in ours],
                        "ratio": round(statistics.median(ratios), 3),
                        "bound": round(bound(workers), 3),
                    }
                )
    if not args.bytes:
        torch.set_num_threads(1)
        for line in tree_kernel((4_096, 16_384, 10_000_000), "cpu"):
            report.add(line)
    sys.exit(failed)


if __name__ == "__main__":
    main()
