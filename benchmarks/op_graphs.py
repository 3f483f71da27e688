"""What CUDA graphs make of whole training steps: in a bare loop and through the Trainer, beside peers."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import contenders as c
import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_lrtt.callbacks import CUDAGraph
from measure import Options, Row, Step, in_turn, owning, relate, say
from torch import Tensor, nn

from lightning_lrtt import LRTT, LRTTStrategy
from lightning_lrtt.graphs import CudaRecorder, GraphCaptureError

LR = 0.01


def layers(o: Options) -> nn.Sequential:
    """Square linear layers and tanh."""
    with torch.device(o.device):
        return nn.Sequential(*[m for _ in range(o.layers) for m in (nn.Linear(o.width, o.width), nn.Tanh())])


# ---------------------------------------------------------------- a bare loop


class _Nothing:
    """What the recorder's function returns: no output that anybody reads."""

    def tensors(self) -> list[Tensor]:
        return []


def recorded(step: Step, optimizer: LRTT | None, device: str) -> Step:
    """The step as one graph, as docs/graphs.md tells: lr comes from device memory and is refreshed before every replay."""
    recorder = CudaRecorder(torch.device(device))

    def once() -> _Nothing:
        if optimizer is None:
            step()
        else:
            with optimizer.lr_held():
                step()
        return _Nothing()

    if optimizer is not None:
        optimizer.refresh_lr()
    for _ in range(3):
        recorder.eager(once)
    replay: Step = recorder.record(once).replay

    def run() -> None:
        if optimizer is not None:
            optimizer.refresh_lr()
        replay()

    return owning(run, step)


# ---------------------------------------------------------------- through the Trainer


class _Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).float().square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR, fused=next(self.parameters()).is_cuda)


class Clock(pl.Callback):
    """Milliseconds a step from step ``skip`` on, the device waited for at both ends."""

    def __init__(self, skip: int, device: str) -> None:
        self.skip, self.device, self.ms = skip, device, 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.skip:
            self.start = self._now()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.ms = (self._now() - self.start) / (trainer.num_training_batches - self.skip)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()


class Batches:
    """``count`` batches: those given, over and over."""

    def __init__(self, batches: list[Any], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i % len(self.batches)] for i in range(self.count))


