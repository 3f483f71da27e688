"""Parameters that are frozen, unfrozen or added while a run goes on: C moves by transfers only, tiles by LR-TT only."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import randn
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning_helpers import DIGITAL, PULSED, loader, trainer
from torch import nn

from lightning_lrtt import LRTT, LRTTStrategy
from lightning_lrtt.nn import LRTTLinear, find_tiles

both = pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])


@both
def test_whoever_unfreezes_c_does_not_train_it(config):
    """Regression: ``requires_grad_(True)`` gave C of a digital tile a gradient, and the digital optimizer moved it."""
    layer = LRTTLinear(6, 5, config=config, tile=0).requires_grad_(False).requires_grad_(True)
    optimizer = LRTT(layer.parameters(), lr=0.05, digital=lambda groups: torch.optim.AdamW(groups, lr=0.05))
    before, a = layer.weight.detach().clone(), layer.A.detach().clone()
    for step in range(config.transfer_every):
        assert torch.equal(layer.weight, before), step
        layer(randn(step, 8, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.counts()["transfers"] == 1 and not torch.equal(layer.weight, before)
    assert torch.equal(layer.A, a)  # 0, after the transfer


class Backboned(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.head(self.backbone(batch[0])) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


class Moves(pl.Callback):
    """In how many steps C moved without a transfer."""

    def __init__(self) -> None:
        self.alone = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.c = pl_module.backbone[0].weight.detach().clone()
        self.transfers = pl_module.backbone[0].counts()["transfers"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        tile = pl_module.backbone[0]
        self.alone += tile.counts()["transfers"] == self.transfers and not torch.equal(tile.weight, self.c)


def finetune(tmp_path: Path, config: Any, exclude: list[str] | None, epochs: int, ckpt_path: str | None = None) -> Any:
    """Lightning's callback: the backbone is frozen for an epoch, then its parameters come as a new group."""
    pl.seed_everything(1, verbose=False)
    module, moves = Backboned(), Moves()
    callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2), moves]
    options = {"max_epochs": epochs, "strategy": LRTTStrategy(config, exclude=exclude)}
    run = trainer(tmp_path, callbacks, config, **options)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return module, run, moves


@both
@pytest.mark.parametrize("exclude", [None, ["head"]], ids=["all", "head-digital"])
@pytest.mark.filterwarnings("ignore:.*not have any trainable|.*is_unfrozen")
def test_a_backbone_unfrozen_later_is_trained_by_lrtt(tmp_path, config, exclude):
    """Regression: an optimizer without tiles at the start was not wrapped, and moved A and B by Adam, pulsed ones too; and a
    resumed run met the list of groups from before.
    """
    module, run, moves = finetune(tmp_path, config, exclude, 3)
    tile = find_tiles(module)["backbone.0"]
    assert isinstance(run.optimizers[0], LRTT) and len(run.optimizers[0].param_groups) == 2
    assert moves.alone == 0 and tile.counts()["transfers"] > 0
    assert (tile.counts()["pulses_a"] > 0) == (config is PULSED)
    path = str(tmp_path / "half.ckpt")
    run.save_checkpoint(path)
    _, resumed, moves = finetune(tmp_path, config, exclude, 5, path)
    assert resumed.global_step > run.global_step and moves.alone == 0


@both
def test_a_copy_of_model_and_optimizer_goes_on_like_the_original(config):
    """Regression: the copy's first step had no attribute ``_expected``."""
    layer = LRTTLinear(6, 5, config=config, tile=0)
    optimizer = LRTT(layer.parameters(), lr=0.05, digital=torch.optim.Adam, tile_lr_scale=2.0)
    optimizer.observer = lambda event, tiles: None

    def step(layer: Any, optimizer: Any, seed: int) -> None:
        optimizer.zero_grad()
        layer(randn(seed, 8, 6)).square().sum().backward()
        optimizer.step()

    step(layer, optimizer, 0)
    optimizer.zero_grad()
    buffer = io.BytesIO()
    torch.save((layer, optimizer), buffer)
    buffer.seek(0)
    for other, theirs in (copy.deepcopy((layer, optimizer)), torch.load(buffer, weights_only=False)):
        assert theirs.param_groups is theirs.digital.param_groups and theirs.state is theirs.digital.state
        assert theirs.tile_lr_scale == 2.0 and theirs.observer is None and len(theirs.tiles()) == 1
        twin, own = copy.deepcopy((layer, optimizer))
        step(other, theirs, 1)
        step(twin, own, 1)
        assert all(
            torch.equal(a, b) for a, b in zip(other.state_dict().values(), twin.state_dict().values(), strict=True)
        )
        assert not torch.equal(other.A, layer.A)


def test_one_frozen_factor():
    """Regression: with B frozen nothing moved, and nothing was said. A digital tile learns by the other one."""
    layer = LRTTLinear(6, 5, config=DIGITAL, tile=0)
    layer.B.requires_grad_(False)
    optimizer, b = LRTT(layer.parameters(), lr=0.05), layer.B.clone()
    layer(randn(0, 8, 6)).square().sum().backward()
    expected = layer.A.detach() - 0.05 * DIGITAL.factor_scale * layer.A.grad
    optimizer.step()
    torch.testing.assert_close(layer.A.detach(), expected, rtol=0, atol=0)
    assert torch.equal(layer.B, b)
    pulsed = LRTTLinear(6, 5, config=PULSED, tile=0)
    pulsed.B.requires_grad_(False)
    optimizer = LRTT(pulsed.parameters(), lr=0.05)
    pulsed(randn(0, 8, 6)).square().sum().backward()
    with pytest.raises(
        RuntimeError, match="A and B of a pulsed tile must both learn, got requires_grad True and False"
    ):
        optimizer.step()


def test_optimizers_without_tiles_are_wrapped_quietly(tmp_path, caplog):
    """Of two optimizers, the one without tiles steps as its own."""
    with caplog.at_level(logging.INFO, "lightning_lrtt"):
        _, run, _ = finetune(tmp_path, DIGITAL, ["head"], 1)
    assert isinstance(run.optimizers[0].digital, torch.optim.Adam)
    assert not any("tiles by LR-TT" in record.message for record in caplog.records)
