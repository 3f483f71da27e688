"""examples/device_sweep: one command, a table, a figure, and HParams with final metrics."""

from __future__ import annotations

import csv
import logging
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")
pytest.importorskip("matplotlib", reason="the figure is matplotlib's: pip install -e '.[plot]'")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from examples.device_sweep.run import main, plot  # noqa: E402


@pytest.fixture
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(logging.getLogger("lightning_lrtt"), "handlers", [logging.NullHandler()])


def test_the_sweep(tmp_path: Path, at_the_root: None) -> None:
    args = ["--devices", "digital", "ecram", "--ranks", "2", "8", "--epochs", "1", "--out", str(tmp_path)]
    rows = main([*args, "--", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=30"])
    assert [(row["device"], row["rank"], row["seed"]) for row in rows] == [
        ("digital", 2, 0), ("digital", 8, 0), ("ecram", 2, 0), ("ecram", 8, 0)
    ]  # fmt: skip
    with open(tmp_path / "accuracy.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["test_acc"]) for row in table] == [row["test_acc"] for row in rows]
    assert len({row["test_acc"] for row in rows}) > 2  # rank and device make a difference
    assert rows[1]["test_acc"] > 0.3  # after 30 batches; guessing gives 0.1
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert hparams(tmp_path / f"{row['device']}_r{row['rank']}_s0") == {
            "device": row["device"], "rank": row["rank"], "seed": 0
        }  # fmt: skip
        assert metric(tmp_path / f"{row['device']}_r{row['rank']}_s0") == pytest.approx(row["test_acc"], abs=1e-6)


def hparams(folder: Path) -> dict[str, object]:
    """What TensorBoard's HParams tab shows of a run, of the sweep's own."""
    for path in sorted(folder.rglob("events.*")):
        events = EventAccumulator(str(path)).Reload()
        for tag, content in events.PluginTagToContent("hparams").items() if has_hparams(events) else ():
            if tag == "_hparams_/session_start_info":
                said = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
                values = {k: v.string_value or v.number_value for k, v in said.items()}
                if "device" in values:
                    return {name: values[name] for name in ("device", "rank", "seed")}
    raise AssertionError(f"no hyperparameters in {folder}")


def has_hparams(events: EventAccumulator) -> bool:
    try:
        return bool(events.PluginTagToContent("hparams"))
    except KeyError:
        return False


def metric(folder: Path) -> float:
    (value,) = {
        scalar.value
        for path in folder.rglob("events.*")
        for events in [EventAccumulator(str(path)).Reload()]
        if "hp/test_acc" in events.Tags()["scalars"]
        for scalar in events.Scalars("hp/test_acc")
    }
    return value


def test_the_figure_shows_every_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians and ranges of the seeds, over the ranks."""
    from matplotlib.axes import Axes

    drawn = {}
    draw = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, x, y, yerr, **style: drawn.update({style["label"]: (x, y, yerr)})
        or draw(self, x, y, yerr, **style)
    )  # fmt: skip
    rows = [
        {"device": device, "rank": rank, "seed": seed, "test_acc": 0.5 + 0.1 * seed + 0.01 * rank}
        for device in ("digital", "ecram") for rank in (8, 2) for seed in (0, 2, 1)
    ]  # fmt: skip
    plot(rows, tmp_path / "a.png")
    assert list(drawn) == ["digital", "ecram"]
    x, y, (low, high) = drawn["ecram"]
    assert x == [2, 8]
    assert y == pytest.approx([0.62, 0.68])
    assert low == pytest.approx([0.1, 0.1]) and high == pytest.approx([0.1, 0.1])


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--devices", "nope", "--out", str(tmp_path)])
    assert "choose from" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--seeds must be >= 1, got 0"):
        main(["--seeds", "0", "--out", str(tmp_path)])
