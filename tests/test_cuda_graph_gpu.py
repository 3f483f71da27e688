"""The `CUDAGraph` callback on a GPU: what it gives must be what eager training gives, to the bit."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from graph_helpers import Net, Quiet, Rows, assert_same_run, data
from graph_helpers import run as run_on
from helpers import same_bits
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_helpers import DIGITAL, PULSED
from lightning_lrtt.callbacks import CUDAGraph, MemoryCleanup, TileMonitor
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTTStrategy, ResumableLoader, build_info

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one"),
    pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only"),
]
ROOT = Path(__file__).resolve().parents[1]
run = partial(run_on, accelerator="gpu")
both = pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])


@pytest.fixture(autouse=True)
def _deterministic_convolutions():
    """Some of cuDNN's algorithms add in any order and differ from themselves."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@both
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_whole_steps_equal_eager(tmp_path, config, optimizer, precision):
    """Schedule, dropout, batch norm, noise, metrics, logs, validation, a ragged batch under replay: eager's bits."""
    graph = CUDAGraph(on_failure="raise")
    captured = run(tmp_path, config, [graph], partial(Net, optimizer), precision=precision)
    assert graph.reasons == [] and graph.captures == 2  # the full batch and the ragged one
    assert graph.eager_steps == 4 and graph.replays == 32 - 4 - 2
    assert_same_run(captured, run(tmp_path, config, [], partial(Net, optimizer), precision=precision))


def test_a_model_without_tiles(tmp_path):
    """Whole steps of digital training are recorded just as well."""
    graph = CUDAGraph(on_failure="raise", parity_steps=1)
    recorded = run(tmp_path, None, [graph])
    assert graph.reasons == [] and graph.replays == 26 and graph.parity_max_abs == 0.0
    assert_same_run(recorded, run(tmp_path, None, []))


@both
def test_accumulation_and_clipping(tmp_path, config):
    """Micro-batches and the update as graphs of one window; the window that the epoch's end cuts short has its own."""
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05, "max_epochs": 8}
    graph = CUDAGraph(max_graphs=8, on_failure="raise")
    captured = run(tmp_path, config, [graph], **options)
    assert graph.reasons == [] and graph.captures >= 4 and graph.replays > 30
    assert_same_run(captured, run(tmp_path, config, [], **options))


@both
def test_half_precision_falls_to_the_tiles(tmp_path, config):
    """The GradScaler decides on the host: 16-mixed records the tiles' update only, says so, and keeps eager's bits."""
    graph = CUDAGraph(max_graphs=8)
    captured = run(tmp_path, config, [graph], precision="16-mixed")
    assert graph.replays > 5 and any("GradScaler" in reason for reason in graph.reasons)
    assert_same_run(captured, run(tmp_path, config, [], precision="16-mixed"))


def test_foreign_optimizer_falls_to_the_tiles(tmp_path):
    """An optimizer without a known device form: the tiles' update is recorded, the rest is eager."""
    graph = CUDAGraph()
    captured = run(tmp_path, PULSED, [graph], partial(Net, "lion"))
    assert graph.replays > 15 and any("Foreign" in reason for reason in graph.reasons)
    assert_same_run(captured, run(tmp_path, PULSED, [], partial(Net, "lion")))


@pytest.mark.parametrize("find", [True, False], ids=["found", "hit"])
def test_synchronisation_in_a_step(tmp_path, find):
    """``.item()`` is named with file and line before the capture; otherwise the capture fails and the run goes on."""
    graph = CUDAGraph(find_syncs=find)
    captured = run(tmp_path, PULSED, [graph], partial(Net, trap="item"))
    assert "graph_helpers.py:" in graph.reasons[0] if find else "capture failed" in graph.reasons[0]
    assert_same_run(captured, run(tmp_path, PULSED, [], partial(Net, trap="item")))


@both
def test_no_host_synchronisation(tmp_path, config):
    """Placing a batch and replaying its step wait for nothing."""

    class Strict:
        def __init__(self, inner: Any, graph: CUDAGraph) -> None:
            self.inner, self.graph, self.replays = inner, graph, 0

        def _call(self, function: Any, *args: Any) -> Any:
            strict = self.graph.captures == 2  # both shapes
            self.replays += strict
            torch.cuda.set_sync_debug_mode("error" if strict else "default")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        def place(self, *args: Any) -> Any:
            return self._call(self.inner.place, *args)

        def step(self, *args: Any) -> Any:
            return self._call(self.inner.step, *args)

    class Wrap(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if not isinstance(trainer.strategy.executor, Strict):
                trainer.strategy.executor = Strict(trainer.strategy.executor, graph)
                self.strict = trainer.strategy.executor

    graph, wrap = CUDAGraph(on_failure="raise", timing=True), Wrap()
    run(tmp_path, config, [graph, wrap], Quiet, log_every_n_steps=1000)
    assert wrap.strict.replays >= 2 * 15


@both
def test_resume_in_the_middle(tmp_path, config):
    """Stopped in the middle of an epoch and a cycle, and gone on with: the bits of the run that never stopped."""

    def loader() -> Any:
        return ResumableLoader(data(), batch_size=10, seed=3)

    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=18, save_top_k=-1, filename="at")
    options = {"enable_checkpointing": True}
    whole = run(tmp_path, config, [CUDAGraph(), saver], train=loader(), **options)
    graph = CUDAGraph()
    resumed = run(
        tmp_path,
        config,
        [graph, ModelCheckpoint(tmp_path / "other")],
        train=loader(),
        ckpt_path=str(tmp_path / "ckpt" / "at.ckpt"),
        **options,
    )
    assert graph.replays > 0
    for name, value in whole[0].state_dict().items():
        assert same_bits(value, resumed[0].state_dict()[name]), name
    plain = run(
        tmp_path,
        config,
        [ModelCheckpoint(tmp_path / "third")],
        train=loader(),
        ckpt_path=str(tmp_path / "ckpt" / "at.ckpt"),
        **options,
    )
    for name, value in whole[0].state_dict().items():  # a checkpoint of graphs goes on without them
        assert same_bits(value, plain[0].state_dict()[name]), name


