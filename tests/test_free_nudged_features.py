"""The Trainer's features with a `FreeNudgedModule` on tiles; tests/test_free_nudged_trainer.py has plain weights."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from features import both, feature
from graph_helpers import assert_same_run, run
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import DIGITAL
from rerun_recorder import RehearsedGraph
from test_free_nudged_graph import Quiet, rows
from test_free_nudged_trainer import Module, dataset, trainer, weights
from torch.utils.data import DataLoader

from lightning_lrtt import IOConfig, LRTTConfig, LRTTStrategy, ResumableLoader
from lightning_lrtt.free_nudged import Estimator
from lightning_lrtt.nn import find_tiles

GROUP = "Two-phase training (FreeNudgedModule)"


def on_tiles(tmp_path: Path, config: LRTTConfig, batch_size: int = 16, **kwargs: Any) -> Module:
    """Two epochs of four batches."""
    module = kwargs.pop("module", None) or Module(lr=0.05)
    run = trainer(tmp_path, strategy=LRTTStrategy(config=config), **({"max_epochs": 2} | kwargs))
    run.fit(module, DataLoader(dataset(), batch_size))
    return module


def effective(module: Module) -> torch.Tensor:
    return torch.cat([tile.effective_weight().flatten() for tile in find_tiles(module).values()])


@feature(GROUP, "fit, validate, test, predict")
@both
def test_loops(tmp_path: Path, config: LRTTConfig) -> None:
    """The couplings become tiles and learn; the loops relax out of inference mode and change nothing."""
    module = Module(lr=0.02 if config is DIGITAL else 0.1)
    runner = trainer(tmp_path, strategy=LRTTStrategy(config=config), max_epochs=20)
    runner.fit(module, DataLoader(dataset(), 8), DataLoader(dataset(), 64))
    before = weights(module)
    assert runner.test(module, DataLoader(dataset(), 64), verbose=False)[0]["test/acc"] > 0.7  # guessing: 0.33
    x = DataLoader([row[0] for row in dataset()], 64)
    (out,) = runner.predict(module, x)
    assert torch.equal(out, module(dataset().tensors[0])) and torch.equal(before, weights(module))


@feature(GROUP, "accumulate_grad_batches", tiles="digital")
def test_accumulation(tmp_path: Path) -> None:
    """4 batches of 16 equal one of 64 to rounding: a mean over the batch is a mean of means."""
    one, other = (on_tiles(tmp_path, DIGITAL, n, accumulate_grad_batches=64 // n, max_epochs=3) for n in (16, 64))
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=2e-6)


@feature(GROUP, "gradient clipping by norm")
@both
def test_clipping(tmp_path: Path, config: LRTTConfig) -> None:
    """A bound far below the gradient's norm makes the first step small."""
    start = effective(on_tiles(tmp_path, config, 64, max_epochs=1, module=Module(lr=0.0)))
    free, clipped = (
        effective(on_tiles(tmp_path, config, 64, max_epochs=1, module=Module(lr=0.5), gradient_clip_val=bound))
        for bound in (None, 0.01)
    )
    # Pulsed: 0.5 * 0.01 is 2.5 steps of a device over the whole network; what is left is the write of single pulses.
    assert float((clipped - start).norm()) < 0.2 * float((free - start).norm())


@feature(GROUP, "bf16-mixed")
@both
def test_mixed_precision(tmp_path: Path, config: LRTTConfig) -> None:
    """Relaxed in float32; the products of the surrogate are rounded. The first step is close to float32's."""
    start = effective(on_tiles(tmp_path, config, 64, max_epochs=1, module=Module(lr=0.0)))
    one, other = (
        effective(on_tiles(tmp_path, config, 64, max_epochs=1, module=Module(lr=0.5), precision=precision))
        for precision in ("bf16-mixed", "32-true")
    )
    # Rounding to 2^-8 moves probabilities by as much: few of the pulses differ.
    assert float((one - other).norm()) < (0.02 if config is DIGITAL else 0.5) * float((other - start).norm())


@feature(GROUP, "64-true", tiles="digital")
def test_double(tmp_path: Path) -> None:
    """Relaxes and learns in float64."""
    module = on_tiles(tmp_path, DIGITAL, precision="64-true")
    assert {p.dtype for p in module.parameters()} == {torch.float64}


@feature(GROUP, "resume from a checkpoint")
@both
def test_resume(tmp_path: Path, config: LRTTConfig) -> None:
    """Stopped after 5 of 8 batches: the bits of the run that never stopped, drawn signs of the nudge included."""

    def resumed(checkpoint: Path | None) -> Module:
        module = Module(lr=0.05, estimator=Estimator(kind="random_sign"), free_steps=3)
        save = ModelCheckpoint(tmp_path, "at", every_n_train_steps=5, save_top_k=1, enable_version_counter=False)
        more: dict[str, Any] = {} if checkpoint else {"callbacks": [save], "enable_checkpointing": True}
        again = trainer(tmp_path, strategy=LRTTStrategy(config=config), max_steps=9, max_epochs=2, **more)
        again.fit(module, ResumableLoader(dataset(), 8, seed=4), ckpt_path=checkpoint)
        return module

    one, other = resumed(None), resumed(tmp_path / "at.ckpt")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@feature(GROUP, "EMAWeightAveraging, StochasticWeightAveraging")
@both
@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_averaging(tmp_path: Path, config: LRTTConfig, kind: str) -> None:
    """The averaged model is a system on tiles that relaxes; it is not the last one."""
    average = EMAWeightAveraging(decay=0.9) if kind == "EMA" else StochasticWeightAveraging(0.05, swa_epoch_start=1)
    module = on_tiles(tmp_path, config, max_epochs=3, callbacks=[average])
    assert bool(torch.isfinite(module(dataset().tensors[0])).all())
    assert not torch.equal(effective(module), effective(on_tiles(tmp_path, config, max_epochs=3)))


@feature(GROUP, "CUDAGraph")
@both
def test_recorded_steps(tmp_path: Path, config: LRTTConfig) -> None:
    """Whole steps, both phases and the update, are recorded: the eager run's bits (rehearsed on a CPU; a GPU test runs
    the examples).
    """
    graph = RehearsedGraph(on_failure="raise")
    recorded = run(tmp_path, config, [graph], partial(Quiet, statistics=True), train=rows())
    assert graph.replays == 26
    assert_same_run(recorded, run(tmp_path, config, [], partial(Quiet, statistics=True), train=rows()))


@feature(GROUP, "init='previous', tolerance under CUDAGraph", refused=True)
@both
def test_not_recorded(tmp_path: Path, config: LRTTConfig) -> None:
    """Warm starts hand on new tensors and a tolerance reads from the device: such steps stay eager, with the reason."""
    graph = RehearsedGraph()
    run(tmp_path, config, [graph], partial(Quiet, init="previous"), train=rows())
    assert any("carried changes in the step" in reason for reason in graph.reasons)


@feature(GROUP, "converters (IOConfig)", refused=True)
@both
def test_converters(tmp_path: Path, config: LRTTConfig) -> None:
    """Relaxation multiplies by the effective weight and would bypass them: refused at setup."""
    with pytest.raises(MisconfigurationException, match=r"config\.io of a coupling's tile must be None"):
        on_tiles(tmp_path, dataclasses.replace(config, io=IOConfig()))
