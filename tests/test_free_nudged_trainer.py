"""`FreeNudgedModule` under Lightning's Trainer: automatic optimisation and what hangs on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import clean_environment
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import PULSED, Net, loader
from lightning_lrtt.callbacks import FreeNudgedMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTTConfig, LRTTStrategy, ResumableLoader
from lightning_lrtt.free_nudged import DecayingBeta, Estimator, FreeNudgedModule, HopfieldMLP, ResistiveMLP, System
from lightning_lrtt.nn import find_tiles

DIGITAL = LRTTConfig(rank=2, transfer_every=4)


def dataset(n: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, (x[:, :3].argmax(1)))


class Module(FreeNudgedModule):
    """Three classes, SGD."""

    def __init__(self, lr: float = 0.2, **kwargs: Any) -> None:
        torch.manual_seed(0)
        super().__init__(HopfieldMLP([6, 8, 3]), **({"free_steps": 12, "nudged_steps": 6} | kwargs))
        self.lr = lr

    def test_step(self, batch: Any, batch_idx: int) -> None:
        assert torch.is_inference_mode_enabled()
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def trainer(tmp_path: Path, **kwargs: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "logger": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**(defaults | kwargs))


def weights(module: FreeNudgedModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in module.system.parameters()])


def train(tmp_path: Path, batch_size: int = 16, module: Module | None = None, **kwargs: Any) -> Module:
    module = Module() if module is None else module
    trainer(tmp_path, **kwargs).fit(module, DataLoader(dataset(), batch_size))
    return module


@pytest.mark.parametrize(
    ("strategy", "lr"),
    [("auto", 0.2), (LRTTStrategy(config=DIGITAL), 0.02), (LRTTStrategy(config=PULSED), 0.1)],
    ids=["dense", "digital", "pulsed"],
)
def test_it_learns_and_tests_in_inference_mode(tmp_path: Path, strategy: Any, lr: float) -> None:
    module = Module(lr=lr)
    run = trainer(tmp_path, strategy=strategy, max_epochs=30)
    run.fit(module, DataLoader(dataset(), 8), DataLoader(dataset(), 64))
    assert len(find_tiles(module)) == (0 if strategy == "auto" else 2)
    assert run.test(module, DataLoader(dataset(), 64), verbose=False)[0]["test/acc"] > 0.8  # guessing: 0.33
    assert float(run.callback_metrics.get("val/loss", 0.0)) < 0.25


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    """4 x 16 and 1 x 64, to float32 rounding."""
    torch.testing.assert_close(
        weights(train(tmp_path, 16, accumulate_grad_batches=4)), weights(train(tmp_path, 64)), rtol=0, atol=1e-6
    )


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    """The move of one step has the norm lr * 0.01."""
    start = weights(Module())
    free, clipped = (weights(train(tmp_path, 64, **kwargs)) for kwargs in ({}, {"gradient_clip_val": 0.01}))
    assert float((clipped - start).norm()) == pytest.approx(0.2 * 0.01, rel=1e-3)
    assert float((free - start).norm()) > 0.01


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(tmp_path: Path, precision: str) -> None:
    """Mixed: relaxed in float32, close to float32 training (products of the surrogate are rounded to 2^-8)."""
    found, reference = train(tmp_path, precision=precision), train(tmp_path)
    start = weights(Module())
    assert {p.dtype for p in found.parameters()} == {torch.float64 if precision == "64-true" else torch.float32}
    move = (weights(reference) - start).norm()
    assert float((weights(found) - weights(reference)).norm() / move) < (0.02 if precision == "bf16-mixed" else 1e-4)


@pytest.mark.parametrize("config", [None, DIGITAL, PULSED], ids=["dense", "digital", "pulsed"])
@pytest.mark.parametrize("init", ["zeros", "previous"])
def test_resume_in_the_middle(tmp_path: Path, init: str, config: LRTTConfig | None) -> None:
    """Stopped after 5 of 8 batches and resumed: the bits of the run that never stopped, warm states and signs
    included.
    """

    def run(checkpoint: Path | None) -> Module:
        torch.manual_seed(1)
        module = Module(lr=0.05, init=init, estimator=Estimator(kind="random_sign"), free_steps=3)
        save = ModelCheckpoint(
            dirpath=tmp_path, filename="at", every_n_train_steps=5, save_top_k=1, enable_version_counter=False
        )
        strategy: Any = "auto" if config is None else LRTTStrategy(config=config)
        again = trainer(
            tmp_path,
            strategy=strategy,
            max_steps=9,
            max_epochs=2,
            **({"callbacks": [save], "enable_checkpointing": True} if checkpoint is None else {}),
        )
        again.fit(module, ResumableLoader(dataset(), 8, seed=4), ckpt_path=checkpoint)
        assert again.global_step == 9
        return module

    one, other = run(None), run(tmp_path / "at.ckpt")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    if init == "previous":
        assert all(torch.equal(s, other.engine.previous[name]) for name, s in one.engine.previous.items())


def test_two_workers_equal_one(tmp_path: Path) -> None:
    """DDP 2 x 32 and 1 x 64: a mean over the batch is a mean of the workers' means. The order of additions differs."""
    alone = train(tmp_path, 64, max_epochs=3)
    # In a process of its own: to fork one in which an earlier test ran gloo hangs.
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    both = torch.load(tmp_path / "both.pt", weights_only=True)
    torch.testing.assert_close(both, weights(alone), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "average", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(0.05, swa_epoch_start=1)], ids=["EMA", "SWA"]
)
def test_averaging(tmp_path: Path, average: Any) -> None:
    module = train(tmp_path, max_epochs=3, callbacks=[average])
    assert module.engine.system is module.system
    assert not torch.equal(weights(module), weights(train(tmp_path, max_epochs=3)))


