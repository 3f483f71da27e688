"""What a step costs under the strategy lrtt, under the stock strategy, and in a hand-written loop: docs/performance.md.

The digits MLP (64-128-10), the same tiles, data and optimizer everywhere, no logging, no progress bar, no checkpoints.
Time is CPU time of the process, which other users of the machine disturb less than the clock on the wall; with one
thread and nothing to wait for the two are the same on a quiet machine. Contenders take turns, so that what disturbs one
disturbs all. Of each contender the table has the fastest round and, in brackets, the median; ratios are of the fastest
rounds, with the median of the ratios within a round in brackets.

    python benchmarks/strategy_overhead.py                     # digital and pulsed tiles, batch 64
    python benchmarks/strategy_overhead.py --rounds 5 --json out.json
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTT, LRTTConfig, LRTTStrategy, convert_to_lrtt, devices

SOFT = devices.SoftBounds(dw_min=5e-4, dw_min_dtod=0.3, dw_min_std=0.3, w_max=1.0, w_min=-1.0)
CONFIGS: dict[str, LRTTConfig | None] = {
    "no tiles": None,
    "digital": LRTTConfig(rank=8, transfer_every=32),
    "pulsed": LRTTConfig(rank=8, transfer_every=64, fast_device=SOFT, visible_device=SOFT),
}


class Classifier(pl.LightningModule):
    """The digits MLP with SGD; ``own`` makes it bring its tiles and `LRTT` itself."""

    def __init__(self, own: LRTTConfig | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.own = own
        if own is not None:
            convert_to_lrtt(self.net, own)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(self.parameters(), lr=0.05)
        return sgd if self.own is None else LRTT(digital=sgd)


class Clock(pl.Callback):
    """CPU time from the first batch to the end of training."""

    def on_train_start(self, *args: Any) -> None:
        self.start = time.process_time()

    def on_train_end(self, *args: Any) -> None:
        self.seconds = time.process_time() - self.start


def data(steps: int, batch_size: int) -> DataLoader:
    """As many batches as steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps * batch_size, 64, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(10, (len(x),), generator=generator)), batch_size)


def by_hand(config: LRTTConfig | None, steps: int, batch_size: int) -> float:
    """Seconds of a loop as one writes it in plain PyTorch."""
    module = Classifier(config)
    net, optimizer, loader = module.net, module.configure_optimizers(), data(steps, batch_size)
    start = time.process_time()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return time.process_time() - start


def by_trainer(module: Classifier, strategy: Any, steps: int, batch_size: int) -> float:
    """Seconds of `fit` between on_train_start and on_train_end."""
    clock = Clock()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(steps, batch_size))
    return clock.seconds


def contenders(config: LRTTConfig | None) -> dict[str, Callable[[int, int], float]]:
    """What is compared, with the same tiles."""
    found: dict[str, Callable[[int, int], float]] = {
        "loop": lambda steps, size: by_hand(config, steps, size),
        "Trainer, stock strategy": lambda steps, size: by_trainer(Classifier(config), "auto", steps, size),
    }
    if config is not None:
        found["Trainer, lrtt"] = lambda steps, size: by_trainer(Classifier(), LRTTStrategy(config), steps, size)
    return found


def measure(config: LRTTConfig | None, rounds: int, steps: int, batch_size: int) -> dict[str, list[float]]:
    """Microseconds a step by contender, one number a round; the order turns from round to round."""
    runs = contenders(config)
    names = list(runs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run(20, batch_size)  # imports, caches, allocator
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(runs[name](steps, batch_size) / steps * 1e6)
    return found


def ratio(one: list[float], other: list[float]) -> str:
    """Of the fastest rounds, and the median of the ratios within a round."""
    paired = statistics.median(a / b for a, b in zip(one, other, strict=True))
    return f"{min(one) / min(other):.3f} ({paired:.3f})"


def main() -> None:
    """Measure all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiles", nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--json", type=Path, default=None, help="write all single figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    everything = {}
    print(
        "| tiles | loop, µs a step | Trainer, stock strategy | Trainer, lrtt "
        "| lrtt / stock | lrtt / loop | stock / loop |"
    )
    print("|---|---|---|---|---|---|---|")
    for tiles in args.tiles:
        found = everything[tiles] = measure(CONFIGS[tiles], args.rounds, args.steps, args.batch_size)
        middle = {name: f"{min(values):.0f} ({statistics.median(values):.0f})" for name, values in found.items()}
        loop, stock, ours = found["loop"], found["Trainer, stock strategy"], found.get("Trainer, lrtt")
        ratios = [ratio(ours, stock), ratio(ours, loop)] if ours else ["", ""]
        columns = [middle["loop"], middle["Trainer, stock strategy"], middle.get("Trainer, lrtt", ""), *ratios]
        print("| " + " | ".join([tiles, *columns, ratio(stock, loop)]) + " |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"args": vars(args) | {"json": str(args.json)}, "us": everything}, indent=1))


if __name__ == "__main__":
    main()
