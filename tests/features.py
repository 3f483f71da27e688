"""Marks a test as a cell of docs/features.md, which docs/make_features.py writes from these marks; models for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_helpers import DIGITAL, PULSED, Net, loader
from torch.utils.data import DataLoader

from lightning_lrtt.nn import find_tiles
from lightning_lrtt.ops import STEP

both = pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])


def feature(group: str, name: str, tiles: str = "both", refused: bool = False) -> Any:
    """The mark; the first paragraph of the test's docstring says what holds.

    Args:
        group: Section of the page.
        name: Row of the section; several tests may share one.
        tiles: The tiles that the test covers: ``both``, ``digital`` or ``pulsed``.
        refused: Whether the test shows that Lightning or this package refuses the feature and says what to do.
    """
    assert tiles in ("both", "digital", "pulsed")
    return pytest.mark.feature(group=group, name=name, tiles=tiles, refused=refused)


class Full(Net):
    """With all loops and a batch size of its own."""

    batch_size = 4

    def train_dataloader(self) -> DataLoader:
        return DataLoader(loader().dataset, self.batch_size)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", (self.net(batch[0]) - batch[1]).square().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        return self.net(batch[0])


class Silent(Full):
    """Does not log in its training step: dynamo of torch 2.13 cannot trace ``self.log``, with any strategy."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()


def fresh(kind: type[Net] = Full, **kwargs: Any) -> Any:
    """A model of fixed weights."""
    torch.manual_seed(0)
    return kind(**kwargs)


def loss_of(model: Any) -> float:
    """Mean squared error on the data of `loader`."""
    x, y = loader().dataset.tensors
    with torch.no_grad():
        return float((model.net(x) - y).square().mean())


def steps_of(model: Any) -> int:
    """Optimizer steps of the first tile."""
    return int(next(iter(find_tiles(model).values())).tile_state[STEP])


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two state dicts hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
