"""What Lightning offers around a step, on tiles; each test with a `feature` mark is a cell of docs/features.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from features import Full, both, feature, fresh, loss_of, same, snapshot, steps_of
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from lightning_helpers import DIGITAL, PULSED, loader, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_lrtt import LRTT, LRTTConfig, LRTTStrategy, build_info
from lightning_lrtt.nn import LRTTLinear, find_tiles
from lightning_lrtt.ops import STEP

# ------------------------------------------------------------------ precision


@feature("Precision", "32-true")
@both
def test_precision_32(tmp_path: Path, config: LRTTConfig) -> None:
    """Trains; parameters stay float32."""
    model = fresh()
    before = loss_of(model)
    trainer(tmp_path, [], config, precision="32-true", max_epochs=5).fit(model, loader())
    assert loss_of(model) < 0.7 * before
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@feature("Precision", "64-true", tiles="digital")
def test_precision_64(tmp_path: Path) -> None:
    """Trains in float64, C and factors too."""
    model = fresh()
    before = loss_of(model)
    trainer(tmp_path, [], precision="64-true", max_epochs=5).fit(model, loader())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert loss_of(model.float()) < 0.7 * before


@feature("Precision", "bf16-mixed")
@both
def test_precision_bf16_mixed(tmp_path: Path, config: LRTTConfig) -> None:
    """Products in bfloat16, tiles and their updates in float32."""
    model = fresh()
    before = loss_of(model)
    trainer(tmp_path, [], config, precision="bf16-mixed", max_epochs=5).fit(model, loader())
    assert loss_of(model) < 0.8 * before
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@feature("Precision", "16-mixed")
@both
def test_precision_16_mixed(tmp_path: Path, config: LRTTConfig) -> None:
    """The loss scale leaves no trace: after one step the same tiles with a scale of 1 and of 1024, and a step whose
    gradients overflow moves nothing. On a CPU Lightning turns the name into bf16-mixed, so the test hands it the plugin
    with a scaler for the CPU; a GPU test uses the name.
    """
    states = []
    for scale in (1.0, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        model = fresh()
        trainer(tmp_path, [], config, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_steps=1).fit(
            model, loader()
        )
        states.append(snapshot(model))
    moved = 0.0
    for name, one in states[0].items():
        if one.is_floating_point():
            # Half products round at 2^-11; a pulse more or less on a cell is a step of dw_min = 0.002 (5 sigma).
            atol = 0.01 if config is PULSED else 1e-5
            torch.testing.assert_close(states[1][name], one, rtol=2e-3, atol=atol)
        if name.endswith("A"):
            moved += float(one.abs().sum())
    assert moved > 0
    overflowing = fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = loss_of(overflowing)
    run = trainer(tmp_path, [], config, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_steps=3)
    run.fit(overflowing, loader())
    assert steps_of(overflowing) == 0
    assert scaler.get_scale() == 2.0**37
    if config is DIGITAL:
        assert loss_of(overflowing) == before


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not build_info()["with_cuda"], reason="needs a GPU with CUDA kernels"
)
@feature("Precision", "16-mixed")
@both
def test_precision_16_mixed_on_a_gpu(tmp_path: Path, config: LRTTConfig) -> None:
    """Trains by name on a GPU."""
    model = fresh()
    before = loss_of(model)
    run = trainer(
        tmp_path, [], config, precision="16-mixed", accelerator="gpu", devices=1, max_epochs=5, gradient_clip_val=1.0
    )
    run.fit(model, loader())
    assert loss_of(model) < 0.8 * before


# ------------------------------------------------------------------ steps


@feature("Step", "accumulate_grad_batches", tiles="digital")
def test_accumulation_digital(tmp_path: Path) -> None:
    """4 batches of 16 equal one of 64 to rounding."""
    models = []
    for accumulate in (1, 4):
        model = fresh()
        data = DataLoader(loader(32).dataset, 64 // accumulate)
        trainer(tmp_path, [], accumulate_grad_batches=accumulate, max_epochs=4).fit(model, data)
        models.append(snapshot(model))
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-4, atol=1e-6)


@feature("Step", "accumulate_grad_batches", tiles="pulsed")
def test_accumulation_pulsed(tmp_path: Path) -> None:
    """4 batches of 16 equal one of 64 in expectation: the mean of 40 seeds agrees within 4 standard errors, and a step
    is a step, whatever the number of its batches.
    """
    moves: dict[int, list[torch.Tensor]] = {1: [], 4: []}
    x, y = loader(32).dataset.tensors
    for accumulate, found in moves.items():
        for seed in range(40):
            torch.manual_seed(0)
            layer = nn.Linear(6, 3)
            config = LRTTConfig(rank=2, transfer_every=100, reinit_gain=1.0, fast_device=PULSED.fast_device, seed=seed)
            tile = LRTTLinear.from_digital(layer, config, tile=0)
            tile.B.data.copy_(torch.linspace(-0.5, 0.5, 12).view(2, 6))  # the same whatever the seed
            optimizer = LRTT(tile.parameters(), lr=0.5)
            for part in range(accumulate):
                rows = slice(part * 64 // accumulate, (part + 1) * 64 // accumulate)
                ((tile(x[:64][rows]) - y[:64][rows]).square().mean() / accumulate).backward()
            optimizer.step()
            assert int(tile.tile_state[STEP]) == 1
            found.append(tile.A.detach().clone())
    one, four = (torch.stack(found) for found in moves.values())
    error = (one.var(0) / 40 + four.var(0) / 40).sqrt()
    assert float(((one.mean(0) - four.mean(0)).abs() / error).max()) < 4.0
    assert float(one.mean(0).abs().max()) > 4 * float(error.max())


@feature("Step", "gradient clipping by norm")
@both
def test_clipping_by_norm(tmp_path: Path, config: LRTTConfig) -> None:
    """A bound of a tenth of the norm makes the first step a tenth (digital: to rounding; pulsed: in its pulses)."""

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.value = float(
                torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]).norm()
            )

    norm, sizes = Norm(), {}
    for share in (None, 0.1):
        model = fresh(lr=0.5)
        run = trainer(
            tmp_path, [norm], config, max_steps=1, gradient_clip_val=None if share is None else share * norm.value
        )
        run.fit(model, loader())
        tiles = find_tiles(model).values()
        sizes[share] = (
            sum(float(tile.A.detach().norm()) ** 2 for tile in tiles) ** 0.5
            if config is DIGITAL
            else sum(tile.counts()["pulses_a"] for tile in tiles)
        )
    # Pulses are Bernoulli counts: some 100 and 10 of them.
    assert sizes[0.1] / sizes[None] == pytest.approx(0.1, rel=1e-4 if config is DIGITAL else 0.8)


# ------------------------------------------------------------------ checkpoints and stopping


@feature("Callbacks", "ModelCheckpoint")
@both
def test_model_checkpoint(tmp_path: Path, config: LRTTConfig) -> None:
    """The best checkpoint gives its score again, in a new Trainer and a new model."""
    saved = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    model = fresh()
    trainer(tmp_path, [saved], config, max_epochs=3, enable_checkpointing=True).fit(model, loader(), loader(5))
    again = trainer(tmp_path / "again", [], config)
    score = again.validate(Full(), loader(5), ckpt_path=saved.best_model_path, verbose=False, weights_only=True)
    assert score[0]["val/loss"] == float(saved.best_model_score)


@feature("Callbacks", "EarlyStopping")
@both
def test_early_stopping(tmp_path: Path, config: LRTTConfig) -> None:
    """Stops when the validation loss no longer falls by the margin asked for."""
    run = trainer(tmp_path, [EarlyStopping("val/loss", min_delta=10.0, patience=2)], config, max_epochs=20)
    run.fit(fresh(), loader(3), loader(2))
    assert run.current_epoch == 3


# ------------------------------------------------------------------ tuner, profilers, limits


@feature("Tools", "learning-rate finder")
@both
def test_lr_find(tmp_path: Path, config: LRTTConfig) -> None:
    """Suggests a rate, sets it, and leaves tiles, counters and pulses as it found them."""
    model = fresh()
    run = trainer(tmp_path, [], config, max_epochs=1, default_root_dir=tmp_path)
    LRTTStrategy(config).connect(model)  # what fit does first, to know the state before
    before = snapshot(model)
    found = Tuner(run).lr_find(model, min_lr=1e-4, max_lr=0.1, num_training=15, update_attr=True)
    assert same(before, snapshot(model))
    assert model.lr == found.suggestion()
    assert len(found.results["loss"]) >= 10
    run.fit(model)
    assert steps_of(model) == 20


@feature("Tools", "batch-size scaler")
@both
def test_scale_batch_size(tmp_path: Path, config: LRTTConfig) -> None:
    """Doubles the batch, sets it, and leaves the tiles as it found them."""

    class Loaders(Full):
        def val_dataloader(self) -> DataLoader:
            return loader(2)

    model = fresh(Loaders)
    run = trainer(tmp_path, [], config, max_epochs=1, default_root_dir=tmp_path)
    LRTTStrategy(config).connect(model)
    before = snapshot(model)
    Tuner(run).scale_batch_size(model, init_val=4, max_trials=2, steps_per_trial=2)
    assert model.batch_size == 8
    assert same(before, snapshot(model))
    run.fit(model)
    assert steps_of(model) == 10


@feature("Tools", "profilers: simple, advanced, pytorch")
@both
@pytest.mark.parametrize("profiler", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_profiler(tmp_path: Path, config: LRTTConfig, profiler: Any) -> None:
    """They run and report the strategy's step; the bits are those of a run without."""
    states = []
    for used in (None, profiler(dirpath=tmp_path, filename="report")):
        model = fresh()
        trainer(tmp_path, [], config, profiler=used, max_steps=4).fit(model, loader(4))
        states.append(snapshot(model))
    assert same(*states)
    report = next(tmp_path.glob("*report*.txt")).read_text()
    assert "optimizer_step" in report or "training_step" in report


