"""What `TileMonitor` costs a step at the default logging interval, with everything it logs by default.

The digits MLP (64-128-10) and a wider one, trained for whole logging intervals with a TensorBoardLogger, with and without
the monitor; the one epoch ends with histograms and images. The two take turns, and the figure is the median
of the ratios within a round; the tables that are written once a run
are left out of the time, which runs from the second interval to the end of the epoch. On the CPU it is CPU time of the
process with all its threads, TensorBoard's writer included, which other users of the machine disturb less than the clock
on the wall; on a GPU it is the clock, with the device waited for at both ends.

    python benchmarks/monitor_overhead.py                    # CPU
    python benchmarks/monitor_overhead.py --device cuda      # GPU; also with CUDAGraph
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_lrtt.callbacks import CUDAGraph, TileMonitor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTTConfig, LRTTStrategy, devices

SOFT = devices.SoftBounds(dw_min=5e-4, dw_min_dtod=0.3, dw_min_std=0.3, w_max=1.0, w_min=-1.0)
CONFIGS = {
    "digital": LRTTConfig(rank=8, transfer_every=32),
    "pulsed": LRTTConfig(rank=8, transfer_every=64, fast_device=SOFT, visible_device=SOFT),
}


class Classifier(pl.LightningModule):
    """An MLP on random data; logs its loss."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        sizes = [64, *[width] * layers]
        hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Clock(pl.Callback):
    """Seconds from the first batch to the end of the last; first of the callbacks at the start, last at the end."""

    def __init__(self, device: bool) -> None:
        self.device = device
        self.start: float | None = None
        self.seconds = 0.0

    def _now(self) -> float:
        if not self.device:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.start is None and trainer.global_step >= 50:  # after the first interval: lazy initialisation
            self.start = self._now()

    def on_train_epoch_end(self, *args: Any) -> None:
        assert self.start is not None
        self.seconds = self._now() - self.start


def run(config: LRTTConfig, args: Any, width: int, batch: int, monitor: bool, graphs: bool) -> float:
    """Microseconds a step."""
    torch.manual_seed(0)
    steps = args.intervals * 50
    x = torch.randn(steps * batch, 64)
    loader = DataLoader(TensorDataset(x, torch.randint(10, (len(x),))), batch)
    clock = Clock(args.device == "cuda")
    callbacks = [clock, *([TileMonitor()] if monitor else []), *([CUDAGraph()] if graphs else [])]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            strategy=LRTTStrategy(config),
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(width, args.layers), loader)
    return clock.seconds / (steps - 50) * 1e6


def main() -> None:
    """Measure all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--intervals", type=int, default=20, help="logging intervals of 50 steps a round")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--sizes", nargs="*", default=["128x64", "512x256"], help="width x batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="write all single figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, torch {torch.__version__}, {args.rounds} rounds of {args.intervals} intervals of 50 steps\n")
    print("| tiles | width x batch | graphs | step, µs | with TileMonitor | cost, median of paired ratios |")
    print("|---|---|---|---|---|---|")
    everything = []
    for size in args.sizes:
        width, batch = map(int, size.split("x"))
        for name, config in CONFIGS.items():
            for graphs in (False, True) if args.device == "cuda" else (False,):
                plain, watched = [], []
                for i in range(args.rounds + 1):
                    for monitor in (False, True) if i % 2 else (True, False):
                        (watched if monitor else plain).append(run(config, args, width, batch, monitor, graphs))
                plain, watched = plain[1:], watched[1:]  # the first round warms up
                cost = statistics.median(b / a for a, b in zip(plain, watched, strict=True)) - 1
                middle = [statistics.median(x) for x in (plain, watched)]
                print(
                    f"| {name} | {size} | {'yes' if graphs else 'no'} | {middle[0]:.0f} | {middle[1]:.0f} | {cost:+.1%} |",
                    flush=True,
                )
                everything.append({"tiles": name, "size": size, "graphs": graphs, "plain": plain, "watched": watched})
    if args.json is not None:
        args.json.write_text(json.dumps({"where": where, "us": everything}, indent=1))


if __name__ == "__main__":
    main()