def fit(
    module: pl.LightningModule,
    batches: list[Any],
    strategy: Any,
    skip: int,
    steps: int,
    device: str,
    precision: Any = "32-true",
    graph: CUDAGraph | None = None,
) -> float:
    """Milliseconds a step of one epoch of ``skip + steps`` batches, without logger, progress bar and checkpoints."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = Clock(skip, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=precision,
            max_epochs=1,
            barebones=True,
            callbacks=[clock, *([graph] if graph is not None else [])],
        )
        trainer.fit(module, Batches(batches, skip + steps))
    return clock.ms


def through_trainer(
    o: Options, name: str, device: Any, scope: Any, batches: list[Any], precision: str, rounds: int
) -> Row:
    """One row: the same step under the strategy lrtt, all of Lightning's loop and the batch's transfer included."""
    row = Row(name)
    if scope is not None and o.device != "cuda":
        row.missing = "CUDA graphs need a GPU"
        return row
    times = []
    for _ in range(rounds):
        graph = None if scope is None else CUDAGraph(scope=scope, on_failure="raise")
        strategy = LRTTStrategy(c.config(device, o.rank, o.transfer_every))
        skip = o.transfer_every if o.quick else 16
        steps = 2 * o.transfer_every
        try:
            times.append(fit(_Module(layers(o)), batches, strategy, skip, steps, o.device, precision, graph))
        except (MisconfigurationException, GraphCaptureError) as why:
            row.missing = str(why)
            return row
        if graph is not None:
            row.more = {"replays": graph.replays, "captures": graph.captures}
    row.ms = statistics.median(times)
    say(f"{name}: {row.ms:.3f} ms")
    return row


# ---------------------------------------------------------------- operations


def small(o: Options) -> Iterator[Row]:
    """24 layers of 512 at batch 64: captured beside its own eager form, plain PyTorch, torch.compile, AdamW and LoRA."""
    torch.manual_seed(0)
    backend, of_it = c.backend(o.quick)
    every, rank = o.transfer_every, o.rank
    trainings: dict[str, Callable[[], c.Training]] = {
        "LR-TT pulsed": lambda: c.lrtt(layers(o), c.SOFT, rank, every, LR),
        "LR-TT digital": lambda: c.lrtt(layers(o), None, rank, every, LR),
        "dense, fused AdamW": lambda: c.adamw(layers(o)),
        "LoRA (peft), fused AdamW": lambda: c.peft_lora(layers(o), rank),
        "LoRA (PyTorch), fused AdamW": lambda: c.lora(layers(o), rank),
    }
    rows = list(_bare(o, trainings, torch.float32, backend, of_it))
    _ratios(rows)
    yield from rows
    data = [[torch.randn(o.batch, o.width)] for _ in range(8)]
    through = []
    for kind, device in (("pulsed", c.SOFT), ("digital", None)):
        for name, scope in (("eager", None), ("tiles' update captured", "optimizer"), ("captured", "step")):
            label = f"Trainer, LR-TT {kind}, {name}"
            through.append(through_trainer(o, label, device, scope, data, "32-true", 1 if o.quick else 3))
        eager = through[-3].ms
        for row in through[-2:]:
            if row.ms is not None and eager:
                row.more = {"eager / this": eager / row.ms} | row.more
    yield from through


def large(o: Options) -> Iterator[Row]:
    """Layers of 4096 at batch 4096 under bf16 autocast: where a graph gains nothing it must not cost anything."""
    torch.manual_seed(0)
    every, rank = o.transfer_every, o.rank
    trainings: dict[str, Callable[[], c.Training]] = {
        "LR-TT pulsed": lambda: c.lrtt(layers(o), c.SOFT, rank, every, LR),
        "LR-TT digital": lambda: c.lrtt(layers(o), None, rank, every, LR),
        "dense, fused AdamW": lambda: c.adamw(layers(o)),
    }
    rows = list(_bare(o, trainings, torch.bfloat16, None, ""))
    _ratios(rows)
    yield from rows
    data = [[torch.randn(o.batch, o.width, device=o.device)]]  # the step is measured, not the upload
    for kind, device in (("pulsed", c.SOFT), ("digital", None)):
        eager = through_trainer(
            o, f"Trainer, LR-TT {kind}, eager", device, None, data, "bf16-mixed", 1 if o.quick else 3
        )
        label = f"Trainer, LR-TT {kind}, captured"
        graph = through_trainer(o, label, device, "step", data, "bf16-mixed", 1 if o.quick else 3)
        if graph.ms is not None and eager.ms:
            graph.more = {"eager / this": eager.ms / graph.ms} | graph.more
        yield from (eager, graph)


def _bare(
    o: Options,
    trainings: dict[str, Callable[[], c.Training]],
    dtype: torch.dtype,
    backend: str | None,
    of_it: str,
) -> Iterator[Row]:
    """Every training in a bare loop, eager and captured; with ``backend`` also LR-TT in plain PyTorch, and compiled."""
    autocast = o.autocast if dtype == torch.bfloat16 else contextlib.nullcontext
    x = torch.randn(o.batch, o.width, device=o.device)
    runs: dict[str, list[Step]] = {}
    rows: dict[str, Row] = {}
    for name, build in trainings.items():
        for form in ("eager", "captured"):
            label = f"{name}, {form}"
            row = rows[label] = Row(label)
            row.flops = (6 if name.startswith("dense") else 4) * o.layers * o.batch * o.width**2
            weights = 4 * o.layers * o.width**2
            row.bytes = weights * (6 if name.startswith("dense") else 1)
            if form == "captured" and o.device != "cuda":
                row.missing = "CUDA graphs need a GPU"
                continue
            try:
                training = build()
            except c.Missing as why:
                row.missing = str(why)
                continue
            step = c.step_of_loss(training, x, autocast)
            tiles = training[1] if isinstance(training[1], LRTT) else None
            if form == "captured":
                step = recorded(step, tiles, o.device)
            runs[label] = [step] * o.transfer_every
            say(f"{label} is ready")
    if backend is not None:
        for label in ("eager PyTorch LR-TT, digital", of_it):
            training = c.reference(layers(o), o.rank, o.transfer_every, LR)
            if label == of_it:
                training = c.compiled(training, backend)
            step = c.step_of_loss(training, x, autocast)
            step()
            runs[label], rows[label] = [step] * o.transfer_every, Row(label)
            rows[label].flops, rows[label].bytes = (
                rows["LR-TT digital, eager"].flops,
                rows["LR-TT digital, eager"].bytes,
            )
            say(f"{label} is ready")
    times = in_turn(runs, o.rounds, o.device, [name for name in runs if name.endswith("captured")])
    for label, found in times.items():
        rows[label].ms, rows[label].worst = found.median, found.worst
    yield from rows.values()


def _ratios(rows: list[Row]) -> None:
    """Every captured row beside its own eager form and the plain PyTorch reference."""
    by_name = {row.name: row.ms for row in rows}
    relate(rows, "dense, fused AdamW, eager", "/ dense eager")
    for row in rows:
        if row.ms is None or not row.name.endswith("captured"):
            continue
        for label, other in (
            ("eager / this", row.name.replace("captured", "eager")),
            ("plain PyTorch / this", "eager PyTorch LR-TT, digital"),
        ):
            if base := by_name.get(other):
                row.more[label] = base / row.ms
