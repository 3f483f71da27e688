"""examples/: every configuration runs from the repository root and prints its test accuracy or loss."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from features import feature

from lightning_lrtt.cli import main

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is given there, and finds ``examples`` there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lrtt"])
    monkeypatch.setattr(logging.getLogger("lightning_lrtt"), "handlers", [logging.NullHandler()])


def accuracy(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *args: str) -> float:
    """Test accuracy that ``lrtt fit`` prints."""
    main(
        [
            "fit",
            "--config",
            f"examples/digits/{name}.yaml",
            f"--trainer.logger.save_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            *args,
        ]
    )
    printed = re.search(r"test/acc\W+([0-9.]+)", capsys.readouterr().out)
    assert printed is not None
    return float(printed.group(1))


# After 3 of 30 epochs; guessing gives 0.1.
@pytest.mark.parametrize(
    ("name", "least"), [("config", 0.8), ("pulsed", 0.8), ("io", 0.8), ("plain", 0.9), ("convnet", 0.8)]
)
def test_configuration(name: str, least: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy(name, tmp_path, capsys, "--trainer.max_epochs=3") > least
    assert list(tmp_path.glob("*/version_0/events.out.tfevents.*"))
    assert list(tmp_path.glob("*/version_0/checkpoints/*.ckpt"))


def test_convnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--trainer.max_epochs=3", "--model.init_args.arch=convnet", "--model.init_args.hidden=16"]
    assert accuracy("config", tmp_path, capsys, *args) > 0.3


def autoencoder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> float:
    """Validation loss that ``lrtt fit`` and then ``lrtt validate`` of its checkpoint print, after 4 of 30 epochs."""
    args = [
        "--config",
        f"examples/autoencoder/{name}.yaml",
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]
    main(["fit", *args, "--trainer.max_epochs=4"])
    checkpoint = next(tmp_path.glob(f"autoencoder_{name}/version_0/checkpoints/*.ckpt"))
    capsys.readouterr()
    main(["validate", *args, f"--ckpt_path={checkpoint}"])
    printed = re.search(r"val/loss\W+([0-9.]+)", capsys.readouterr().out)
    assert printed is not None
    return float(printed.group(1))


@feature("Modules", "the autoencoder of Lightning's README, by the strategy alone")
def test_autoencoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation loss at most 1.1 times that of digital training (Adam) in equal epochs; [all epochs](accuracy.md)."""
    plain = autoencoder("plain", tmp_path, capsys)
    assert plain < 0.065  # 0.14 at the start
    assert autoencoder("lrtt", tmp_path, capsys) < 1.1 * plain
    assert autoencoder("pulsed", tmp_path, capsys) < 1.1 * plain


@pytest.mark.parametrize(("name", "kind"), [("config", "q8_0"), ("q4_0", "q4_0")])
def test_gguf_finetune(
    name: str, kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """From each file: a loss before and after, with samples; pretraining and fine-tuning in a few steps."""
    folder = tmp_path_factory.getbasetemp() / "gguf_finetune"  # the first of the two makes both files
    folder.mkdir(exist_ok=True)
    checkpoint = folder / f"llama-{kind}.gguf"
    with caplog.at_level(logging.INFO, "lightning_lrtt"):
        main(
            [
                "fit",
                "--config",
                f"examples/gguf_finetune/{name}.yaml",
                f"--data.init_args.checkpoint={checkpoint}",
                "--data.init_args.pretrain_steps=30",
                f"--trainer.strategy.init_args.pretrained.init_args.path={checkpoint}",
                f"--trainer.logger.init_args.save_dir={tmp_path}",
                "--trainer.accelerator=cpu",
                "--trainer.max_steps=30",
                "--trainer.val_check_interval=30",
                "--trainer.limit_val_batches=1",
            ]
        )
    assert f"tensors, {checkpoint.stat().st_size / 1e6:.1f} MB from {checkpoint}" in caplog.text  # header: < 2 kB
    said = re.findall(r"(before|after): validation loss ([0-9.]+), .* sample:\nThe statement .", caplog.text)
    assert [when for when, _ in said] == ["before", "after"]
    before, after = (float(loss) for _, loss in said)
    # Bytes drawn at random cost log(256) = 5.5, by their frequency in the text 3.1.
    assert before < 4.5
    assert after < before - 0.1
    assert list(tmp_path.glob("gguf_finetune*/version_0/checkpoints/*.ckpt"))


def test_the_split_is_fixed_and_disjoint() -> None:
    sys.path.append(str(ROOT))
    from examples.digits.data import DigitsDataModule

    torch.manual_seed(0)
    one = DigitsDataModule()
    torch.manual_seed(1)
    other = DigitsDataModule()
    for module in (one, other):
        module.setup("fit")
    parts = [one.train, one.val, one.test]
    assert [len(part) for part in parts] == [1197, 240, 360]
    for part, again in zip(parts, [other.train, other.val, other.test], strict=True):
        assert torch.equal(part.tensors[0], again.tensors[0])
    scans = torch.cat([part.tensors[0] for part in parts]).flatten(1)
    assert len(torch.unique(scans, dim=0)) == 1797  # load_digits has no duplicates
