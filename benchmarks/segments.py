"""What segments cost on this machine: step time against plain DDP, exchanged bytes.

Usage:  python benchmarks/segments.py [--workers 1 2] [--rounds 3] [--bytes] [--json out.json]

Step times are CPU times of all workers per step (wall time means little on a shared machine), with LR-TT tiles on
both sides, 64 rows a segment, runs interleaved; the median of the rounds' ratios is printed. ``--bytes`` measures the
table of docs/segments.md instead.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from segments_gpu import DIGITAL, PULSED, Model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTTDDPStrategy, convert_to_lrtt


class CpuTime(Callback):
    """Process time of each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """One more."""
        self.marks.append(time.process_time())


class Wide(pl.LightningModule):
    """One 4096 x 4096 layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shape = nn.Linear(4096, 4096, bias=False), (4096,)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Mean square."""
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(model: Any, config: Any, workers: int, plain: bool, rows: int, steps: int) -> tuple[float, Any]:
    """CPU seconds a step, and the strategy's sizes."""
    pl.seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    batch, clock, seen = 12 * rows, CpuTime(), {}
    if plain:
        convert_to_lrtt(model, config)
        strategy: Any = DDPStrategy()
    else:
        strategy = LRTTDDPStrategy(config=config, timeout=120, exclude=None if config else ["*"])

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if not plain:
                reducer = trainer.strategy.fit.reducer
                seen.update(gradient=reducer.gradient_bytes, operands=reducer.operand_bytes)

    data = TensorDataset(torch.randn(batch, *model.shape), torch.randint(10, (batch,)))
    loader = DataLoader(data, batch_size=batch // workers if plain else batch, drop_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=workers,
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, Look()],
    )
    trainer.fit(model, loader)
    pairs = list(zip(clock.marks[2:], clock.marks[3:], strict=False))
    return statistics.median([b - a for a, b in pairs]) if pairs else 0.0, seen


def work(rank: int, workers: int, port: int, rounds: int, steps: int, bytes_: bool, folder: str) -> None:
    """One worker."""
    warnings.simplefilter("ignore")
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    results: list[Any] = []
    if bytes_:
        from dataclasses import replace

        for name, config in (("dense", None), ("digital", DIGITAL), ("pulsed", replace(PULSED, rank=8))):
            results.append((name, train(Wide(), config, workers, False, 64, 1)[1]))
    else:
        for _ in range(rounds):
            for name in ("conv", "transformer", "mlp"):
                for plain in (True, False):
                    results.append((name, plain, train(Model(name), DIGITAL, workers, plain, 64, steps)[0]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    report: list[dict[str, Any]] = []
    for workers in args.workers:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                work, (workers, port, args.rounds, args.steps, args.bytes, folder), nprocs=workers
            )
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(workers)]
        if args.bytes:
            report += [
                {"workers": workers, "layer": "4096x4096, r=8", "mode": name, **sizes} for name, sizes in ranks[0]
            ]
            continue
        for name in ("conv", "transformer", "mlp"):
            total = {
                plain: [
                    sum(t) for t in zip(*([r[2] for r in own if r[:2] == [name, plain]] for own in ranks), strict=True)
                ]
                for plain in (True, False)
            }
            ratios = [b / a for a, b in zip(total[True], total[False], strict=True)]
            report.append(
                {
                    "model": name,
                    "workers": workers,
                    "ddp_ms": 1e3 * statistics.median(total[True]),
                    "lrtt_ddp_ms": 1e3 * statistics.median(total[False]),
                    "ratio": round(statistics.median(ratios), 3),
                }
            )
    for line in report:
        sys.stdout.write(json.dumps(line) + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
