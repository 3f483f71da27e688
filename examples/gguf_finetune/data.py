"""Python's own reference topics as bytes; and, for pretraining, the standard library's sources."""

from __future__ import annotations

import importlib
from pathlib import Path
from pydoc_data.topics import topics

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from examples.gguf_finetune.make import make_checkpoints
from lightning_lrtt import ResumableLoader

_SOURCES = (
    "argparse",
    "ast",
    "asyncio.base_events",
    "datetime",
    "difflib",
    "doctest",
    "email.message",
    "inspect",
    "logging",
    "pickle",
    "subprocess",
    "tarfile",
    "threading",
    "typing",
    "unittest.mock",
    "zipfile",
)


def to_bytes(text: str) -> Tensor:
    """``[n]`` int64."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def english() -> Tensor:
    """All topics of ``help()``: about 460,000 bytes of reference English."""
    return to_bytes("\n".join(topics[name] for name in sorted(topics)))


def sources() -> Tensor:
    """Code and comments of some modules of the standard library."""
    return to_bytes("".join(Path(importlib.import_module(name).__file__).read_text() for name in _SOURCES))


class Windows(Dataset[Tensor]):
    """``[length + 1]`` bytes from every ``step``-th place."""

    def __init__(self, text: Tensor, length: int, step: int) -> None:
        self.text, self.length, self.step = text, length, step

    def __len__(self) -> int:
        return (len(self.text) - self.length - 1) // self.step

    def __getitem__(self, index: int) -> Tensor:
        return self.text[index * self.step : index * self.step + self.length + 1]


class TopicsDataModule(pl.LightningDataModule):
    """Windows of the topics; the last tenth of the text is for validation.

    Args:
        checkpoint: The GGUF file of the YAML's strategy; made if it is not there, in about a minute.
        pretrain_steps: Steps of pretraining, where the file is made.
        batch_size: Windows in a batch.
        length: Bytes in a window.
        seed: Of the order of training windows.
        drop_last: Leave out the smaller last batch of an epoch: one shape for all steps.
    """

    def __init__(
        self,
        checkpoint: str,
        pretrain_steps: int = 400,
        batch_size: int = 16,
        length: int = 128,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        self.pretrain_steps = pretrain_steps
        self.checkpoint, self.batch_size, self.length, self.seed = checkpoint, batch_size, length, seed
        self.drop_last = drop_last

    @override
    def prepare_data(self) -> None:
        if not Path(self.checkpoint).exists():
            make_checkpoints(Path(self.checkpoint).parent, sources(), self.pretrain_steps)

    @override
    def setup(self, stage: str) -> None:
        text = english()
        split = len(text) * 9 // 10
        self.train = Windows(text[:split], self.length, self.length // 2)
        self.val = Windows(text[split:], self.length, self.length)

    @override
    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.train, self.batch_size, seed=self.seed, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 64)