def test_fast_dev_run_and_schedule(tmp_path: Path) -> None:
    train(tmp_path, fast_dev_run=True)
    module = train(tmp_path, module=Module(schedule=DecayingBeta(beta=0.4, every=2)))
    assert float(module.beta) == pytest.approx(0.2)  # at step 3 of 4


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_parameters_are_refused(tmp_path: Path, precision: str) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"must keep float32 or float64 parameters, got '{precision}'; .*'bf16-mixed'"
    ):
        train(tmp_path, precision=precision)
    with pytest.raises(MisconfigurationException, match=r"got torch\.bfloat16 in the system"):
        train(tmp_path, module=Module().to(torch.bfloat16))


def test_direct_form_is_refused_under_mixed_precision(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="form must be 'difference' under precision 'bf16-mixed'"):
        train(tmp_path, module=Module(form="direct"), precision="bf16-mixed")


# ------------------------------------------------------------------ projection and registered state


class Held(Module):
    """A system that is given; the step is long enough to project at every update."""

    def __init__(self, system: System, lr: float = 0.5, **kwargs: Any) -> None:
        super().__init__(lr, **kwargs)
        self.system = self.engine.system = system


def resistive(**kwargs: Any) -> Held:
    torch.manual_seed(0)
    return Held(ResistiveMLP([6, 8, 3]), **kwargs)


def lowest(values: Any) -> float:
    return min(float(value.min()) for value in values)


