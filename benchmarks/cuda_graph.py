"""What CUDA graphs make of a step of many small layers: eager, the tiles' update captured, the whole step captured.

A 24-layer MLP of 512 at batch 64 under the strategy lrtt, without logger, progress bar and checkpoints, all of
Lightning's loop and the transfer of the batch included; beside them the same step in a bare loop, eager and captured.
One round of each contender after the other, so that what disturbs one disturbs all; the median of the rounds, in ms a
step.

    python benchmarks/cuda_graph.py
    python benchmarks/cuda_graph.py --layers 2 --width 4096 --batch 4096 --json out.json
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_lrtt.callbacks import CUDAGraph
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTT, LRTTConfig, LRTTStrategy, convert_to_lrtt, devices
from lightning_lrtt.graphs import CudaRecorder

SOFT = devices.SoftBounds(dw_min=1e-3)
CONFIGS = {"digital": LRTTConfig(rank=8), "pulsed": LRTTConfig(rank=8, fast_device=SOFT, visible_device=SOFT)}
SKIP, STEPS = 20, 200


class Deep(pl.LightningModule):
    """Linear layers and tanh."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())])

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(pl.Callback):
    """Milliseconds a step from step `SKIP` on, the device waited for at both ends."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == SKIP:
            torch.cuda.synchronize()
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        torch.cuda.synchronize()
        self.milliseconds = 1e3 * (time.perf_counter() - self.start) / STEPS


class _Again:
    """The same batch at every step."""

    def __init__(self, batch: list[Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return SKIP + STEPS

    def __iter__(self) -> Iterator[list[Tensor]]:
        return (self.batch for _ in range(len(self)))


def lightning(config: LRTTConfig, scope: str | None, options: argparse.Namespace) -> float:
    """One round through the Trainer."""
    clock = Clock()
    graphs = [] if scope is None else [CUDAGraph(scope=scope, on_failure="raise")]  # type: ignore[arg-type]
    trainer = pl.Trainer(
        strategy=LRTTStrategy(config=config),
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        barebones=True,
        callbacks=[clock, *graphs],
    )
    if options.batch <= 256:
        data = torch.randn(options.batch * (SKIP + STEPS), options.width)
        loader: Any = DataLoader(TensorDataset(data), batch_size=options.batch)
    else:  # what is measured is the step: one batch serves, and it is on the device already
        loader = _Again([torch.randn(options.batch, options.width, device="cuda")])
    trainer.fit(Deep(options.layers, options.width), loader)
    return clock.milliseconds


def bare(config: LRTTConfig, captured: bool, options: argparse.Namespace) -> float:
    """One round of a loop without Lightning."""
    model = convert_to_lrtt(Deep(options.layers, options.width).net, config).cuda()
    optimizer = LRTT(digital=torch.optim.SGD(model.parameters(), lr=0.01, fused=True))
    x = torch.randn(options.batch, options.width, device="cuda")

    class Nothing:
        def tensors(self) -> list[Tensor]:
            return []

    def step() -> Nothing:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        with optimizer.lr_held():
            optimizer.step()
        return Nothing()

    recorder = CudaRecorder(torch.device("cuda", 0))
    optimizer.refresh_lr()
    for _ in range(SKIP):
        recorder.eager(step)
    run: Callable[[], Any] = recorder.record(step).replay if captured else step
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.refresh_lr()
        run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    table: dict[str, dict[str, float]] = {}
    for name, config in CONFIGS.items():
        contenders: dict[str, Callable[[], float]] = {
            "Trainer, eager": lambda c=config: lightning(c, None, options),
            "Trainer, scope optimizer": lambda c=config: lightning(c, "optimizer", options),
            "Trainer, scope step": lambda c=config: lightning(c, "step", options),
            "bare loop, eager": lambda c=config: bare(c, False, options),
            "bare loop, captured": lambda c=config: bare(c, True, options),
        }
        rounds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(options.rounds):
            for contender, run in contenders.items():
                rounds[contender].append(run())
        table[name] = {contender: statistics.median(times) for contender, times in rounds.items()}
        for contender, value in table[name].items():
            print(f"{name:8} {contender:26} {value:8.3f} ms")
    if options.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        sizes = {name: getattr(options, name) for name in ("layers", "width", "batch", "rounds")}
        options.json.write_text(json.dumps(about | sizes | {"ms": table}, indent=1))


if __name__ == "__main__":
    main()
