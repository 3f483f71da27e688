"""The strategy ``lrtt``: an unchanged LightningModule on tiles, Lightning's features, refusals, exact resume."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from features import both, feature
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import DIGITAL, PULSED, InConfigureModel, Net, loader, trainer
from lightning_lrtt.callbacks import TileMonitor
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, LRTTStrategy, NonFiniteError, build_info, convert_to_lrtt
from lightning_lrtt.nn import LRTTLinear, find_tiles


class Validated(Net):
    """With validation and test, and an optimizer with state and a schedule."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        assert torch.is_inference_mode_enabled()
        self.log("test/loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def loss_of(model: Net) -> float:
    """Mean squared error on the data of `loader`."""
    x, y = loader().dataset.tensors
    with torch.no_grad():
        return float((model.net(x) - y).square().mean())


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two state dicts hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------ the strategy itself


def test_registered_once_by_a_lower_case_name() -> None:
    assert StrategyRegistry["lrtt"]["strategy"] is LRTTStrategy
    assert "ddp" not in LRTTStrategy.strategy_name  # Lightning tests the substring
    import importlib

    import lightning_lrtt.strategies

    importlib.reload(lightning_lrtt.strategies)  # a second import does not register again


def test_by_name_it_uses_the_accelerator_given(tmp_path: Path) -> None:
    run = pl.Trainer(strategy="lrtt", accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    assert isinstance(run.strategy, LRTTStrategy)
    assert run.strategy.root_device == torch.device("cpu")
    strategy = LRTTStrategy()
    strategy.parallel_devices = [torch.device("cuda", 1)]  # what the Trainer does with accelerator="gpu", devices=[1]
    assert strategy.root_device == torch.device("cuda", 1)


@feature("Modules", "an unchanged LightningModule")
@both
def test_an_unchanged_module_trains(tmp_path: Path, config: LRTTConfig) -> None:
    """Linear and convolution layers become tiles, the configured optimizer moves the rest."""
    torch.manual_seed(0)
    model = Net()
    before = loss_of(model)
    run = trainer(tmp_path, [], config, max_epochs=5)
    run.fit(model, loader())
    assert [type(layer) for layer in model.net] == [LRTTLinear, nn.Tanh, LRTTLinear]
    assert loss_of(model) < 0.7 * before
    assert isinstance(run.optimizers[0], LRTT)
    assert isinstance(run.optimizers[0].digital, torch.optim.SGD)
    assert find_tiles(model)["net.0"].counts()["transfers"] == 5 * 20 // config.transfer_every


def test_include_exclude_and_tile_lr_scale(tmp_path: Path) -> None:
    model = Net()
    run = trainer(tmp_path, [], strategy=LRTTStrategy(DIGITAL, exclude=["net.2"], tile_lr_scale=3.0), max_steps=1)
    run.fit(model, loader())
    assert list(find_tiles(model)) == ["net.0"]
    assert run.optimizers[0].tile_lr_scale == 3.0


def test_a_pattern_that_matches_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"include must match layers, but 'encoder\.\*' matches none of"):
        trainer(tmp_path, [], strategy=LRTTStrategy(include=["encoder.*"])).fit(Net(), loader())


class InSetup(InConfigureModel):
    """Makes its layers when the data are known."""

    def configure_model(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        InConfigureModel.configure_model(self)


@feature("Modules", "layers made in setup or configure_model", tiles="digital")
@pytest.mark.parametrize("kind", [InConfigureModel, InSetup])
def test_late_layers_are_converted_and_resume(tmp_path: Path, kind: type[Net]) -> None:
    """They become tiles and resume from a checkpoint."""

    def start() -> Any:
        return trainer(tmp_path, [], strategy=LRTTStrategy(DIGITAL, include=["net.*"]), max_epochs=1)

    run, model = start(), kind()
    run.fit(model, loader(3))
    assert list(find_tiles(model)) == ["net.0", "net.2"]
    run.save_checkpoint(tmp_path / "late.ckpt")
    again, other = start(), kind()
    again.fit(other, loader(3), ckpt_path=tmp_path / "late.ckpt", weights_only=True)
    assert same(model.state_dict(), other.state_dict())


class EarlyOptimizer(Net):
    """Its optimizer is built with the model, as LightningCLI does: before the strategy converts anything."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.optimizer = make(self.parameters())

    def configure_optimizers(self) -> Any:
        return self.optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params, lr=0.05),
        lambda params: LRTT(params, lr=0.05),
    ],
    ids=["adamw", "lrtt"],
)
def test_an_optimizer_built_before_the_conversion_gets_the_factors(tmp_path: Path, make: Any) -> None:
    """LRTT itself, built early, used to leave the gradients of A and B to pile up: zero_grad did not know them."""
    torch.manual_seed(0)
    model = EarlyOptimizer(make)
    before = loss_of(model)
    run = trainer(tmp_path, [], max_epochs=5)
    run.fit(model, loader())
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    for tile in find_tiles(model).values():
        assert {id(tile.weight), id(tile.A), id(tile.B)} <= held
    assert loss_of(model) < 0.7 * before
    run.optimizers[0].zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    model, run = Net(), trainer(tmp_path, [], max_epochs=1)
    run.fit(model, loader(3))
    tiles = list(find_tiles(model).values())
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(3))
    assert [id(t) for t in find_tiles(model).values()] == [id(t) for t in tiles]
    assert isinstance(run.optimizers[0], LRTT)
    assert not isinstance(run.optimizers[0].digital, LRTT)


def test_a_module_with_its_own_tiles_needs_no_strategy(tmp_path: Path) -> None:
    class Own(Net):
        def configure_optimizers(self) -> Any:
            return LRTT(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    model = Own()
    convert_to_lrtt(model, DIGITAL)
    before = loss_of(model)
    trainer(tmp_path, [], None, max_epochs=5).fit(model, loader())
    assert loss_of(model) < 0.7 * before


def test_several_optimizers_by_hand(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.net[0].parameters(), lr=self.lr),
                torch.optim.Adam(self.net[2].parameters(), lr=self.lr),
            ]

    torch.manual_seed(0)
    model = Manual()
    before = loss_of(model)
    run = trainer(tmp_path, [], PULSED, max_epochs=5)
    run.fit(model, loader())
    assert all(isinstance(optimizer, LRTT) for optimizer in run.optimizers)
    assert loss_of(model) < 0.8 * before


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        (DIGITAL, {"devices": 2}, "devices must be one device, got 2"),
        (
            DIGITAL,
            {"precision": "bf16-true"},
            "precision must keep float32 parameters, got 'bf16-true'; use 'bf16-mixed'",
        ),
        (DIGITAL, {"precision": "16-true"}, "precision must keep float32 parameters, got '16-true'"),
        (PULSED, {"precision": "64-true"}, "precision must be '32-true' or mixed for tiles on devices, got '64-true'"),
        (
            PULSED,
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            "gradient_clip_algorithm must be 'norm' with pulsed tiles, got 'value'",
        ),
    ],
    ids=["devices", "bf16-true", "16-true", "64-true-pulsed", "value-clipping-pulsed"],
)
def test_refused_at_setup(tmp_path: Path, config: LRTTConfig, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, [], config, **kwargs).fit(Net(), loader())


def test_arguments_that_an_lrtt_optimizer_would_ignore_are_refused(tmp_path: Path) -> None:
    model = EarlyOptimizer(lambda params: LRTT(params, lr=0.05))
    with pytest.raises(MisconfigurationException, match="tile_lr_scale must be left out with an LRTT optimizer"):
        trainer(tmp_path, [], strategy=LRTTStrategy(DIGITAL, tile_lr_scale=2.0)).fit(model, loader())


class WithNan(pl.LightningModule):
    """One input of batch 6 is NaN; without bias, so that tiles are all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        if batch_idx == 6:
            x = x.clone()
            x[0, 0] = float("nan")
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@both
def test_nonfinite_raises_at_the_next_logging_step(tmp_path: Path, config: LRTTConfig) -> None:
    model = WithNan()
    run = trainer(tmp_path, [], config)
    with pytest.raises(NonFiniteError, match=r"must be finite, .* first at optimizer step 6 .* on_nonfinite='skip'"):
        run.fit(model, loader())
    assert run.fit_loop.epoch_loop._batches_that_stepped == 9  # log_every_n_steps = 5: steps 4, 9, ...


@both
def test_nonfinite_raises_at_the_end_at_the_latest(tmp_path: Path, config: LRTTConfig) -> None:
    with pytest.raises(NonFiniteError):
        trainer(tmp_path, [], config, log_every_n_steps=1000).fit(WithNan(), loader(8))


@both
def test_nonfinite_can_be_skipped(tmp_path: Path, config: LRTTConfig) -> None:
    model = WithNan()
    trainer(tmp_path, [], strategy=LRTTStrategy(config, on_nonfinite="skip")).fit(model, loader())
    assert model.net.counts()["nonfinite"] > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ------------------------------------------------------------------ what Lightning does to a step


@both
def test_fast_dev_run(tmp_path: Path, config: LRTTConfig) -> None:
    trainer(tmp_path, [], config, fast_dev_run=True).fit(Validated(), loader(), loader(2))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(tmp_path: Path, precision: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    before = loss_of(model)
    trainer(tmp_path, [], DIGITAL, precision=precision, max_epochs=5).fit(model, loader())
    assert loss_of(model.float()) < 0.7 * before


def test_bf16_mixed_pulsed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    before = loss_of(model)
    trainer(tmp_path, [], PULSED, precision="bf16-mixed", max_epochs=5).fit(model, loader())
    assert loss_of(model) < 0.8 * before


def test_clipping_by_norm_scales_digital_tiles(tmp_path: Path) -> None:
    """One step from A = 0: A moves by -lr grad, so its step shows the clipped gradient."""
    steps = {}
    for clip in (None, 1e-3):
        torch.manual_seed(0)
        model = Net()
        trainer(tmp_path, [], gradient_clip_val=clip, max_steps=1).fit(model, loader())
        steps[clip] = torch.cat([tile.A.detach().flatten() for tile in find_tiles(model).values()])
    ratio = float(steps[1e-3].norm() / steps[None].norm())
    assert ratio < 0.01
    # Same direction, to float32 rounding.
    torch.testing.assert_close(steps[1e-3], ratio * steps[None], rtol=1e-4, atol=1e-10)


def test_clipping_by_norm_scales_pulses(tmp_path: Path) -> None:
    pulses = {}
    for clip in (None, 1e6, 1e-2):
        torch.manual_seed(0)
        model = Net()
        trainer(tmp_path, [], PULSED, gradient_clip_val=clip, max_steps=3).fit(model, loader())
        pulses[clip] = sum(tile.counts()["pulses_a"] for tile in find_tiles(model).values())
    assert pulses[None] == pulses[1e6]
    assert 0 < pulses[1e-2] < 0.2 * pulses[None]


def test_value_clipping_of_digital_tiles(tmp_path: Path) -> None:
    model = Net()
    trainer(tmp_path, [], gradient_clip_val=1e-9, gradient_clip_algorithm="value", max_steps=1).fit(model, loader())
    assert float(model.net[0].A.detach().abs().max()) <= 0.05 * 1e-9 * (1 + 1e-6)


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    """float32: the same sums in another order; 5 steps with gradients of order 1."""
    from torch.utils.data import DataLoader

    models = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        model = Net()
        data = DataLoader(loader().dataset, batch_size=8 // accumulate)
        trainer(tmp_path, [], accumulate_grad_batches=accumulate, max_steps=5).fit(model, data)
        models.append(model)
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_accumulation_of_pulsed_tiles_counts_steps_not_batches(tmp_path: Path) -> None:
    model = Net()
    trainer(tmp_path, [], PULSED, accumulate_grad_batches=5).fit(model, loader())
    assert find_tiles(model)["net.0"].counts()["transfers"] == 1  # 20 batches, 4 steps, T = 4


@both
def test_a_scheduler_moves_the_lr_of_tiles(tmp_path: Path, config: LRTTConfig) -> None:
    """Lr falls to 0 after two steps; nothing moves any more. The scheduler belongs to the wrapped optimizer."""

    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    no_transfer = copy.copy(config)
    object.__setattr__(no_transfer, "transfer_every", 100)
    states = []
    for steps in (2, 10):
        torch.manual_seed(0)
        model = Scheduled()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
            trainer(tmp_path, [LearningRateMonitor()], no_transfer, max_steps=steps).fit(model, loader())
        states.append({name: p.detach() for name, p in model.named_parameters()})
    assert same(*states)


# ------------------------------------------------------------------ checkpoints and evaluation


@feature("Loops", "resume from a checkpoint")
@both
def test_resume_in_the_middle_of_a_cycle_is_exact(tmp_path: Path, config: LRTTConfig) -> None:
    """7 batches an epoch, T = 4: the checkpoint lies 2 updates into a cycle. Same bits, optimizer and schedule too."""
    torch.manual_seed(0)
    whole = Validated()
    part = copy.deepcopy(whole)
    long = trainer(tmp_path / "long", [], config, max_epochs=4)
    long.fit(whole, loader(7), loader(2))
    saved = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
    short = trainer(tmp_path / "short", [saved], config, max_epochs=2, enable_checkpointing=True)
    short.fit(part, loader(7), loader(2))
    state = torch.load(saved.best_model_path, weights_only=True)
    assert state["state_dict"]["net.0.tile_state"].dtype == torch.int64
    assert int(state["state_dict"]["net.0.tile_state"][2]) == 14 % 4
    resumed = Validated()
    rest = trainer(tmp_path / "rest", [], config, max_epochs=4)
    rest.fit(resumed, loader(7), loader(2), ckpt_path=saved.best_model_path, weights_only=True)
    assert same(whole.state_dict(), resumed.state_dict())
    one, other = long.optimizers[0].state_dict(), rest.optimizers[0].state_dict()
    assert one["param_groups"] == other["param_groups"]
    for index, entry in one["state"].items():
        assert same(entry, other["state"][index])
    assert long.callback_metrics["val/loss"] == rest.callback_metrics["val/loss"]


def test_a_digital_checkpoint_starts_fresh_factors(tmp_path: Path) -> None:
    digital, tiles = Validated(), Validated()
    run = trainer(tmp_path, [], None, max_epochs=1)
    run.fit(digital, loader(3))
    run.save_checkpoint(tmp_path / "digital.ckpt", weights_only=True)
    trainer(tmp_path, []).test(tiles, loader(2), ckpt_path=tmp_path / "digital.ckpt", verbose=False, weights_only=True)
    for name, value in digital.state_dict().items():
        assert torch.equal(tiles.state_dict()[name], value)
    assert float(tiles.net[0].A.detach().abs().max()) == 0.0


@both
def test_evaluation_reads_the_factors_in_inference_mode(tmp_path: Path, config: LRTTConfig) -> None:
    model, run = Validated(), trainer(tmp_path, [], config)
    run.fit(model, loader(3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = run.test(model, loader(2), verbose=False)[0]["test/loss"]
    assert same(state, model.state_dict())
    assert not any(tile.latch.calls for tile in find_tiles(model).values())
    model.net[0].A.data.add_(0.5)
    assert run.test(model, loader(2), verbose=False)[0]["test/loss"] != first
    assert run.validate(model, loader(2), verbose=False)[0]["val/loss"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not build_info()["with_cuda"], reason="needs a GPU with CUDA kernels"
)
@both
def test_by_name_on_a_gpu_and_back(tmp_path: Path, config: LRTTConfig) -> None:
    """The Trainer's accelerator is used, the monitor's numbers arrive, and the checkpoint goes on on a CPU."""
    torch.manual_seed(0)
    model = Net()
    before = loss_of(model)
    strategy = "lrtt" if config is DIGITAL else LRTTStrategy(config)
    run = trainer(tmp_path, [TileMonitor()], strategy=strategy, accelerator="gpu", devices=1, max_epochs=5)
    assert run.strategy.root_device.type == "cuda"
    seen: list[str] = []
    model.on_train_batch_end = lambda *args: seen.append(model.net[0].A.device.type)  # teardown moves it to the CPU
    run.fit(model, loader())
    assert set(seen) == {"cuda"}
    assert loss_of(model) < 0.7 * before
    run.save_checkpoint(tmp_path / "gpu.ckpt")
    strategy = "lrtt" if config is DIGITAL else LRTTStrategy(config)
    rest = trainer(tmp_path / "cpu", [TileMonitor()], strategy=strategy, max_epochs=6)
    rest.fit(Net(), loader(), ckpt_path=tmp_path / "gpu.ckpt", weights_only=True)
    assert rest.global_step == 120
