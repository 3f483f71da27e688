"""Scikit-learn's 1,797 real 8x8 scans of handwritten digits, with a fixed split."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override


class DigitsDataModule(pl.LightningDataModule):
    """The digits as images ``[1, 8, 8]`` with labels 0 to 9; nothing is downloaded.

    The split belongs to ``split_seed`` alone, so that every run of every seed is tested on the same scans.

    Args:
        batch_size: Scans in a batch.
        val_size: Scans held out for choosing settings and checkpoints.
        test_size: Scans held out for the final accuracy.
        standardise: Subtract the training set's mean scan and divide by its standard deviation (one number); otherwise
            pixels are in [0, 1].
        split_seed: Seed of the split.
        drop_last: Leave out the smaller last batch of an epoch: one shape for all steps.
    """

    def __init__(
        self,
        batch_size: int = 32,
        val_size: int = 240,
        test_size: int = 360,
        standardise: bool = True,
        split_seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        self.batch_size, self.val_size, self.test_size = batch_size, val_size, test_size
        self.standardise, self.split_seed, self.drop_last = standardise, split_seed, drop_last

    @override
    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
        labels = torch.tensor(digits.target, dtype=torch.int64)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        test, val, train = order.split([self.test_size, self.val_size, len(labels) - self.test_size - self.val_size])
        if self.standardise:
            centred = images - images[train].mean(0)
            images = centred / centred[train].std()
        self.train, self.val, self.test = (TensorDataset(images[part], labels[part]) for part in (train, val, test))

    @override
    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=240)

    @override
    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=360)
