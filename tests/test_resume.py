"""Exact resume: at any step, in the middle of an epoch, and after kill -9; and the loader that makes it possible."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning_helpers import DIGITAL, PULSED, trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_lrtt import LRTTConfig, LRTTStrategy, ResumableLoader, build_info
from lightning_lrtt.nn import find_tiles
from lightning_lrtt.strategies.resume import AtomicCheckpointIO, collect_rng, restore_rng

both = pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
EPOCHS, BATCHES = 3, 7


class Augmented(Dataset[Any]):
    """Samples with noise from all three global generators."""

    def __len__(self) -> int:
        return 4 * BATCHES - 2  # the last batch is smaller

    def __getitem__(self, index: int) -> Any:
        x = torch.arange(6.0) / 6 + index / 30
        noise = torch.randn(6) + random.random() + np.random.rand()
        return x + 0.01 * noise, x[:3].sin()


class Dropped(pl.LightningModule):
    """An MLP with dropout, Adam, a schedule and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7), "interval": "step"}]


def data(**kwargs: Any) -> ResumableLoader:
    """Training data in a new order every epoch."""
    return ResumableLoader(Augmented(), batch_size=4, seed=3, **kwargs)


def quiet_data() -> ResumableLoader:
    """Validation data that draw nothing: resumed from a step before a validation, Lightning skips that one."""
    x = torch.arange(60.0).view(10, 6) / 60
    return ResumableLoader(TensorDataset(x, x[:, :3].sin()), batch_size=5, shuffle=False)


