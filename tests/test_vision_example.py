"""examples/vision on small files of MNIST's and CIFAR-10's format, written here; nothing is downloaded."""

from __future__ import annotations

import gzip
import pickle
import re
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lrtt.cli import main

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from examples.vision.data import VisionDataModule, read_idx  # noqa: E402


def classes(count: int, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of ten classes that a linear layer tells apart: noise around ten random pictures."""
    pictures = np.random.default_rng(0).integers(0, 256, (10, *shape))
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    images = pictures[labels] * 0.7 + random.integers(0, 76, (count, *shape))
    return images.astype(np.uint8), labels


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file of unsigned bytes."""
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_mnist(root: Path, train: int = 300, test: int = 100, packed: bool = False) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count, seed in (("train", train, 1), ("t10k", test, 2)):
        images, labels = classes(count, (28, 28), seed)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            path = folder / (name + ".gz" * packed)
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))


def write_cifar10(root: Path, each: int = 60, test: int = 100) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, count, seed in [*((f"data_batch_{i}", each, i) for i in range(1, 6)), ("test_batch", test, 6)]:
        images, labels = classes(count, (3, 32, 32), seed)
        batch = {"data": images.reshape(count, -1), "labels": labels.tolist(), "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


WRITE = {"mnist": write_mnist, "cifar10": write_cifar10}


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_it_trains(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``lrtt fit`` and its test, after 3 or 10 passes over 200 easy images; guessing gives 0.1, give or take 0.03."""
    WRITE[dataset](tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lrtt"])
    small, epochs = {"mnist": (64, 3), "cifar10": (16, 10)}[dataset]
    main(["fit", "--config", str(ROOT / "examples" / "vision" / f"{dataset}.yaml"), "--data.init_args.val_size=100",
          "--data.init_args.batch_size=10", "--trainer.accelerator=cpu", f"--trainer.max_epochs={epochs}",
          f"--model.init_args.hidden={small}"])  # fmt: skip
    printed = re.search(r"test/acc\W+([0-9.]+)", capsys.readouterr().out)
    assert printed is not None
    assert float(printed.group(1)) > {"mnist": 0.5, "cifar10": 0.3}[dataset]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_mnist_is_read_as_written(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path, packed=packed)
    data = VisionDataModule("mnist", str(tmp_path), val_size=100)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert (len(data.train), len(data.val), len(data.test)) == (200, 100, 100)
    images, labels = classes(100, (28, 28), 2)
    x, y = data.test.tensors
    assert torch.equal(y, torch.from_numpy(labels))
    torch.testing.assert_close(x[:, 0] * 0.3081 + 0.1307, torch.from_numpy(images).float() / 255, rtol=0, atol=1e-6)


def test_cifar10_is_read_as_written(tmp_path: Path) -> None:
    """Channels first: the first 1,024 values of a row are red."""
    write_cifar10(tmp_path)
    data = VisionDataModule("cifar10", str(tmp_path), val_size=100)
    data.setup("test")
    images, labels = classes(100, (3, 32, 32), 6)
    x, y = data.test.tensors
    assert x.shape == (100, 3, 32, 32) and torch.equal(y, torch.from_numpy(labels))
    red = torch.from_numpy(images[:, 0]).float() / 255
    torch.testing.assert_close(x[:, 0] * 0.2470 + 0.4914, red, rtol=0, atol=1e-6)


def test_the_split_is_fixed_and_disjoint(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    parts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        data = VisionDataModule("mnist", str(tmp_path), val_size=100)
        data.setup("fit")
        parts.append(torch.cat([data.val.tensors[0], data.train.tensors[0]]))
    assert torch.equal(*parts)
    assert len(torch.unique(parts[0].flatten(1), dim=0)) == 300


def test_missing_files_without_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\S* must be there.*pip install torchvision"):
        VisionDataModule("mnist", str(tmp_path)).prepare_data()


@pytest.mark.parametrize(("dataset", "name"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_torchvision_is_asked_for_missing_files(
    dataset: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the arguments of torchvision.datasets.MNIST and CIFAR10; a stand-in writes the files."""
    asked = []

    def download(root: str, train: bool = True, transform: Any = None, target_transform: Any = None,
                 download: bool = False) -> None:  # fmt: skip
        asked.append((root, train, download))
        if train:
            WRITE[dataset](Path(root))

    vision, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    setattr(datasets, name, download)
    vision.datasets = datasets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    data = VisionDataModule(dataset, str(tmp_path), val_size=10)
    data.prepare_data()
    assert asked == [(str(tmp_path), True, True), (str(tmp_path), False, True)]
    data.prepare_data()
    assert len(asked) == 2  # they are there now
    data.setup("fit")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"<html>", "must be an IDX file"), (idx(np.zeros((4, 3)))[:-1], "must be whole .12 bytes"), (b"", "an IDX file")],
    ids=["page", "cut", "empty"],
)
def test_damaged_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_idx(tmp_path / "x")


def test_wider_types_of_idx(tmp_path: Path) -> None:
    """Big-endian integers and floats."""
    (tmp_path / "x").write_bytes(bytes([0, 0, 12, 1]) + struct.pack(">i2i", 2, -5, 70000))
    assert read_idx(tmp_path / "x").tolist() == [-5, 70000]
    (tmp_path / "x").write_bytes(bytes([0, 0, 13, 2]) + struct.pack(">2i2f", 1, 2, 0.5, -2.0))
    assert read_idx(tmp_path / "x").tolist() == [[0.5, -2.0]]


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("ran",))

    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(ValueError, match="arrays and builtins"):
        VisionDataModule("cifar10", str(tmp_path)).setup("test")


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset must be one of 'mnist', 'cifar10', got 'svhn'"):
        VisionDataModule("svhn")  # type: ignore[arg-type]
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match="val_size must be between 1 and 299, got 5000"):
        VisionDataModule("mnist", str(tmp_path)).setup("fit")
