"""examples/free_nudged_digits and examples/geometric_retrieval run from one YAML each and log to TensorBoard."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lrtt.cli import main

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")

ROOT = Path(__file__).resolve().parent.parent


def fit(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str
) -> float:
    """Run ``lrtt fit`` from the repository root; the test accuracy that it prints."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lrtt"])
    monkeypatch.setattr(logging.getLogger("lightning_lrtt"), "handlers", [logging.NullHandler()])
    main(
        [
            "fit",
            "--config",
            f"examples/{config}",
            f"--trainer.logger.save_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            *args,
        ]
    )
    printed = re.search(r"test/acc\W+([0-9.]+)", capsys.readouterr().out)
    assert printed is not None
    return float(printed.group(1))


# After 4 of 20 epochs; guessing gives 0.1.
@pytest.mark.parametrize(("name", "least"), [("dense", 0.9), ("config", 0.85), ("pulsed", 0.75)])
def test_digits(
    name: str, least: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(f"free_nudged_digits/{name}.yaml", tmp_path, capsys, monkeypatch, "--trainer.max_epochs=4") > least
    (folder,) = {path.parent for path in tmp_path.rglob("events.*")}
    tags = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload().Tags()["scalars"]
    assert {"free_nudged/cosine_bptt", "free_nudged/residual_free", "train/loss", "val/acc"} <= set(tags)


def test_geometric(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch with a short window: it runs, and logs LIoR within the windows; the docs hold the accuracies."""
    args = ["--trainer.max_epochs=1", "--model.init_args.window=16", "--trainer.limit_val_batches=1"]
    assert fit("geometric_retrieval/config.yaml", tmp_path, capsys, monkeypatch, *args) > 0.3
    assert (
        fit("geometric_retrieval/fixed.yaml", tmp_path, capsys, monkeypatch, *args, "--trainer.limit_train_batches=3")
        > 0.1
    )
    (folder,) = {path.parent for path in (tmp_path / "geometric").rglob("events.*")}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert [e.step for e in events.Scalars("window/lior")][:3] == [64, 72, 144]
    # The example's own training_step did not record what the monitor of its configuration logs.
    assert all(e.value > 0 for e in events.Scalars("free_nudged/phase_distance"))
