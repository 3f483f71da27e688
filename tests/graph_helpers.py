"""A LightningModule with everything that a replay must go on with, and runs of it to compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from helpers import same_bits
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_lrtt import LRTTConfig, LRTTStrategy


class Net(pl.LightningModule):
    """Dropout, batch norm, a metric, two logs and a schedule: everything that a replay must go on with."""

    def __init__(self, optimizer: str = "sgd", trap: str = "") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.error = MeanSquaredError()
        self.kind, self.trap = optimizer, trap

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.net(x)
        loss = (out - y).square().mean()
        if self.trap == "item" and loss.item() < 0:
            return None
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.error(out, y)
        self.log("train/error", self.error, on_step=True, on_epoch=True)
        self.log_dict({"train/largest": out.abs().max(), "train/mean": out.mean()}, reduce_fx="max")
        return {"loss": loss, "out": out}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", (self.net(x) - y).square().mean())

    def configure_optimizers(self) -> Any:
        if self.kind == "sgd":
            optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.1)
        elif self.kind == "lion":
            optimizer = Foreign(self.parameters(), lr=0.1)
        else:
            # As its device form is: eager and recorded steps must round alike.
            lr = torch.tensor(0.02, device=self.device)
            optimizer = torch.optim.AdamW(self.parameters(), lr=lr, capturable=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Foreign(torch.optim.SGD):
    """An optimizer that nobody knows."""


class Watch(Callback):
    """Every metric after every batch, and the extra output."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {name: v.detach().cpu().clone() for name, v in trainer.callback_metrics.items()}
        row |= {f"out/{k}": v.detach().cpu().clone() for k, v in outputs.items()}
        row |= {f"grad/{n}": p.grad.cpu().clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.seen.append(row)


def data(samples: int = 74) -> TensorDataset:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].sin())


def run(
    tmp_path: Path,
    config: LRTTConfig | None,
    callbacks: list[Any],
    module: Any = None,
    ckpt_path: str | None = None,
    train: Any = None,
    accelerator: str = "cpu",
    **kwargs: Any,
) -> tuple[Any, pl.Trainer, Watch]:
    """Fit four epochs of seven batches of 10 and one of 4; returns module, Trainer and what was seen.

    Without a ``config`` every layer stays digital. ``module`` makes the module, so that it is made after the seed is
    set; an instance is for runs not compared.
    """
    pl.seed_everything(0)
    module = Net() if module is None else module() if isinstance(module, (type, partial)) else module
    watch = Watch()
    options = {
        "max_epochs": 4,
        "log_every_n_steps": 7,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": accelerator,
        "devices": 1,
        "num_sanity_val_steps": 0,
    }
    trainer = pl.Trainer(
        strategy=LRTTStrategy(config=config, include=None if config is not None else []),
        callbacks=[watch, *callbacks],
        default_root_dir=str(tmp_path),
        **(options | kwargs),
    )
    train = DataLoader(data(), batch_size=10) if train is None else train
    trainer.fit(module, train, DataLoader(data(20), batch_size=10), ckpt_path=ckpt_path, weights_only=False)
    return module, trainer, watch


def assert_same_run(one: tuple[Any, pl.Trainer, Watch], other: tuple[Any, pl.Trainer, Watch]) -> None:
    """Model, optimizer state, progress and everything seen along the way: the same bits."""
    states = [m.state_dict() for m, _, _ in (one, other)]
    for name, value in states[0].items():
        assert same_bits(value, states[1][name]), name
    optimizers = [t.optimizers[0].state_dict()["state"] for _, t, _ in (one, other)]
    assert optimizers[0].keys() == optimizers[1].keys()
    for index, state in optimizers[0].items():
        for key, value in state.items():
            theirs = optimizers[1][index][key]
            assert theirs == value if not isinstance(value, torch.Tensor) else same_bits(value.cpu(), theirs.cpu()), key
    assert one[1].fit_loop.state_dict() == other[1].fit_loop.state_dict()
    assert len(one[2].seen) == len(other[2].seen)
    for step, (mine, theirs) in enumerate(zip(one[2].seen, other[2].seen, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert same_bits(value, theirs[name]), (step, name, value, theirs[name])


class Quiet(Net):
    """Logs tensors only: torchmetrics itself reads values, outside the graph but in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss}


class Rows(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append({**metrics, "step": step})

    def without_speed(self) -> list[dict[str, float]]:
        """The rows of everything but graphs and speed, in the order of their steps: rows may arrive late."""
        kept = [{k: v for k, v in row.items() if not k.startswith(("graph/", "perf/"))} for row in self.rows]
        return sorted((row for row in kept if len(row) > 1), key=lambda row: (row["step"], sorted(row)))
