"""Stock optimizers and schedulers around tiles."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from features import both, feature
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning_helpers import DIGITAL, PULSED, Net, loader, trainer
from torch.optim import lr_scheduler as schedules
from torch.optim import swa_utils

from lightning_lrtt import LRTT, LRTTConfig, LRTTStrategy, convert_to_lrtt
from lightning_lrtt.nn import find_tiles

Make = Callable[[torch.optim.Optimizer], Any]

SCHEDULES: dict[str, Make] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda i: 0.9**i),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.001, 0.1, 3, cycle_momentum=True),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=True),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 3), schedules.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, 0.1, 1.0, 3), schedules.StepLR(o, 4)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, 5),
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {},
    "AdamW": {"weight_decay": 0.1},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
}
# LBFGS is refused (test_feature_refusals); Muon takes matrices only and SparseAdam sparse gradients only, where a bias
# is neither.
OTHERS = {"LBFGS", "Muon", "SparseAdam", "Optimizer"}


class Scheduled(Net):
    """SGD with momentum and a schedule by step."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make
        self.seen: list[tuple[float, float]] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        group = self.trainer.optimizers[0].param_groups[0]
        self.seen.append((group["lr"], group["momentum"]))


def test_every_stock_schedule_is_here() -> None:
    stock = {
        name
        for name, kind in vars(schedules).items()
        if inspect.isclass(kind) and issubclass(kind, schedules.LRScheduler) and not name.startswith("_")
    }
    assert stock - {"LRScheduler", "ReduceLROnPlateau"} == set(SCHEDULES) - {"SWALR"}
    optimizers = {
        name
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    }
    assert optimizers - OTHERS == set(OPTIMIZERS)


@feature("Optimizers", "every stock scheduler")
@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*")
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The lr and momentum of every step are those of the stock run, and tiles move at that lr times tile_lr_scale;
    OneCycleLR and CyclicLR (tested on pulsed tiles, the others on digital ones) with their momentum too.
    """
    used: list[float] = []
    refresh = LRTT.refresh_lr

    def watch(self: LRTT) -> None:
        refresh(self)
        used.extend(float(lr) for lr in self._lr.values())

    monkeypatch.setattr(LRTT, "refresh_lr", watch)
    config = PULSED if name in ("OneCycleLR", "CyclicLR") else DIGITAL
    stock, model = Scheduled(SCHEDULES[name]), Scheduled(SCHEDULES[name])
    trainer(tmp_path, [], None, max_steps=10).fit(stock, loader(10))
    assert not used
    trainer(tmp_path, [], strategy=LRTTStrategy(config, tile_lr_scale=2.0), max_steps=10).fit(model, loader(10))
    assert model.seen == stock.seen
    assert len({lr for lr, _ in model.seen}) > 1
    assert used == [2.0 * lr for lr, _ in stock.seen]  # once a step for the group that holds both tiles


@feature("Optimizers", "ReduceLROnPlateau")
@both
def test_plateau(tmp_path: Path, config: LRTTConfig) -> None:
    """Falls when the validation loss no longer does."""

    class Plateau(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", torch.tensor(1.0))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
            scheduler = schedules.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    run = trainer(tmp_path, [], config, max_epochs=3)
    run.fit(Plateau(), loader(3), loader(1))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)


@feature("Optimizers", "every stock optimizer for the digital parameters")
@both
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizer(tmp_path: Path, name: str, config: LRTTConfig) -> None:
    """It moves the biases, not C, A, B, by its betas, momentum and weight decay; it resumes from a checkpoint."""
    config = dataclasses.replace(config, transfer_every=100)

    class With(Net):
        def configure_optimizers(self) -> Any:
            return getattr(torch.optim, name)(self.parameters(), lr=0.01, **OPTIMIZERS[name])

    torch.manual_seed(0)
    model = With()
    before = model.net[0].bias.detach().clone()
    run = trainer(tmp_path, [], config)
    converted = convert_to_lrtt(copy.deepcopy(model), config)  # bounded cells may clip C
    weight = find_tiles(converted)["net.0"].weight.detach()
    run.fit(model, loader(5))
    tile = find_tiles(model)["net.0"]
    assert not torch.equal(tile.bias, before)
    assert torch.equal(tile.weight, weight)  # no transfer yet: weight decay alone could have moved C
    assert tile.A.any()
    state = run.optimizers[0].state
    for p in (tile.weight, tile.A, tile.B):  # Adagrad makes its state at once
        assert float(state.get(p, {}).get("step", 0)) == 0
    run.save_checkpoint(tmp_path / "one.ckpt")
    states = []
    for kwargs in ({}, {"ckpt_path": tmp_path / "one.ckpt", "weights_only": True}):
        torch.manual_seed(0)
        model = With()
        rest = trainer(tmp_path / "rest", [], config, max_epochs=2)
        rest.fit(model, loader(5), **kwargs)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@feature("Optimizers", "several optimizers, manual optimisation")
@both
def test_manual_optimisation(tmp_path: Path, config: LRTTConfig) -> None:
    """Each is wrapped and moves its own tiles, at its own times; with toggle_optimizer too."""

    class Manual(Net):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for index, optimizer in enumerate(self.optimizers()):
                if batch_idx % (index + 1) == 0:  # the second every other batch
                    self.toggle_optimizer(optimizer)
                    optimizer.zero_grad()
                    self.manual_backward((self.net(batch[0]) - batch[1]).square().mean())
                    optimizer.step()
                    self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.net[0].parameters(), lr=0.05),
                torch.optim.Adam(self.net[2].parameters(), lr=0.05),
            ]

    torch.manual_seed(0)
    model = Manual()
    x, y = loader().dataset.tensors
    before = float((model.net(x) - y).square().mean().detach())
    run = trainer(tmp_path, [], config, max_epochs=5)
    run.fit(model, loader())
    assert [type(optimizer.digital).__name__ for optimizer in run.optimizers] == ["SGD", "Adam"]
    tiles = find_tiles(model)
    assert [tiles[name].counts()["transfers"] for name in ("net.0", "net.2")] == [100 // 4, 50 // 4]
    assert float((model.net(x) - y).square().mean().detach()) < 0.8 * before


@feature("Optimizers", "LearningRateMonitor", tiles="digital")
@pytest.mark.parametrize("scheduled", [True, False])
def test_learning_rate_monitor(tmp_path: Path, scheduled: bool) -> None:
    """One name for one lr: that of the module's own optimizer.

    It used to log the wrapper beside it.
    """

    class Plain(Net):
        pass

    model: Any = Scheduled(SCHEDULES["StepLR"]) if scheduled else Plain()
    monitor = LearningRateMonitor()
    trainer(tmp_path, [monitor], max_steps=6).fit(model, loader(6))
    assert list(monitor.lrs) == ["lr-SGD"]