class Lowest(pl.Callback):
    """The smallest parameter that a callback sees after a batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.seen.append(lowest(pl_module.parameters()))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["auto", "lrtt"])
def test_parameters_are_physical_before_callbacks_see_them(tmp_path: Path, strategy: str, accumulate: int) -> None:
    """Checkpoints and averages take them after a batch: no conductance below 0 in either, and resume is exact."""
    raw = resistive()
    raw.system.project = lambda: None  # type: ignore[method-assign]
    assert lowest(train(tmp_path, 8, module=raw).parameters()) < 0  # there is something to project

    def fit(checkpoint: Path | None) -> tuple[Held, Lowest]:
        save = ModelCheckpoint(tmp_path, "at", every_n_train_steps=3, save_top_k=1, enable_version_counter=False)
        more: dict[str, Any] = {"enable_checkpointing": True} if checkpoint is None else {}
        seen, module = Lowest(), resistive()
        again = trainer(
            tmp_path,
            strategy=strategy,
            max_steps=5,
            max_epochs=9,
            accumulate_grad_batches=accumulate,
            callbacks=[seen, EMAWeightAveraging(decay=0.9), *([save] if checkpoint is None else [])],
            **more,
        )
        again.fit(module, ResumableLoader(dataset(), 8, seed=4), ckpt_path=checkpoint)
        return module, seen

    one, seen = fit(None)
    saved = torch.load(tmp_path / "at.ckpt", weights_only=False)
    assert min(seen.seen) == 0.0 and lowest(one.parameters()) >= 0
    assert lowest(v for part in ("state_dict", "current_model_state") for v in saved.get(part, {}).values()) >= 0
    other, _ = fit(tmp_path / "at.ckpt")
    assert torch.equal(weights(one), weights(other))


class Drifting(HopfieldMLP):
    """Noise that goes on from batch to batch, and a drift that is neither a parameter nor a buffer."""

    stackable = False

    def __init__(self, register: bool = True) -> None:
        super().__init__([6, 8, 3])
        self.noise = torch.Generator().manual_seed(5)
        self.drift, self.register = [torch.zeros(3)], register
        self.register_buffer("seen", torch.zeros(3))

    def registered(self) -> dict[str, Any]:
        return {"noise": self.noise, "drift": self.drift, "seen": self.seen} if self.register else {}

    def window(self, **kwargs: Any) -> Any:
        states = super().window(**kwargs)
        push = self.drift[0].add_(0.01 * torch.randn(3, generator=self.noise))
        self.seen.add_(1)
        states[self._outputs] = states[self._outputs].clone()
        self.output(states=states).add_(push)
        return states


def test_resume_with_registered_generators_and_tensors(tmp_path: Path) -> None:
    """The bits of the run that never stopped, from a file that loads with ``weights_only``; buffers are saved once."""

    def fit(checkpoint: Path | None) -> Held:
        torch.manual_seed(0)
        module = Held(Drifting(), lr=0.05)
        save = ModelCheckpoint(tmp_path, "at", every_n_train_steps=5, save_top_k=1, enable_version_counter=False)
        more: dict[str, Any] = {"callbacks": [save], "enable_checkpointing": True} if checkpoint is None else {}
        again = trainer(tmp_path, max_steps=9, max_epochs=2, **more)
        again.fit(module, ResumableLoader(dataset(), 8, seed=4), ckpt_path=checkpoint, weights_only=True)
        return module

    one, other = fit(None), fit(tmp_path / "at.ckpt")
    assert torch.equal(weights(one), weights(other))
    assert torch.equal(one.system.drift[0], other.system.drift[0]) and float(one.system.drift[0].abs().min()) > 0
    assert torch.equal(one.system.noise.get_state(), other.system.noise.get_state())
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    assert sorted(saved["free_nudged_registered"]) == ["drift.0", "noise"]


def test_registered_state_of_other_checkpoints() -> None:
    """None in the file: nothing changes. A drift of another shape: refused. A generator of another device: a warning."""
    module, saved = Held(Drifting()), {}
    state = module.system.noise.get_state()
    module.on_load_checkpoint({})
    assert torch.equal(module.system.noise.get_state(), state) and not module.system.drift[0].any()
    module.on_save_checkpoint(saved)
    saved["free_nudged_registered"] |= {"noise": torch.zeros(16, dtype=torch.uint8), "gone": torch.zeros(2)}
    with pytest.warns(UserWarning, match="generator 'noise' must be of the kind of cpu"):
        module.on_load_checkpoint(saved)
    assert torch.equal(module.system.noise.get_state(), state)
    saved["free_nudged_registered"]["drift.0"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"registered 'drift.0' must be of the checkpoint's shape \[4\], got \[3\]"):
        module.on_load_checkpoint(saved)
    plain: dict[str, Any] = {}
    Held(Drifting(register=False)).on_save_checkpoint(plain)
    assert plain == {}


# ------------------------------------------------------------------ the monitor


def test_monitor_logs_to_tensorboard(tmp_path: Path) -> None:
    """Tags, steps, one layout; values against the module's own; the comparison with BPTT changes no weight."""
    logger = TensorBoardLogger(str(tmp_path), name="run", version=0)
    module = train(tmp_path, 8, logger=logger, max_epochs=2, callbacks=[FreeNudgedMonitor(bptt_every_n_steps=4)])
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("free_nudged/")]
    assert sorted(tags) == sorted(
        f"free_nudged/{name}"
        for name in (
            "cost_free",
            "cost_nudged",
            "residual_free",
            "residual_nudged",
            "phase_distance",
            "saturation",
            "beta",
            "cosine_bptt",
            "error_bptt",
        )
    )
    assert [e.step for e in events.Scalars("free_nudged/beta")] == list(range(1, 16, 2))
    assert [e.value for e in events.Scalars("free_nudged/beta")] == pytest.approx([0.1] * 8)
    cosines = events.Scalars("free_nudged/cosine_bptt")
    assert [e.step for e in cosines] == [0, 4, 8, 12] and all(e.value > 0.99 for e in cosines)
    nudged, free = (events.Scalars(f"free_nudged/cost_{name}") for name in ("nudged", "free"))
    assert all(a.value < b.value for a, b in zip(nudged, free, strict=True))
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert not module.statistics  # switched off again
    assert torch.equal(weights(module), weights(train(tmp_path, 8, max_epochs=2)))


