"""The ``lrtt`` command: YAML in, training out, and the saved config.yaml gives the same bits again."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from features import feature

from lightning_lrtt.cli import main

MODEL = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, width: int = 5, lr: float = 0.05):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
        self.data = TensorDataset(x, x[:, :3].sin())

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, 40)

    def test_dataloader(self):
        return DataLoader(self.data, 40)
"""

CONFIG = """
seed_everything: 3
model:
  class_path: tiny_module.Model
  init_args: {width: 7}
data:
  class_path: tiny_module.Data
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 5
  enable_progress_bar: false
  strategy:
    class_path: lightning_lrtt.LRTTStrategy
    init_args:
      exclude: [net.2]
      config:
        rank: 2
        transfer_every: 3
        reinit_gain: 1.0
        pulse: {desired_bl: 15}
        fast_device:
          class_path: lightning_lrtt.devices.SoftBounds
          init_args: {dw_min: 0.002, w_max: 1.0, w_min: -1.0}
        visible_device:
          class_path: ConstantStep
          init_args: {dw_min: 0.002}
  logger:
    class_path: TensorBoardLogger
    init_args: {save_dir: logs, name: run}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {monitor: val/loss}
    - class_path: TileMonitor
      init_args: {every_n_steps: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module and fit.yaml, as a user would have it; undoes what `main` sets up."""
    (tmp_path / "tiny_module.py").write_text(MODEL)
    (tmp_path / "fit.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lrtt"])
    log = logging.getLogger("lightning_lrtt")
    level, handlers = log.level, list(log.handlers)
    yield tmp_path
    sys.modules.pop("tiny_module", None)
    log.setLevel(level)
    log.handlers[:] = handlers


def run(folder: Path, version: int) -> Path:
    """Folder of a run's config.yaml, events and checkpoints."""
    return folder / "logs" / "run" / f"version_{version}"


def weights(folder: Path, version: int) -> dict[str, torch.Tensor]:
    """State of the run's only checkpoint."""
    (path,) = (run(folder, version) / "checkpoints").glob("*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


@feature("Command line", "LightningCLI, saved config.yaml", tiles="pulsed")
def test_round_trip_of_the_saved_config(folder: Path) -> None:
    """config.yaml holds everything, nested devices and defaults included, and reruns to the same bits."""
    main(["fit", "--config", "fit.yaml"])
    saved = yaml.safe_load((run(folder, 0) / "config.yaml").read_text())
    config = saved["trainer"]["strategy"]["init_args"]["config"]
    assert config["rank"] == 2
    assert config["alpha"] == 1.0
    assert config["pulse"]["desired_bl"] == 15
    assert config["fast_device"]["class_path"] == "lightning_lrtt.devices.SoftBounds"
    assert config["fast_device"]["init_args"]["dw_min_std"] == 0.3
    assert config["visible_device"]["class_path"] == "lightning_lrtt.devices.ConstantStep"
    main(["fit", "--config", str(run(folder, 0) / "config.yaml")])
    one, other = weights(folder, 0), weights(folder, 1)
    assert one.keys() == other.keys()
    assert "net.0.A" in one
    assert "net.2.A" not in one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lists_in_yaml_are_nodes_of_a_device(folder: Path) -> None:
    """Regression: unhashable type: 'list', in a device and in the cells of a pair; also from the saved config.yaml."""
    nodes = {"piecewise_up": [1, 0.5], "piecewise_down": [0.5, 1.0]}
    cell = {"class_path": "lightning_lrtt.devices.PiecewiseStep", "init_args": nodes}
    pair = {"class_path": "OneSided", "init_args": {"device": cell}}
    config = yaml.safe_load(CONFIG)
    config["trainer"]["strategy"]["init_args"]["config"] |= {"fast_device": pair, "visible_device": cell}
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "fit.yaml"])
    main(["fit", "--config", str(run(folder, 0) / "config.yaml")])
    one, other = weights(folder, 0), weights(folder, 1)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_exits_0_and_says_nothing_odd(folder: Path) -> None:
    """As a process: no traceback, no warning, the strategy's one line, and the test table."""
    command = [sys.executable, "-m", "lightning_lrtt.cli", "fit", "--config", "fit.yaml", "--test_after_fit=true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "1 tiles by LR-TT at lr x 1; 3 digital parameters by SGD" in said
    assert "test/loss" in done.stdout
    for odd in ("Traceback", "object at 0x", "LeafSpec", "DeprecationWarning", "FutureWarning"):
        assert odd not in said, said


def test_test_after_fit_uses_the_best_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "fit.yaml", "--test_after_fit=true"])
    assert "test/loss" in capsys.readouterr().out
    main(["fit", "--config", "fit.yaml"])
    assert "test/loss" not in capsys.readouterr().out


def test_other_subcommands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "fit.yaml"])
    (path,) = (run(folder, 0) / "checkpoints").glob("*.ckpt")
    main(["test", "--config", "fit.yaml", "--ckpt_path", str(path), "--trainer.logger=false"])
    assert "test/loss" in capsys.readouterr().out
    main(["validate", "--config", "fit.yaml", "--ckpt_path", str(path), "--trainer.logger=false"])
    assert "val/loss" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["Adam", "LRTT"])
def test_short_names_and_an_optimizer_from_the_command_line(folder: Path, optimizer: str) -> None:
    """LightningCLI builds this optimizer at parse time, before any tile exists."""
    main(
        [
            "fit",
            "--model=tiny_module.Model",
            "--data=tiny_module.Data",
            "--trainer.strategy=LRTTStrategy",
            "--trainer.strategy.config.rank=2",
            f"--optimizer={optimizer}",
            "--optimizer.lr=0.05",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.log_every_n_steps=5",
            "--trainer.callbacks+=TileMonitor",
            "--trainer.logger=TensorBoardLogger",
            "--trainer.logger.save_dir=logs",
            "--trainer.logger.name=run",
        ]
    )
    state = weights(folder, 0)
    assert float(state["net.0.A"].abs().max()) > 0


def test_strategy_by_name(folder: Path) -> None:
    main(["fit", "--config", "fit.yaml", "--trainer.strategy=lrtt"])
    assert weights(folder, 0)["net.2.A"].shape == (3, 3)  # rank 8, lowered to min(d, k)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("rank: 2", "rnak: 2", "rnak"),
        ("dw_min: 0.002, w_max", "dw_mni: 0.002, w_max", "dw_mni"),
        ("max_epochs: 2", "max_epoch: 2", "max_epoch"),
        ("exclude: [net.2]", "excluded: [net.2]", "excluded"),
    ],
    ids=["config", "device", "trainer", "strategy"],
)
def test_an_unknown_key_is_named(folder: Path, capfd: pytest.CaptureFixture[str], old: str, new: str, key: str) -> None:
    assert old in CONFIG
    (folder / "fit.yaml").write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "fit.yaml"])
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert key in error
    assert not (folder / "logs").exists()


def test_a_bad_value_tells_the_rule(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(["fit", "--config", "fit.yaml", "--trainer.strategy.init_args.config.rank=0"])
    assert "rank must be >= 1, got 0" in capfd.readouterr().err + str(stop.value)
