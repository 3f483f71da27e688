"""Rows that arrive late: order, waiting, loss, and a whole run whose rows are always late. The GPU's part is in
test_tile_monitor_gpu.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_helpers import PULSED, Net, loader, trainer
from lightning_lrtt.callbacks import TileMonitor, tile_monitor
from lightning_lrtt.callbacks._metric_ring import MetricRing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Event:
    """Passes at the ``after``-th question after it was recorded, or when it is waited for."""

    def __init__(self, after: int, fails: bool = False) -> None:
        self.after, self.left, self.fails, self.waits = after, 0, fails, 0

    def record(self) -> None:
        self.left = self.after

    def query(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def synchronize(self) -> None:
        if self.fails:
            raise RuntimeError("CUDA error: on purpose")
        self.waits += 1


class LateRing(MetricRing):
    """The asynchronous path, on memory of the CPU."""

    after, fails = 3, False

    def __init__(self, device: torch.device, sink: Any, rows: int = 8) -> None:
        super().__init__(device, sink, rows)
        self._asynchronous = True
        self.made: list[Event] = []

    def _slot(self, size: int) -> tuple[torch.Tensor, Any]:
        for index, (host, _) in enumerate(self._free):
            if host.numel() >= size:
                return self._free.pop(index)
        self.made.append(Event(self.after, self.fails))
        return torch.full((size,), float("nan"), dtype=torch.float64), self.made[-1]


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_rows_come_in_order_when_they_have_arrived() -> None:
    seen: list[Any] = []
    ring = LateRing(torch.device("cpu"), lambda note, values: seen.append((note, values)))
    ring.push(row(1), "a")
    ring.push(row(2, 3), "b")
    ring.drain()
    ring.drain()
    assert seen == [] and len(ring) == 2
    ring.drain()  # the first has passed, the second is asked for the first time
    assert seen == [("a", [1.0])]
    ring.drain(wait=True)
    assert seen == [("a", [1.0]), ("b", [2.0, 3.0])]
    ring.push(row(4), "c")  # into a used slot, which may be longer
    ring.drain(wait=True)
    assert seen[-1] == ("c", [4.0])
    assert len(ring.made) == 2


def test_only_a_full_ring_waits() -> None:
    seen: list[Any] = []
    ring = LateRing(torch.device("cpu"), lambda note, values: seen.append(note), rows=2)
    for note in "abc":
        ring.push(row(0), note)
    assert seen == ["a"]
    assert [event.waits for event in ring.made] == [1, 0]  # the third row took the slot that came free
    ring.drain(wait=True)
    assert seen == ["a", "b", "c"]


def test_a_lost_device_hides_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    ring = LateRing(torch.device("cpu"), lambda note, values: None)
    ring.push(row(1), "a")
    ring.made[0].fails = True
    ring.abandon()
    assert len(ring) == 0
    assert "were lost: CUDA error: on purpose" in caplog.text


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "run" / "version_0"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_late_rows_log_what_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the step that it belongs to, up to the last, and differences of counters between rows."""
    for late in (False, True):
        if late:
            monkeypatch.setattr(tile_monitor, "MetricRing", LateRing)
        torch.manual_seed(0)
        monitor = TileMonitor(every_n_steps=2, gradient_every_n_steps=3)
        trainer(tmp_path / str(late), [monitor], PULSED, max_epochs=2).fit(Net(), loader())
    assert scalars(tmp_path / "True") == scalars(tmp_path / "False")


def test_a_checkpoint_holds_the_last_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row under way belongs to the state: a resumed run would else count its pulses twice."""
    monkeypatch.setattr(tile_monitor, "MetricRing", LateRing)
    monkeypatch.setattr(LateRing, "after", 100)
    kept: list[Any] = []

    class Saves(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            monitor = self.trainer.callbacks[0]
            if self.trainer.global_step == 15 and isinstance(monitor, TileMonitor):
                kept.append((monitor.state_dict()["counts"], self.net[0].tile_counts.tolist()))

    trainer(tmp_path, [TileMonitor()], PULSED).fit(Saves(), loader())
    ((counts, now),) = kept
    assert counts["net.0"] == now  # step 15 is a logging step


def test_rows_are_written_after_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_monitor, "MetricRing", LateRing)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(tmp_path, [TileMonitor(every_n_steps=2)], PULSED).fit(Net(fail_at=10), loader())
    assert [step for step, _ in scalars(tmp_path)["tile/net.0/norm_C"]] == [1, 3, 5, 7, 9]
