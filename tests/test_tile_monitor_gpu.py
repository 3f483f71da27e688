"""`TileMonitor` on a GPU: no hook of it waits for the device, with CUDA graphs or without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_helpers import Quiet, Rows, run
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_helpers import DIGITAL, PULSED
from lightning_lrtt.callbacks import CUDAGraph, TileMonitor
from lightning_lrtt.callbacks._metric_ring import MetricRing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lrtt import LRTTConfig, build_info

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one"),
    pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only"),
]
run = partial(run, accelerator="gpu", log_every_n_steps=1000)  # Lightning's own rows wait


class Strict(TileMonitor):
    """Every hook of a step runs where a synchronisation is an error."""

    calls = 0

    def _strictly(self, function: Any, *args: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        self.calls += 1
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def on_train_batch_start(self, *args: Any) -> None:
        self._strictly(super().on_train_batch_start, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        self._strictly(super().on_train_batch_end, *args)

    def _observe(self, *args: Any) -> None:
        self._strictly(super()._observe, *args)

    def _watch_input(self, *args: Any) -> None:
        self._strictly(super()._watch_input, *args)


def test_the_mode_finds_synchronisations() -> None:
    """Otherwise the tests below would prove nothing."""
    with pytest.raises(RuntimeError, match="synchroniz"):
        Strict()._strictly(lambda: torch.ones(1, device="cuda").item())


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_no_hook_waits(tmp_path: Path, config: LRTTConfig, graphs: bool) -> None:
    """With everything on, and the numbers of a run that waits for every row."""
    found = []
    for kind in (Strict, TileMonitor):
        monitor = kind(every_n_steps=3, gradient_every_n_steps=4, images_every_n_epochs=1)
        logger = TensorBoardLogger(str(tmp_path / kind.__name__), name="run", version=0)
        graph = CUDAGraph()
        run(tmp_path, config, [monitor, *([graph] if graphs else [])], Quiet, logger=logger)
        assert not graphs or graph.replays > 5
        events = EventAccumulator(str(tmp_path / kind.__name__ / "run" / "version_0"), size_guidance={"scalars": 0})
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("tile/", "pulse/", "transfer/"))]
        found.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags})
        assert events.Tags()["histograms"] and events.Tags()["images"]
        if isinstance(monitor, Strict):
            assert monitor.calls > 50
    assert found[0] == found[1]
    assert [step for step, _ in found[0]["tile/net.0/norm_C"]] == list(range(2, 32, 3))


def test_rows_are_pinned_and_late() -> None:
    """A row behind slow work is not there at once, and is right once it is."""
    seen: list[Any] = []
    ring = MetricRing(torch.device("cuda"), lambda note, values: seen.append((note, values)))
    ring.push(torch.zeros(4, dtype=torch.float64, device="cuda"), "warm")
    ring.drain(wait=True)
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        a = a @ a
        a = a / a.norm()
    ring.push(a.norm().double().reshape(1), "late")
    ring.drain()
    assert [note for note, _ in seen] == ["warm"]
    ring.drain(wait=True)
    assert seen[-1][0] == "late" and seen[-1][1][0] == pytest.approx(1.0, rel=1e-3)
    assert all(host.is_pinned() for host, _ in ring._free)


def test_rows_reach_other_loggers(tmp_path: Path) -> None:
    logger = Rows()
    run(tmp_path, PULSED, [TileMonitor(every_n_steps=5)], Quiet, logger=logger)
    steps = [row["step"] for row in logger.rows if "tile/net.0/norm_C" in row]
    assert steps == list(range(4, 32, 5))