def test_monitor_refuses_what_it_cannot_watch(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="the module must be a FreeNudgedModule, got Net"):
        trainer(tmp_path, callbacks=[FreeNudgedMonitor()]).fit(Net(), loader(2))
    with pytest.raises(MisconfigurationException, match="bptt_every_n_steps must be None with init='previous'"):
        train(tmp_path, module=Module(init="previous"), callbacks=[FreeNudgedMonitor(bptt_every_n_steps=1)])
    with pytest.raises(ValueError, match="every_n_steps must be >= 1, got 0"):
        FreeNudgedMonitor(every_n_steps=0)


def test_stats_are_means_of_what_was_recorded(tmp_path: Path) -> None:
    module = Module(statistics=True)
    x, y = dataset().tensors
    costs = []
    for _ in range(3):
        module.training_step((x, y)).backward()
        states = module.engine.free(x)
        costs.append(float(module.system.cost(states=states, target=module.system.encode(target=y)).mean()))
        with torch.no_grad():
            for p in module.system.parameters():
                p -= 0.1 * p.grad
    found = module.stats.read()
    assert found["cost_free"] == pytest.approx(sum(costs) / 3, rel=1e-5)
    assert found["beta"] == pytest.approx(0.1)
    assert 0 < found["phase_distance"] < 0.2
    assert module.stats.read() == {}


def test_checkpoints_hold_no_engine(tmp_path: Path) -> None:
    """Only parameters: the file loads into a plain network of the same layers."""
    module = Module()
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="m")])
    run.fit(module, DataLoader(dataset(), 16))
    state = torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"]
    assert sorted(state) == sorted(f"system.layers.{i}.{n}" for i in (0, 1) for n in ("weight", "bias"))


if __name__ == "__main__":  # test_two_workers_equal_one
    folder = Path(sys.argv[1])
    module = Module()
    both = trainer(folder, strategy="ddp_fork", devices=2, max_epochs=3, use_distributed_sampler=True)
    both.fit(module, DataLoader(dataset(), 32))
    torch.save(weights(module), folder / "both.pt")
