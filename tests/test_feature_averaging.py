"""Averages of models with tiles are averages of effective weights, C + alpha A B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from features import both, feature
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning_helpers import InConfigureModel, Net, loader, trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_lrtt import LRTT, LRTTConfig, convert_to_lrtt
from lightning_lrtt.nn import find_tiles
from lightning_lrtt.nn.average import average_effective_weights


class Validated(Net):
    """With a batch norm, whose buffers are averaged too, and a validation that records what it evaluates."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.BatchNorm1d(3))
        self.evaluated: list[dict[str, torch.Tensor]] = []

    def on_validation_epoch_start(self) -> None:  # after the callbacks' hook of this name
        self.evaluated.append(effective(self))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean())


def effective(model: nn.Module) -> dict[str, torch.Tensor]:
    """Effective weights and biases in float64."""
    tiles = find_tiles(model)
    return {name: tile.effective_weight().double() for name, tile in tiles.items()} | {
        name + ".bias": tile.bias.detach().double().clone() for name, tile in tiles.items()
    }


class Record(pl.Callback):
    """Effective weights after every step, and at every epoch's start."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.epochs: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append(effective(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.steps.append(effective(pl_module))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-6, the promise of the docs."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of all."""
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def factors(model: nn.Module) -> float:
    """Largest element of all A."""
    return max(float(tile.A.detach().abs().max()) for tile in find_tiles(model).values())


@feature("Averaging", "WeightAveraging")
@both
@pytest.mark.parametrize("use_buffers", [True, False], ids=["buffers", "no-buffers"])
def test_weight_averaging(tmp_path: Path, config: LRTTConfig, use_buffers: bool) -> None:
    """The averaged model holds C = mean effective weight and A = 0, to 1e-6; validation sees it, training does not."""
    torch.manual_seed(0)
    record, model = Record(), Validated()
    averaging = EMAWeightAveraging(decay=0.0, use_buffers=True) if use_buffers else WeightAveraging(use_buffers=False)
    run = trainer(tmp_path, [record, averaging], config, max_epochs=2)
    run.fit(model, loader(7), loader(2))
    expected = record.steps[-1] if use_buffers else mean(record.steps)
    assert factors(model) == 0.0
    assert_equal(effective(model), expected)
    half = record.steps[6] if use_buffers else mean(record.steps[:7])
    assert_equal(model.evaluated[1], half)  # 0 is the sanity check
    for tile in find_tiles(model).values():
        assert tile.counts()["transfers"] == 14 // config.transfer_every
        assert float(tile.B.detach().abs().max()) > 0.05  # it can be trained on
    torch.manual_seed(0)
    alone, other = Record(), Validated()
    trainer(tmp_path, [alone], config, max_epochs=2).fit(other, loader(7), loader(2))
    for one, two in zip(record.steps, alone.steps, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)  # averaging leaves training alone, to the bit


@feature("Averaging", "EMAWeightAveraging")
@both
def test_ema(tmp_path: Path, config: LRTTConfig) -> None:
    """Likewise; the checkpoint holds the average as its model, and a run resumed from it goes on to the same bits."""

    def start(folder: str, epochs: int, **kwargs: Any) -> tuple[Record, Validated, Any]:
        torch.manual_seed(0)
        record, model = Record(), Validated()
        saved = ModelCheckpoint(tmp_path / folder, save_top_k=-1)
        run = trainer(
            tmp_path,
            [record, EMAWeightAveraging(decay=0.8), saved],
            config,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        run.fit(model, loader(6), loader(1), **kwargs)
        return record, model, saved

    record, model, _ = start("long", 2)
    expected = record.steps[0]
    for state in record.steps[1:]:
        expected = {name: 0.8 * value + 0.2 * state[name] for name, value in expected.items()}
    assert_equal(effective(model), expected)
    _, _, saved = start("short", 1)
    checkpoint = torch.load(saved.best_model_path, weights_only=True)
    assert float(checkpoint["state_dict"]["net.0.A"].abs().max()) == 0.0
    assert float(checkpoint["current_model_state"]["net.0.A"].abs().max()) > 0.0
    _, resumed, _ = start("rest", 2, ckpt_path=saved.best_model_path, weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@feature("Averaging", "StochasticWeightAveraging")
@both
def test_swa(tmp_path: Path, config: LRTTConfig) -> None:
    """The final model is the mean of the effective weights at the starts of the SWA epochs."""
    torch.manual_seed(0)
    record, model = Record(), Net()
    swa = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=1)
    run = trainer(tmp_path, [swa, record], config, max_epochs=4)
    run.fit(model, loader(6))
    assert int(swa.n_averaged) == 3
    assert_equal(effective(model), mean(record.epochs[1:]))
    assert "update_parameters" not in swa.__dict__


@feature("Averaging", "layers made in configure_model", tiles="digital")
def test_late_layers(tmp_path: Path) -> None:
    """WeightAveraging copies the layers before they become tiles; the copy is converted too."""
    record, model = Record(), InConfigureModel()
    trainer(tmp_path, [record, WeightAveraging()]).fit(model, loader(6))
    assert_equal(effective(model), mean(record.steps))


@feature("Averaging", "torch.optim.swa_utils in a loop of your own")
@both
def test_averaged_model_in_a_loop(config: LRTTConfig) -> None:
    """`average_effective_weights(AveragedModel(model))` averages effective weights."""
    torch.manual_seed(0)
    net = convert_to_lrtt(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), config)
    optimizer = LRTT(net.parameters(), lr=0.05)
    plain = average_effective_weights(AveragedModel(net))
    average_effective_weights(plain)  # twice is once
    ema = average_effective_weights(AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True))
    states = []
    for x, y in loader(6):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        plain.update_parameters(net)
        ema.update_parameters(net)
        states.append(effective(net))
    assert_equal(effective(plain.module), mean(states))
    expected = states[0]
    for state in states[1:]:
        expected = {name: 0.5 * (value + state[name]) for name, value in expected.items()}
    assert_equal(effective(ema.module), expected)
    x = next(iter(loader(6)))[0]
    w, v = (plain.module[i].to_digital() for i in (0, 2))
    torch.testing.assert_close(plain(x), v(torch.tanh(w(x))), rtol=1e-5, atol=1e-6)


def test_models_that_differ_are_told() -> None:
    net = convert_to_lrtt(nn.Sequential(nn.Linear(6, 5)), LRTTConfig(rank=1))
    averaged = average_effective_weights(AveragedModel(nn.Sequential(nn.Linear(6, 5))))
    with pytest.raises(ValueError, match=r"tiles must be the same in both models, got \[\] and \['0'\]; copy"):
        averaged.update_parameters(net)
