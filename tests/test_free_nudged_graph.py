"""`FreeNudgedModule` under the `CUDAGraph` callback, rehearsed on the CPU: what a replay must go on with."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_helpers import assert_same_run, run
from lightning_helpers import DIGITAL, PULSED
from lightning_lrtt.callbacks import CUDAGraph, FreeNudgedMonitor
from rerun_recorder import RehearsedGraph
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt.free_nudged import DecayingBeta, Estimator, FreeNudgedModule, HopfieldMLP

ROOT = Path(__file__).resolve().parent.parent


class Classifier(FreeNudgedModule):
    """Three classes, SGD; what the runs compare beside the loss is the gradient."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(HopfieldMLP([6, 8, 3]), **({"free_steps": 6, "nudged_steps": 3} | kwargs))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        return {"loss": super().training_step(batch)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows() -> DataLoader:
    """Seven batches of 10 and a ragged one of 4."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(74, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=10)


class Quiet(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def runs(tmp_path: Path, config: Any, callbacks: Any = tuple, **kwargs: Any) -> tuple[RehearsedGraph, Any, Any]:
    """The callback, the recorded run and the eager one."""
    graph = RehearsedGraph(on_failure="raise")
    recorded = run(tmp_path, config, [graph, *callbacks()], partial(Quiet, **kwargs), train=rows())
    return graph, recorded, run(tmp_path, config, [*callbacks()], partial(Quiet, **kwargs), train=rows())


@pytest.mark.parametrize("config", [None, DIGITAL, PULSED], ids=["dense", "digital", "pulsed"])
def test_recorded_is_eager(tmp_path: Path, config: Any) -> None:
    """The finder finds nothing on the module; replays go on to the eager run's bits, a ragged batch included."""
    graph, recorded, eager = runs(tmp_path, config)
    assert graph.reasons == [] and graph.captures == 2 and graph.replays == 26
    assert_same_run(recorded, eager)


@pytest.mark.parametrize(
    "more",
    [
        {"schedule": DecayingBeta(beta=0.4, every=3)},
        {"estimator": Estimator(kind="random_sign")},
        {"estimator": Estimator(kind="coupled_centered")},
        {"estimator": Estimator(kind="contrastive")},
        {"estimator": Estimator(kind="holomorphic", points=4)},
        {"form": "direct"},
        {"nudge_from": "start", "free_steps": 4, "nudged_steps": 4},
    ],
    ids=["schedule", "random_sign", "coupled", "contrastive", "holomorphic", "direct", "from_start"],
)
def test_variants(tmp_path: Path, more: dict[str, Any]) -> None:
    """Beta lives in a tensor, so schedules and signs reach a replay."""
    graph, recorded, eager = runs(tmp_path, None, **more)
    assert graph.reasons == [] and graph.replays == 26
    assert_same_run(recorded, eager)


def test_the_monitor_goes_on(tmp_path: Path) -> None:
    """Statistics are recorded within the graph and read between steps."""
    graph, recorded, eager = runs(tmp_path, None, lambda: [FreeNudgedMonitor(every_n_steps=2)])
    assert graph.reasons == [] and graph.replays == 26
    assert_same_run(recorded, eager)


@pytest.mark.parametrize(
    ("more", "said"),
    [({"init": "previous"}, "carried changes in the step"), ({"tolerance": 1e-3}, "a value is read")],
    ids=["warm_start", "tolerance"],
)
def test_what_cannot_be_recorded_is_said(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    """Steps stay eager, with the reason; the numbers are those of a run without the callback."""
    assert not Quiet(**more).engine.capturable
    graph = RehearsedGraph()
    recorded = run(tmp_path, None, [graph], partial(Quiet, **more), train=rows())
    assert graph.active_scope == "none" and any(said in reason for reason in graph.reasons), graph.reasons
    assert_same_run(recorded, run(tmp_path, None, [], partial(Quiet, **more), train=rows()))


def test_a_cpu_stays_eager_and_finds_nothing(tmp_path: Path) -> None:
    """The real callback without a GPU: the finder looks, and has nothing to say but that there is no GPU."""
    graph = CUDAGraph()
    run(tmp_path, None, [graph], Quiet, train=rows())
    assert all("CUDA" in reason or "cpu" in reason for reason in graph.reasons), graph.reasons


@pytest.mark.parametrize("every", [1, 2])
def test_geometric_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Field, memory and metric under replay. Windows that only remember have no backward and stay eager."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from examples.geometric_retrieval.model import GeometricModule
    from examples.geometric_retrieval.system import GeometricRetrieval

    class Module(GeometricModule):
        def __init__(self) -> None:
            super().__init__(
                system=GeometricRetrieval(n=6, classes=3, memory=64),
                estimator=Estimator(kind="positive"),
                window=5,
                nudge_every_windows=every,
            )

        def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
            loss = super().training_step(batch)
            return loss if loss is None else {"loss": loss}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    graph = RehearsedGraph()
    results = [run(tmp_path, None, callbacks, Module, train=rows()) for callbacks in ([graph], [])]
    assert graph.reasons == ([] if every == 1 else ["capture failed: ValueError: training_step returned None"])
    assert graph.replays == (26 if every == 1 else 11)
    assert_same_run(*results)
    assert torch.equal(results[0][0].system.keys, results[1][0].system.keys)
