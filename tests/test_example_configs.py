"""Every YAML under examples/ parses and builds, and trains with each overlay."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning_lrtt.callbacks import CUDAGraph, RunProfile, TileCheck
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_vision_example import WRITE

from lightning_lrtt.cli import LRTTCLI, main
from lightning_lrtt.nn import find_tiles

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = ROOT / "examples" / "overlays"
CONFIGS = sorted(path for path in (ROOT / "examples").glob("*/*.yaml") if path.parent != OVERLAYS)
STEPS = 6  # the profiler records steps 3 to 5
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    f"--trainer.limit_train_batches={STEPS}",
    "--trainer.limit_val_batches=1",
    "--trainer.val_check_interval=1.0",
    "--trainer.num_sanity_val_steps=0",
]


# One of each kind of module, data and strategy with every overlay, every other configuration with one of them.
CORE = ("digits/plain", "digits/pulsed", "digits/segmented", "free_nudged_digits/config", "geometric_retrieval/config")


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def with_overlay(turn: int) -> Any:
    """The configurations of one overlay; LRTT_SLOW=1 runs the other pairs too."""
    rest = [path for path in CONFIGS if name(path) not in CORE]
    chosen = [path for path in CONFIGS if name(path) in CORE or rest.index(path) % 3 == turn]
    others = [pytest.param(path, marks=pytest.mark.slow) for path in CONFIGS if path not in chosen]
    return pytest.mark.parametrize("config", [*chosen, *others], ids=name)


every_config = pytest.mark.parametrize("config", CONFIGS, ids=name)


class Builder(LRTTCLI):
    """Builds everything and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained files of examples/gguf_finetune, after two steps of pretraining instead of 400."""
    pytest.importorskip("gguf", reason="GGUF files are written by gguf: pip install -e '.[weights]'")
    sys.path.append(str(ROOT))
    try:
        from examples.gguf_finetune.make import make_checkpoints

        folder = tmp_path_factory.mktemp("gguf")
        make_checkpoints(folder, torch.arange(4096) % 256, steps=2)
        return folder
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder to run in, with the repository's ``examples`` importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    monkeypatch.setattr(sys, "argv", ["lrtt"])
    monkeypatch.setattr(logging.getLogger("lightning_lrtt"), "handlers", [logging.NullHandler()])
    path = request.node.callspec.params.get("config") if hasattr(request.node, "callspec") else None
    if path is not None and path.parent.name == "gguf_finetune":
        from examples.gguf_finetune.samples import BeforeAndAfter

        monkeypatch.setattr(BeforeAndAfter, "_look", lambda *args: None)  # samples text for seconds
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "gguf_finetune").symlink_to(request.getfixturevalue("checkpoints"))
    if path is not None and path.parent.name == "vision":
        WRITE[path.stem](tmp_path / "data")
    return tmp_path


def fit(config: Path, overlay: str, *args: str) -> LRTTCLI:
    """``lrtt fit`` for a few steps; the command with its trainer and model."""
    overlays = ["--config", str(OVERLAYS / f"{overlay}.yaml")]
    quick = [*QUICK, "--test_after_fit=false"]
    if config.parent.name == "vision":  # 300 images, see test_vision_example
        quick += ["--data.init_args.val_size=100", "--data.init_args.batch_size=20"]
    return LRTTCLI(args=["fit", "--config", str(config), *overlays, *quick, *args])


def callback(cli: LRTTCLI, kind: type) -> Any:
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, kind))
    return found


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 18
    assert sorted(path.stem for path in OVERLAYS.glob("*.yaml")) == ["debug", "production", "profile"]


@every_config
def test_it_parses_and_builds(config: Path, work: Path) -> None:
    """No key is unknown, every class is there and takes its arguments, and the header names the command."""
    cli = Builder(args=["fit", "--config", str(config), "--trainer.accelerator=cpu"])
    assert isinstance(cli.model, pl.LightningModule)
    assert isinstance(cli.datamodule, pl.LightningDataModule)
    given = yaml.safe_load(config.read_text())
    assert cli.trainer.max_epochs == given["trainer"].get("max_epochs", cli.trainer.max_epochs)
    assert type(cli.model).__module__ + "." + type(cli.model).__name__ == given["model"]["class_path"]
    assert config.read_text().startswith("# ")
    text = config.read_text() + "".join(page.read_text() for page in config.parent.glob("README.md"))
    assert f"lrtt fit --config examples/{config.parent.name}/{config.name}" in text


@with_overlay(0)
def test_production(config: Path, work: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a CUDA device all steps are eager, said once; where no strategy is named, one that has seams is put in."""
    with caplog.at_level(logging.WARNING, "lightning_lrtt"):
        cli = fit(config, "production")
    graph = callback(cli, CUDAGraph)
    assert cli.trainer.fit_loop.epoch_loop._batches_that_stepped == STEPS
    assert (graph.captures, graph.active_scope) == (0, "none")
    assert graph._options.warmup == 10
    assert caplog.text.count("device cpu has no CUDA graphs; every step is eager") == 1
    assert cli.trainer.log_every_n_steps == 200
    assert cli.config.fit.data.init_args.drop_last is True
    assert cli.config.fit.trainer.benchmark is True
    if "strategy" not in yaml.safe_load(config.read_text())["trainer"]:
        assert not find_tiles(cli.model)


