"""The digits' embeddings and the LightningModule of the example."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from examples.geometric_retrieval.geometry import GivensRotor
from lightning_lrtt import _check
from lightning_lrtt.free_nudged import FreeNudgedModule


class EmbeddingsDataModule(pl.LightningDataModule):
    """Scikit-learn's digits as n coordinates: whitened principal components and pure noise, then turned by a rotor.

    A fixed Euclidean metric counts the noise like everything else; a learned one need not.

    Args:
        n: Coordinates.
        noise: How many of them are noise before the rotation.
        noise_scale: Standard deviation of the noise (components have 1).
        angle: Largest angle of the rotor's n random turns, in radians, >= 0; 0 leaves the noise on axes of its own.
        batch_size: Windows in a batch.
        seed: Of the split, the noise and the rotation.
        drop_last: Leave out the smaller last batch of an epoch.
    """

    def __init__(
        self,
        n: int = 8,
        noise: int = 2,
        noise_scale: float = 1.0,
        angle: float = 0.3,
        batch_size: int = 32,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        _check.number("EmbeddingsDataModule", "angle", angle, low=0.0)
        _check.integer("EmbeddingsDataModule", "noise", noise, low=0, high=n - 1)
        self.n, self.noise, self.noise_scale, self.angle = n, noise, noise_scale, angle
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last

    @override
    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16.0
        labels = torch.tensor(digits.target, dtype=torch.int64)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator)
        test, val, train = order.split([360, 240, len(labels) - 600])
        centred = images - images[train].mean(0)
        _, _, directions = torch.linalg.svd(centred[train], full_matrices=False)
        parts = centred @ directions[: self.n - self.noise].t()
        parts = parts / parts[train].std(0)
        noise = self.noise_scale * torch.randn(len(labels), self.noise, generator=generator)
        angles = self.angle * (2 * torch.rand(self.n, generator=generator) - 1)
        x = GivensRotor(self.n, self.n)(torch.cat([parts, noise], 1), angles).detach()
        self.train, self.val, self.test = (TensorDataset(x[part], labels[part]) for part in (train, val, test))

    @override
    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=120)

    @override
    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=120)


class GeometricModule(FreeNudgedModule):
    """Learns the metric by two windows from the same start (``nudge_from="start"``); ``lr`` 0 keeps it fixed.

    Args:
        lr: eta of metric and angles, >= 0.
        window: Steps of a window.
        nudge_every_windows: Learn in every how many-th window; the others only retrieve and remember.
        step_progress_every: Log LIoR at every so many steps of a window, at Lightning's logging steps (read once, at
            the window's end); None: never.
        **kwargs: As `FreeNudgedModule`, but for the window's length and ``nudge_from``.
    """

    lior: Tensor

    def __init__(
        self,
        lr: float = 0.01,
        window: int = 64,
        nudge_every_windows: int = 1,
        step_progress_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(free_steps=window, nudged_steps=window, nudge_from="start", **kwargs)
        _check.number("GeometricModule", "lr", lr, low=0.0)
        _check.integer("GeometricModule", "nudge_every_windows", nudge_every_windows, low=1)
        if step_progress_every is not None:
            _check.integer("GeometricModule", "step_progress_every", step_progress_every, low=1, high=window)
        self.lr, self.nudge_every_windows, self.step_progress_every = lr, nudge_every_windows, step_progress_every
        self.val_acc = MulticlassAccuracy(10, average="micro")
        self.test_acc = MulticlassAccuracy(10, average="micro")
        self.register_buffer("lior", torch.zeros(window), persistent=False)
        # A mode of a module rather than a number: steps of another mode have a CUDA graph of their own.
        self.learning = torch.nn.Identity()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.learning.train(batch_idx % self.nudge_every_windows == 0)

    @override
    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor | None:
        x, target = self.unpack(batch)
        if not self.learning.training:
            states = self.engine.free(x)
            self.system.commit(x=x, states=states, target=self.system.encode(target=target))
            return None  # Lightning skips the optimizer's step
        outcome = self.engine.run(x, target, self.beta, self.statistics)
        if self.statistics:
            self._record(outcome)
        self.lior.copy_(outcome.free["lior"].mean(0))
        if self._trainer is not None:
            self.log("train/loss", outcome.cost, batch_size=len(x))
            self.log("train/lior", self.lior.sum(), batch_size=len(x))
        return self.engine.surrogate(x, outcome, self.beta)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.step_progress_every is None or not self.learning.training:
            return
        done = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        if (done + 1) % self.trainer.log_every_n_steps == 0:
            for step, value in enumerate(self.lior[:: self.step_progress_every].tolist()):
                for logger in self.loggers:
                    logger.log_metrics(
                        {"window/lior": value}, step=done * len(self.lior) + step * self.step_progress_every
                    )

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_acc(self(batch[0]), batch[1])
        self.log("val/acc", self.val_acc, prog_bar=True)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.test_acc(self(batch[0]), batch[1])
        self.log("test/acc", self.test_acc)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
