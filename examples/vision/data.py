"""MNIST and CIFAR-10 from files in torchvision's layout; torchvision is needed only to download them."""

from __future__ import annotations

import gzip
import math
import pickle
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_lrtt import ResumableLoader, _check

_ME = "VisionDataModule"
_IDX = {8: np.uint8, 9: np.int8, 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}  # the type byte of the IDX format


def read_idx(path: Path) -> Tensor:
    """An IDX file (http://yann.lecun.com/exdb/mnist), also as ``.gz``.

    Raises:
        ValueError: If it is no IDX file, or shorter or longer than its header says.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] not in _IDX:
        raise _check.fail(_ME, str(path), "an IDX file", f"the bytes {raw[:4]!r}", "delete it and download it again")
    start = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:start], ">i4").tolist()
    kind = np.dtype(_IDX[raw[2]])
    if len(raw) - start != math.prod(shape) * kind.itemsize:
        size = math.prod(shape) * kind.itemsize
        raise _check.fail(_ME, str(path), f"whole ({size} bytes of data)", len(raw) - start, "download it again")
    values = np.frombuffer(raw, kind, offset=start).reshape(shape)
    return torch.from_numpy(values.astype(kind.newbyteorder("=")))


def _mnist(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    prefix = "train" if train else "t10k"
    found = []
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        path = folder / "MNIST" / "raw" / name
        found.append(read_idx(path if path.exists() else path.with_name(name + ".gz")))
    images, labels = found
    return images.unsqueeze(1), labels.long()


class _Plain(pickle.Unpickler):
    """CIFAR's batches hold arrays and builtins; anything else is not loaded."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise _check.fail(_ME, "a batch of CIFAR-10", "arrays and builtins", f"{module}.{name}")


def _cifar10(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    images, labels = [], []
    for name in names:
        with open(folder / "cifar-10-batches-py" / name, "rb") as file:
            batch = _Plain(file, encoding="latin1").load()
        images.append(torch.from_numpy(np.asarray(batch["data"], np.uint8)).view(-1, 3, 32, 32))
        labels += batch["labels"]
    return torch.cat(images), torch.tensor(labels)


# name: reader, torchvision's class, mean and standard deviation of the training set's pixels (scaled to 0 to 1) by channel
_SETS: dict[str, tuple[Any, str, list[float], list[float]]] = {
    "mnist": (_mnist, "MNIST", [0.1307], [0.3081]),
    "cifar10": (_cifar10, "CIFAR10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}


class VisionDataModule(pl.LightningDataModule):
    """MNIST ``[1, 28, 28]`` or CIFAR-10 ``[3, 32, 32]``, standardised, in memory, with labels 0 to 9.

    Files are looked for where torchvision puts them (``root/MNIST/raw``, ``root/cifar-10-batches-py``); torchvision
    downloads what is missing.

    Args:
        dataset: ``mnist`` or ``cifar10``.
        root: Folder of the files.
        batch_size: Images in a batch.
        val_size: Training images held out for validation.
        split_seed: Seed of the split, and of the order of training.
        drop_last: Leave out the smaller last batch of an epoch: one shape for all steps.

    Raises:
        ValueError: If an argument is out of range or a file damaged.
        FileNotFoundError: In ``prepare_data``, if files are missing and torchvision is not installed.
    """

    def __init__(
        self,
        dataset: Literal["mnist", "cifar10"] = "mnist",
        root: str = "data",
        batch_size: int = 64,
        val_size: int = 5000,
        split_seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        _check.choice(_ME, "dataset", dataset, _SETS)
        _check.integer(_ME, "batch_size", batch_size, low=1)
        _check.integer(_ME, "val_size", val_size, low=1)
        self.dataset, self.root, self.batch_size, self.val_size = dataset, Path(root), batch_size, val_size
        self.split_seed, self.drop_last = split_seed, drop_last

    @override
    def prepare_data(self) -> None:
        read, name, *_ = _SETS[self.dataset]
        try:
            for train in (True, False):
                read(self.root, train)
        except FileNotFoundError as error:
            self._download(name, str(error.filename))

    def _download(self, name: str, missing: str) -> None:
        try:
            import torchvision.datasets as datasets
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            raise FileNotFoundError(
                f"{_ME}: {missing} must be there, or torchvision to download it, but it cannot be imported ({error}); "
                f"pip install torchvision, or copy torchvision's files into {self.root}"
            ) from None
        for train in (True, False):
            getattr(datasets, name)(str(self.root), train=train, download=True)

    @override
    def setup(self, stage: str) -> None:
        read, _, mean, std = _SETS[self.dataset]

        def standardised(train: bool) -> TensorDataset:
            images, labels = read(self.root, train)
            centre, width = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
            return TensorDataset((images.float() / 255 - centre) / width, labels)

        if stage in ("fit", "validate"):
            whole = standardised(True)
            _check.integer(_ME, "val_size", self.val_size, low=1, high=len(whole) - 1)
            order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(self.split_seed))
            val, train = order.split([self.val_size, len(whole) - self.val_size])
            self.val, self.train = (TensorDataset(*whole[part]) for part in (val, train))
        if stage in ("test", "predict"):
            self.test = standardised(False)

    @override
    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.train, self.batch_size, seed=self.split_seed, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=500)

    @override
    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=500)

    @override
    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()