def test_exception_in_a_step(tmp_path):
    """Nothing is left installed after an exception, and the module trains again."""

    class Bomb(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 12:
                raise KeyError("on purpose")

    graph, module = CUDAGraph(), Net()
    with pytest.raises(KeyError):
        run(tmp_path, PULSED, [graph, Bomb()], module)
    assert graph.active_scope == "none" and "log" not in module.__dict__
    again = run(tmp_path, PULSED, [CUDAGraph()])
    assert_same_run(again, run(tmp_path, PULSED, []))


@both
def test_parity_check_is_zero(tmp_path, config):
    """Two steps of every graph, taken eagerly too, do not differ; the run's bits are untouched by the comparison."""
    graph = CUDAGraph(parity_steps=2, on_failure="raise")
    captured = run(tmp_path, config, [graph])
    assert graph.parity_max_abs == 0.0 and graph.reasons == []
    assert_same_run(captured, run(tmp_path, config, []))


def test_tile_monitor_sees_its_steps(tmp_path):
    """A TileMonitor's logging steps run eagerly between replays; it logs what it logs without graphs."""
    rows = []
    for graphs in ([], [CUDAGraph()]):
        logger = Rows()
        run(tmp_path, PULSED, [TileMonitor(), *graphs], logger=logger)
        rows.append(logger.without_speed())
    assert rows[0] == rows[1] and any("tile/net.0/norm_A" in row for row in rows[0])


@pytest.mark.parametrize(
    ("config", "arch"),
    [("config.yaml", "mlp"), ("pulsed.yaml", "mlp"), ("convnet.yaml", "convnet"), ("pulsed.yaml", "convnet")],
)
def test_digits_examples_equal_eager(tmp_path, monkeypatch, config, arch):
    """``lrtt fit -c examples/digits/... --trainer.callbacks+=CUDAGraph``: checkpoint and log of the run without."""
    from lightning_lrtt.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lrtt"])
    monkeypatch.setattr(logging.getLogger("lightning_lrtt"), "handlers", [logging.NullHandler()])
    finals = []
    for graphs in (False, True):
        where = tmp_path / str(graphs)
        words = [
            "fit",
            "-c",
            f"examples/digits/{config}",
            "--trainer.max_epochs=3",
            "--trainer.accelerator=gpu",
            f"--trainer.logger.init_args.save_dir={where}",
            "--test_after_fit=false",
            f"--model.init_args.arch={arch}",
            f"--model.init_args.hidden={32 if arch == 'convnet' else 128}",
        ]
        main([*words, "--trainer.callbacks+=CUDAGraph"] if graphs else words)
        (path,) = where.rglob("*.ckpt")
        finals.append((torch.load(path, weights_only=False), _scalars(where)))
    (eager, logged), (captured, also) = finals
    for name, value in eager["state_dict"].items():
        assert same_bits(value, captured["state_dict"][name]), name
    assert eager["optimizer_states"][0]["state"].keys() == captured["optimizer_states"][0]["state"].keys()
    assert also["graph/replays"][-1][1] > 150 and also["graph/captures"][-1][1] == 1
    kept = [{n: rows for n, rows in x.items() if not n.startswith(("graph/", "perf/"))} for x in (also, logged)]
    assert kept[0] == kept[1]


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run_folder,) = {path.parent for path in folder.rglob("events.out*")}
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_graphs_are_faster_on_small_layers(tmp_path):
    """24 layers of 16: a replay beats its own eager step (a coarse check, 2x where several are expected)."""

    class Deep(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*[m for _ in range(24) for m in (nn.Linear(64, 64), nn.Tanh())])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Clock(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()

        def on_train_batch_end(self, *args: Any) -> None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            end.synchronize()
            self.__dict__.setdefault("times", []).append(self.begin.elapsed_time(end))

    medians = []
    for graphs in ([], [CUDAGraph()]):
        clock = Clock()
        pl.seed_everything(0)
        trainer = pl.Trainer(
            strategy=LRTTStrategy(config=PULSED),
            callbacks=[clock, *graphs],
            accelerator="gpu",
            devices=1,
            max_epochs=1,
            barebones=True,
            default_root_dir=str(tmp_path),
        )
        trainer.fit(Deep(), DataLoader(TensorDataset(torch.randn(64 * 60, 64)), batch_size=64))
        medians.append(sorted(clock.times[20:])[20])
    assert medians[1] < medians[0] / 2, medians


def test_memory_cleanup_measures_the_device():
    """Counters of a real device; emptying hands back what no tensor holds."""
    device = torch.device("cuda", 0)
    cleanup = MemoryCleanup()
    before = cleanup.measure(device)
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    held = cleanup.measure(device)
    assert before is not None and held is not None and held.allocated >= before.allocated + 64 * 2**20
    del block
    cleanup.release(device)
    after = cleanup.measure(device)
    assert after is not None and after.reserved < held.reserved and not cleanup.capturing(device)