@feature("Tools", "fast_dev_run, overfit_batches, limit_*")
@both
@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"overfit_batches": 2, "max_epochs": 3}, 6),
        ({"limit_train_batches": 5, "limit_val_batches": 1}, 5),
        ({"limit_train_batches": 0.5, "val_check_interval": 2}, 10),
        ({"max_steps": 7}, 7),
        ({"max_time": {"hours": 1}, "max_epochs": 1, "barebones": True}, 20),
    ],
    ids=["fast_dev_run", "fast_dev_run-3", "overfit", "limits", "val_check_interval", "max_steps", "barebones"],
)
def test_limits(tmp_path: Path, config: LRTTConfig, kwargs: dict[str, Any], steps: int) -> None:
    """As many steps as asked for; likewise max_steps, max_time, val_check_interval, barebones."""
    if kwargs.get("barebones"):
        kwargs = kwargs | {"logger": None, "enable_checkpointing": None, "log_every_n_steps": None}
        kwargs |= {"enable_progress_bar": None, "enable_model_summary": None}
    model = fresh()
    trainer(tmp_path, [], config, **kwargs).fit(model, loader(), loader(2))
    assert steps_of(model) == steps


# ------------------------------------------------------------------ data


@feature("Data", "several dataloaders (CombinedLoader)")
@both
@pytest.mark.parametrize(("mode", "steps"), [("max_size_cycle", 6), ("max_size", 6), ("min_size", 4)])
def test_combined_loader(tmp_path: Path, config: LRTTConfig, mode: Any, steps: int) -> None:
    """The modes that Lightning trains with; a tile that is called once a loader latches every call of the step.
    Two validation loaders.
    """

    class Two(Full):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return sum(super(Two, self).training_step(part, batch_idx) for part in batch.values() if part is not None)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    model = fresh(Two)
    both_loaders = CombinedLoader({"a": loader(6), "b": DataLoader(loader(4).dataset, 4)}, mode)
    run = trainer(tmp_path, [], config)
    run.fit(model, both_loaders, [loader(2), loader(3)])
    assert steps_of(model) == steps
    assert {"val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"} <= set(run.callback_metrics)
