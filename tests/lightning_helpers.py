"""An ordinary LightningModule, data in a fixed order and a quiet Trainer, shared by the tests that run Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTTConfig, LRTTStrategy, devices

SOFT = devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0)
PULSED = LRTTConfig(rank=2, transfer_every=4, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT)
DIGITAL = LRTTConfig(rank=2, transfer_every=4)


class Net(pl.LightningModule):
    """Two layers and squared error; nothing about LR-TT."""

    def __init__(self, lr: float = 0.05, fail_at: int = -1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.lr, self.fail_at = lr, fail_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("on purpose")
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class InConfigureModel(Net):
    """Makes its layers late, as large models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loader(batches: int = 20) -> DataLoader:
    """Gaussian inputs, the same at every call, in order."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * batches, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].sin()), batch_size=4)


def trainer(tmp_path: Path, callbacks: list[Any], config: LRTTConfig | None = DIGITAL, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer with a TensorBoard logger."""
    defaults = {
        "max_epochs": 1,
        "log_every_n_steps": 5,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "logger": TensorBoardLogger(str(tmp_path), name="run", version=0),
        "strategy": "auto" if config is None else LRTTStrategy(config=config),
    }
    return pl.Trainer(callbacks=callbacks, **(defaults | kwargs))