def fit(
    folder: Path, config: LRTTConfig, ckpt_path: Any = None, train: Any = None, val: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """One run, fresh or resumed; the checkpoint of its end."""
    torch.manual_seed(0 if ckpt_path is None else 1234)  # a resumed process has another history
    random.seed(0 if ckpt_path is None else 1234)
    np.random.seed(0 if ckpt_path is None else 1234)
    run = trainer(
        folder,
        kwargs.pop("callbacks", []),
        config,
        max_epochs=EPOCHS,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=True,
        **kwargs,
    )
    run.fit(
        Dropped(),
        data() if train is None else train,
        quiet_data() if val is None else val,
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    run.save_checkpoint(folder / "end.ckpt")
    return torch.load(folder / "end.ckpt", weights_only=True)


def saver(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    """A checkpoint after every step, all kept."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, **kwargs)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two trees of tensors and builtins differ by a bit, dtypes included."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    return [] if type(one) is type(other) and one == other else [path]


def same_end(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Model, optimizer, schedule, counters, generators."""
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "lrtt"):
        assert not differences(one[key], other[key], key)


# ------------------------------------------------------------------ any step


@both
def test_resume_at_any_step_is_exact(tmp_path: Path, config: LRTTConfig) -> None:
    """First and last step of an epoch, inside a cycle (T = 4) and at its end, and the steps around validation."""
    whole = fit(tmp_path, config, callbacks=[saver(tmp_path / "steps")])
    assert whole["global_step"] == EPOCHS * BATCHES
    assert whole["state_dict"]["net.0.tile_state"].dtype == torch.int64
    for step in (1, 4, 6, 7, 8, 10, 14, 17, 20):
        rest = fit(tmp_path / str(step), config, tmp_path / "steps" / f"step={step}.ckpt")
        same_end(whole, rest)


@both
def test_resume_inside_an_epoch_that_validates_twice(tmp_path: Path, config: LRTTConfig) -> None:
    """A checkpoint of the step after which validation runs, and one that validation wrote."""
    at_validation = ModelCheckpoint(tmp_path / "val", "{step}", monitor="val/loss", save_top_k=-1)
    options = {"val_check_interval": 3}
    whole = fit(tmp_path, config, callbacks=[saver(tmp_path / "steps"), at_validation], **options)
    for path in (tmp_path / "steps/step=5.ckpt", tmp_path / "val/step=3.ckpt", tmp_path / "val/step=13.ckpt"):
        same_end(whole, fit(tmp_path / "rest", config, path, **options))


@both
def test_resume_with_accumulation(tmp_path: Path, config: LRTTConfig) -> None:
    """7 batches in groups of 3; checkpoints lie at optimizer steps."""
    whole = fit(tmp_path, config, callbacks=[saver(tmp_path / "steps")], accumulate_grad_batches=3)
    assert whole["global_step"] == EPOCHS * 3
    for step in (1, 3, 5):
        rest = fit(tmp_path / str(step), config, tmp_path / "steps" / f"step={step}.ckpt", accumulate_grad_batches=3)
        same_end(whole, rest)


def test_resume_of_shortened_epochs(tmp_path: Path) -> None:
    """limit_train_batches: the loader is left in the middle of its order at every epoch's end."""
    whole = fit(tmp_path, PULSED, callbacks=[saver(tmp_path / "steps")], limit_train_batches=4)
    for step in (3, 4, 8, 9):
        rest = fit(tmp_path / str(step), PULSED, tmp_path / "steps" / f"step={step}.ckpt", limit_train_batches=4)
        same_end(whole, rest)


def test_resume_between_epochs_with_a_plain_dataloader(tmp_path: Path) -> None:
    """Its shuffle comes from torch's global generator, which the strategy saves."""
    loaders = {"train": DataLoader(Augmented(), 4, shuffle=True), "val": DataLoader(Augmented(), 9)}
    ends = ModelCheckpoint(tmp_path / "ends", "{epoch}", save_top_k=-1)
    whole = fit(tmp_path, DIGITAL, callbacks=[ends], **loaders)
    for epoch in (0, 1):
        same_end(whole, fit(tmp_path / "rest", DIGITAL, tmp_path / "ends" / f"epoch={epoch}.ckpt", **loaders))


def test_a_checkpoint_without_generators_resumes(tmp_path: Path) -> None:
    fit(tmp_path, DIGITAL)
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)
    del state["lrtt"]
    torch.save(state, tmp_path / "old.ckpt")
    run = trainer(tmp_path, [], DIGITAL, max_epochs=EPOCHS + 1, logger=False)
    run.fit(Dropped(), data(), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert run.global_step == (EPOCHS + 1) * BATCHES


def test_evaluation_and_weights_only_checkpoints_leave_generators_alone(tmp_path: Path) -> None:
    fit(tmp_path, DIGITAL)
    run = trainer(tmp_path, [], DIGITAL, logger=False)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run.validate(
        Dropped(), ResumableLoader(torch.rand(0, 6)), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True
    )
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "lrtt" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


def test_generators_round_trip() -> None:
    """Through builtins and tensors, half of a Gaussian pair included."""
    random.gauss(0, 1), np.random.randn()
    state = collect_rng(torch.device("cpu"))
    draws = [(torch.rand(1).item(), random.gauss(0, 1), np.random.randn()) for _ in range(2)]
    restore_rng(state, torch.device("cpu"))
    assert draws == [(torch.rand(1).item(), random.gauss(0, 1), np.random.randn()) for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not build_info()["with_cuda"], reason="needs a GPU with CUDA kernels"
)
@both
def test_resume_on_a_gpu_is_exact_and_goes_on_on_a_cpu(tmp_path: Path, config: LRTTConfig) -> None:
    """Dropout draws from the GPU's generator there."""
    options = {"accelerator": "gpu", "devices": 1}
    whole = fit(tmp_path, config, callbacks=[saver(tmp_path / "steps")], **options)
    for step in (1, 6, 10):
        path = tmp_path / "steps" / f"step={step}.ckpt"
        assert torch.load(path, weights_only=True)["lrtt"]["rng"]["cuda"].dtype == torch.uint8
        same_end(whole, fit(tmp_path / str(step), config, path, **options))
        assert fit(tmp_path / "cpu", config, path)["global_step"] == EPOCHS * BATCHES


# ------------------------------------------------------------------ kill -9

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_resume as t
folder = Path(sys.argv[1])
config = t.PULSED if sys.argv[2] == "pulsed" else t.DIGITAL
t.fit(folder, config, callbacks=[t.saver(folder / "steps", save_last=True)])
"""


@pytest.mark.parametrize("config", ["digital", "pulsed"])
def test_resume_after_kill_9(tmp_path: Path, config: str) -> None:
    """Killed at a random moment after the first checkpoint: every file with a checkpoint's name is whole, and the last
    one leads to the bits of the run that was left alone.
    """
    numbers = PULSED if config == "pulsed" else DIGITAL
    whole = fit(tmp_path / "whole", numbers)
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), config],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def written() -> list[Path]:
        return list(folder.glob("steps/step=*.ckpt"))

    try:
        limit = time.monotonic() + 280
        while not written():
            # It may have written all of them and ended since we looked.
            assert process.poll() is None or written(), process.stderr.read() if process.stderr else ""
            assert time.monotonic() < limit, "no checkpoint within 280 s"
            time.sleep(0.005)
        time.sleep(random.SystemRandom().uniform(0.0, 0.3))  # the 21 steps take about that long
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    found = sorted(written(), key=lambda path: int(path.stem.partition("=")[2]))
    states = [torch.load(path, weights_only=True) for path in found]
    assert [state["global_step"] for state in states] == list(range(1, len(found) + 1))
    same_end(whole, fit(tmp_path / "rest", numbers, found[-1]))


def test_a_checkpoint_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written in the checkpoint's own folder, because a rename is atomic within one file system only."""
    io, path, seen = AtomicCheckpointIO(), tmp_path / "deep" / "model.ckpt", []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        seen.append((Path(source).parent, torch.load(source, weights_only=True)["a"], Path(target).exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    io.save_checkpoint({"a": 1}, path)
    io.save_checkpoint({"a": 2}, path)
    assert seen == [(path.parent, 1, False), (path.parent, 2, True)]
    with pytest.raises(Exception, match=r"pickle|local"):
        io.save_checkpoint({"a": lambda: None}, path)
    assert io.load_checkpoint(path, weights_only=True) == {"a": 2}
    assert [file.name for file in path.parent.iterdir()] == ["model.ckpt"]


def test_the_strategy_writes_atomically_also_under_a_wrapper(tmp_path: Path) -> None:
    assert isinstance(LRTTStrategy().checkpoint_io, AtomicCheckpointIO)
    wrapper = AsyncCheckpointIO()
    run = trainer(tmp_path, [], DIGITAL, plugins=[wrapper])
    assert run.strategy.checkpoint_io is wrapper
    assert isinstance(wrapper.checkpoint_io, AtomicCheckpointIO)
    mine = AtomicCheckpointIO()
    assert LRTTStrategy(checkpoint_io=mine).checkpoint_io is mine


# ------------------------------------------------------------------ the loader


def batches(loader: Any) -> list[list[int]]:
    """Of integers."""
    return [batch.tolist() for batch in loader]


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    loader = ResumableLoader(range(10), batch_size=3, seed=1)
    first, second = batches(loader), batches(loader)
    assert sorted(sample for batch in first for sample in batch) == list(range(10))
    assert [len(b) for b in first] == [3, 3, 3, 1]
    assert len(loader) == 4
    assert first != second
    assert first != batches(ResumableLoader(range(10), batch_size=3, seed=2))
    again = ResumableLoader(range(10), batch_size=3, seed=1)
    again.set_epoch(1)
    assert batches(again) == second
    assert batches(ResumableLoader(range(5), 2, shuffle=False, drop_last=True)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3, 4, 6])
def test_the_loader_goes_on_where_it_was(taken: int, num_workers: int) -> None:
    """Counted are the batches handed out, not those that workers fetched ahead."""

    def make() -> ResumableLoader:
        return ResumableLoader(range(10), batch_size=3, seed=1, num_workers=num_workers)

    loader, stream = make(), []
    iterator = iter(loader)
    for _ in range(taken):
        batch = next(iterator, None)
        if batch is None:
            iterator = iter(loader)
            batch = next(iterator)
        stream.append(batch.tolist())
    state = loader.state_dict()
    rest = batches(iterator) + batches(loader)
    resumed = make()
    resumed.load_state_dict(state)
    resumed.load_state_dict(resumed.state_dict())
    if taken == 4:  # at the end of an epoch: the next one starts
        assert batches(resumed) == rest
    else:
        assert batches(resumed) + batches(resumed) == rest


def test_iterating_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    batches(ResumableLoader(range(10), batch_size=3))
    assert torch.equal(state, torch.get_rng_state())


def test_a_state_of_another_order_is_refused_inside_an_epoch() -> None:
    loader = ResumableLoader(range(10), batch_size=3)
    next(iter(loader))
    message = "ResumableLoader: batch_size must be as in the checkpoint, 3, got 5; it lies in the middle"
    with pytest.raises(ValueError, match=message):
        ResumableLoader(range(10), batch_size=5).load_state_dict(loader.state_dict())
    batches(loader)
    ResumableLoader(range(10), batch_size=5).load_state_dict(loader.state_dict())  # between epochs


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_an_epoch(monkeypatch: pytest.MonkeyPatch, drop_last: bool) -> None:
    """Equally many batches each; together everything, but for what drop_last leaves out."""
    parts = []
    for rank in range(3):
        monkeypatch.setattr("lightning_lrtt.data._process", lambda rank=rank: (rank, 3))
        parts.append(batches(ResumableLoader(range(10), batch_size=2, drop_last=drop_last)))
    assert len({len(part) for part in parts}) == 1
    seen = [sample for part in parts for batch in part for sample in batch]
    assert len(set(seen)) == (6 if drop_last else 10)
    assert len(seen) == (6 if drop_last else 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "ResumableLoader: batch_size must be >= 1, got 0"),
        ({"seed": -1}, "ResumableLoader: seed must be >= 0, got -1"),
    ],
)
def test_loader_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableLoader(range(3), **arguments)


def test_integer_state_keeps_its_dtype(tmp_path: Path) -> None:
    """Counters and keys are int64 in the checkpoint and after loading, also in a float64 model."""

    class Double(Dropped):
        def on_fit_start(self) -> None:
            self.seen = {t.tile_state.dtype for t in find_tiles(self).values()}

    run = trainer(tmp_path, [], DIGITAL, precision="64-true", max_epochs=1, logger=False)
    run.fit(Double(), data())
    run.save_checkpoint(tmp_path / "double.ckpt")
    model = Double()
    rest = trainer(tmp_path, [], DIGITAL, precision="64-true", max_epochs=2, logger=False)
    rest.fit(model, data(), ckpt_path=tmp_path / "double.ckpt", weights_only=True)
    assert model.seen == {torch.int64}
    assert model.net[0].A.dtype == torch.float64
    state = torch.load(tmp_path / "double.ckpt", weights_only=True)["state_dict"]
    assert state["net.0.tile_counts"].dtype == torch.int64