@with_overlay(1)
def test_debug(config: Path, work: Path) -> None:
    """Every step is checked, and every tile that is read exactly by its own forward is compared."""
    cli = fit(config, "debug")
    check = callback(cli, TileCheck)
    assert check.checked == STEPS
    tiles = [tile for tile in find_tiles(cli.model).values() if tile.config.io is None]
    if config.parent.name not in ("free_nudged_digits", "geometric_retrieval"):  # their states read both ways at once
        assert check.compared >= STEPS * len(tiles)  # segments are several calls in a step
    assert cli.config.fit.trainer.detect_anomaly is True


@with_overlay(2)
def test_profile(config: Path, work: Path) -> None:
    """A trace of training steps and the text that names it; times of the loop."""
    cli = fit(config, "profile", "--trainer.log_every_n_steps=2")
    callback(cli, RunProfile)
    folder = Path(cli.trainer.log_dir)
    (trace,) = folder.glob("*training_step*.pt.trace.json")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    (text,) = events.Tensors("profile/trace/text_summary")
    assert trace.name in text.tensor_proto.string_val[0].decode()
    times, waits = (events.Scalars(f"profile/{tag}_ms") for tag in ("step", "data"))
    assert [event.step for event in times] == [1, 3, 5]
    assert all(0 < wait.value < step.value for step, wait in zip(times, waits, strict=True))


def test_overlays_lie_on_one_another(work: Path) -> None:
    """Their callbacks add up."""
    config = ROOT / "examples" / "digits" / "pulsed.yaml"
    cli = fit(config, "production", "--config", str(OVERLAYS / "profile.yaml"), *QUICK)
    assert callback(cli, CUDAGraph).active_scope == "none" and callback(cli, RunProfile)
    assert cli.trainer.log_every_n_steps == 10


def test_the_strategy_that_a_graph_needs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The saved configuration names it, and the result is that of the plain run."""
    config = ROOT / "examples" / "digits" / "plain.yaml"
    main(["fit", "--config", str(config), *QUICK, "--test_after_fit=false"])
    cli = fit(config, "production")
    saved = yaml.safe_load(Path(cli.trainer.log_dir, "config.yaml").read_text())
    assert saved["trainer"]["strategy"]["class_path"] == "lightning_lrtt.LRTTStrategy"
    assert saved["trainer"]["strategy"]["init_args"]["include"] == []
    one, other = (
        torch.load(next(Path(f"logs/plain/version_{i}/checkpoints").glob("*.ckpt")), weights_only=True)["state_dict"]
        for i in (0, 1)
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
