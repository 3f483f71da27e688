"""The `CUDAGraph` callback rehearsed on the CPU: everything but the device's own recording is the real thing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from graph_helpers import Net, Quiet, Rows, assert_same_run, data, run
from helpers import same_bits
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import DIGITAL, PULSED, loader
from lightning_helpers import Net as Plain
from lightning_lrtt.callbacks import CUDAGraph, TileMonitor
from rerun_recorder import RehearsedGraph
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MetricCollection

from lightning_lrtt import LRTTDDPStrategy, LRTTStrategy, ResumableLoader
from lightning_lrtt.graphs import GraphCaptureError

both = pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])


class Variant(Net):
    """A `Net` whose step does one thing more."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.more(batch)
        return super().training_step(batch, 0)

    def more(self, batch: Any) -> None:
        """What the variant adds."""


@both
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_whole_steps_equal_eager(tmp_path, config, precision):
    """Schedule, dropout, batch norm, noise, metrics, logs, validation, a ragged batch under replay: eager's bits."""
    graph = RehearsedGraph(on_failure="raise")
    recorded = run(tmp_path, config, [graph], precision=precision)
    assert graph.reasons == [] and graph.captures == 2  # the full batch and the ragged one
    assert graph.eager_steps == 4 and graph.replays == 32 - 4 - 2
    assert_same_run(recorded, run(tmp_path, config, [], precision=precision))


def test_a_model_without_tiles(tmp_path):
    """Whole steps of digital training are recorded just as well."""
    graph = RehearsedGraph(on_failure="raise", parity_steps=1)
    recorded = run(tmp_path, None, [graph])
    assert graph.reasons == [] and graph.replays == 26 and graph.parity_max_abs == 0.0
    assert_same_run(recorded, run(tmp_path, None, []))


@both
def test_accumulation_and_clipping(tmp_path, config):
    """Micro-batches and update as recordings of one window; a window that the epoch's end cuts short has its own."""
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05, "max_epochs": 8}
    graph = RehearsedGraph(max_graphs=8, on_failure="raise")
    recorded = run(tmp_path, config, [graph], **options)
    assert graph.reasons == [] and graph.captures >= 4 and graph.replays > 30
    assert_same_run(recorded, run(tmp_path, config, [], **options))


@both
def test_parity_check(tmp_path, config):
    """Two steps of every recording, taken eagerly too, do not differ; the comparison leaves no trace."""
    graph = RehearsedGraph(parity_steps=2, on_failure="raise")
    recorded = run(tmp_path, config, [graph])
    assert graph.parity_max_abs == 0.0
    assert_same_run(recorded, run(tmp_path, config, []))


def test_parity_check_gives_up_what_differs(tmp_path):
    """A replay that adds something is found; the run goes on from the eager result, with eager's bits."""

    class Wrong(RehearsedGraph):
        def make_recorder(self, device: torch.device) -> Any:
            record = self.recorder.record

            def spoiled(function: Any) -> Any:
                recording = record(function)
                replay = recording.replay

                def add() -> None:
                    replay()
                    with torch.no_grad():
                        graph._trainer.lightning_module.net[0].bias.add_(0.25)

                recording.replay = add
                return recording

            self.recorder.record = spoiled
            return self.recorder

    graph = Wrong(parity_steps=2)
    recorded = run(tmp_path, DIGITAL, [graph])
    assert graph.parity_max_abs == pytest.approx(0.25, abs=1e-6) and "differs" in graph.reasons[0]
    assert_same_run(recorded, run(tmp_path, DIGITAL, []))


# ------------------------------------------------------------------ what is refused, and what is said


def test_a_cpu_stays_eager_and_is_looked_at(tmp_path):
    """Without a device that records, every step is eager, and the finder still names what would be in the way."""

    class Reads(Variant):
        def more(self, batch: Any) -> None:
            if batch[0].sum() > 1e6:
                raise AssertionError

    graph = CUDAGraph()
    eager = run(tmp_path, PULSED, [graph], Reads)
    assert "no CUDA graphs" in graph.reasons[0] and graph.replays == graph.captures == 0
    assert any("test_cuda_graph.py" in reason and "if tensor" in reason for reason in graph.reasons)
    assert_same_run(eager, run(tmp_path, PULSED, [], Reads))


class Masks(Variant):
    def more(self, batch: Any) -> None:
        batch[0][batch[0] > 0].sum()


class Counts(Variant):
    calls = 0

    def more(self, batch: Any) -> None:
        self.calls += 1


class Replaces(Variant):
    mean: Any = None

    def more(self, batch: Any) -> None:
        self.mean = batch[0].mean() if self.mean is None else 0.9 * self.mean + batch[0].mean()


class Epochs(Variant):
    def more(self, batch: Any) -> None:
        batch[0].mul(1.0 + self.current_epoch)


class Numbers(Variant):
    def more(self, batch: Any) -> None:
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])


class Index(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, 0) if batch_idx >= 0 else None


class Hook(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("grad", self.net[0].A.grad.norm())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Masks, "boolean mask"),
        (Counts, "calls changes"),
        (Replaces, "mean changes"),
        (Epochs, "current_epoch"),
        (Numbers, "Python number"),
        (Index, "batch_idx"),
        (Hook, "Hook.on_before_optimizer_step"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_traps_fall_to_the_tiles(tmp_path, kind, said):
    """What a graph would get wrong is named, the tiles' update is recorded alone, and the bits are eager's."""
    graph = RehearsedGraph()
    recorded = run(tmp_path, PULSED, [graph], kind)
    assert said in graph.reasons[0] and graph.replays >= 20, graph.reasons
    assert_same_run(recorded, run(tmp_path, PULSED, [], kind))


class Hooking(Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.calls = getattr(self, "calls", 0) + 1


def test_silent_callbacks_are_named_and_keep_speaking(tmp_path):
    graph, other = RehearsedGraph(), Hooking()
    run(tmp_path, DIGITAL, [graph, other])
    assert other.calls == 32 and "Hooking.on_after_backward" in graph.reasons[0]


def test_raise_says_so_before_the_first_step(tmp_path):
    with pytest.raises(MisconfigurationException, match="batch_idx"):
        run(tmp_path, DIGITAL, [RehearsedGraph(on_failure="raise")], Index)


def test_raise_says_so_without_a_device(tmp_path):
    with pytest.raises(MisconfigurationException, match="accelerator='gpu'"):
        run(tmp_path, DIGITAL, [CUDAGraph(on_failure="raise")])


def test_momentum_schedule_falls_to_the_tiles(tmp_path):
    """OneCycleLR moves the momentum in every step, which a graph would freeze."""

    class Cycle(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    graph = RehearsedGraph()
    recorded = run(tmp_path, DIGITAL, [graph], Cycle)
    assert any("hyperparameters" in reason for reason in graph.reasons) and graph.replays > 10
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Cycle))


def test_foreign_strategy_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="strategy='lrtt'"):
        pl.Trainer(callbacks=[CUDAGraph()], accelerator="cpu", barebones=True).fit(Net(), DataLoader(data(), 10))


@pytest.mark.parametrize("scope", ["step", "optimizer"])
def test_workers_stay_eager(tmp_path, scope):
    """lrtt_ddp takes its steps by itself, also with one worker: nothing is recorded, and the reason is said."""
    graph = RehearsedGraph(scope=scope)
    strategy = LRTTDDPStrategy(config=PULSED, segments=12)
    kwargs = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    pl.Trainer(callbacks=[graph], strategy=strategy, default_root_dir=tmp_path, **kwargs).fit(
        Plain(), DataLoader(loader(18).dataset, 12)
    )
    assert (graph.captures, graph.active_scope) == (0, "none")
    assert any("LRTTDDPStrategy reduces over workers" in reason for reason in graph.reasons)
    graph = RehearsedGraph(scope="step", on_failure="raise")
    with pytest.raises(MisconfigurationException, match="LRTTDDPStrategy reduces over workers"):
        pl.Trainer(callbacks=[graph], strategy=LRTTDDPStrategy(config=PULSED, segments=12), **kwargs).fit(
            Plain(), DataLoader(loader(18).dataset, 12)
        )


def test_manual_optimization_records_the_tiles(tmp_path):
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            loss = super().training_step(batch, 0)["loss"]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss}

    graph = RehearsedGraph()
    recorded = run(tmp_path, PULSED, [graph], Manual)
    assert "manual" in graph.reasons[0] and graph.replays >= 20
    assert_same_run(recorded, run(tmp_path, PULSED, [], Manual))


@both
def test_scope_optimizer(tmp_path, config):
    """Asked for, it is no failure, and nothing is refused."""
    graph = RehearsedGraph(scope="optimizer", on_failure="raise")
    recorded = run(tmp_path, config, [graph], accumulate_grad_batches=2)
    assert graph.reasons == [] and graph.captures >= 1 and graph.replays >= 8
    assert_same_run(recorded, run(tmp_path, config, [], accumulate_grad_batches=2))


def test_scope_optimizer_is_timed_and_shapes_beyond_the_cache_raise(tmp_path):
    """Regression: ``timing`` was ignored there, the time of a capture logged as 0, and ``raise`` did not."""
    logger = Rows()
    run(tmp_path, PULSED, [RehearsedGraph(scope="optimizer", timing=True)], logger=logger)
    rows = [row for row in logger.rows if "graph/replays" in row]
    assert all(row["graph/update_ms"] > 0 and row["graph/capture_ms"] > 0 for row in rows[1:])
    with pytest.raises(GraphCaptureError, match="shape cache full"):
        run(tmp_path, PULSED, [RehearsedGraph(scope="optimizer", max_graphs=1, on_failure="raise")])


def test_parity_of_a_run_that_falls_is_said_to_be_none(tmp_path):
    graph = RehearsedGraph(parity_steps=2)
    run(tmp_path, PULSED, [graph], Index)
    assert graph.parity_max_abs is None and "nothing is compared" in graph.reasons[-1]


def test_nothing_to_record(tmp_path):
    """A model without tiles whose steps cannot be recorded stays eager, and that is said."""
    graph = RehearsedGraph()
    pl.seed_everything(0)
    trainer = pl.Trainer(
        strategy=LRTTStrategy(include=[]), callbacks=[graph], accelerator="cpu", barebones=True, max_epochs=1
    )
    trainer.fit(Index(), DataLoader(data(), 10))
    assert "no tiles" in graph.reasons[-1] and graph.replays == 0 and graph.eager_steps == 8
    with pytest.raises(MisconfigurationException, match="no tiles whose update could be recorded"):
        run(tmp_path, None, [RehearsedGraph(scope="optimizer", on_failure="raise")])


# ------------------------------------------------------------------ failures, exceptions, resume


def test_failed_capture_goes_on_eagerly(tmp_path):
    """The reason is said once, the step that failed is taken eagerly, and no bit changes."""
    graph = RehearsedGraph(fail=RuntimeError("operation not permitted when stream is capturing"))
    recorded = run(tmp_path, PULSED, [graph])
    assert len(graph.reasons) == 1 and "not permitted" in graph.reasons[0] and graph.captures == 0
    assert_same_run(recorded, run(tmp_path, PULSED, []))


def test_failed_capture_raises_if_asked(tmp_path):
    with pytest.raises(GraphCaptureError, match="not permitted"):
        run(tmp_path, PULSED, [RehearsedGraph(fail=RuntimeError("not permitted"), on_failure="raise")])


@pytest.mark.parametrize("parity", [0, 1])
def test_capture_that_fails_halfway_leaves_no_trace(tmp_path, parity):
    """A metric's value used in the step is refused inside the capture, after part of the step has run its Python."""

    class Uses(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, 0)
            self.log("twice", 2 * self.error(output["out"].detach(), batch[1]))
            return output

    graph = RehearsedGraph(parity_steps=parity)
    recorded = run(tmp_path, PULSED, [graph], Uses)
    assert "may only be logged" in graph.reasons[0] and graph.replays == 0
    assert_same_run(recorded, run(tmp_path, PULSED, [], Uses))


def test_exception_in_a_step_leaves_nothing_installed(tmp_path):
    class Bomb(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 12:
                raise KeyError("on purpose")

    graph, module = RehearsedGraph(), Net()
    with pytest.raises(KeyError):
        run(tmp_path, PULSED, [graph, Bomb()], module)
    assert graph.replays > 0 and graph.active_scope == "none"
    assert not {"log", "log_dict"} & module.__dict__.keys() and "forward" not in module.error.__dict__


def test_exception_inside_a_recorded_step(tmp_path):
    """Attributes that hide ``log`` during a capture are gone after an exception too."""

    class Late(Net):
        armed = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.armed:
                raise KeyError("on purpose")
            return super().training_step(batch, 0)

        def on_train_batch_end(self, *args: Any) -> None:
            self.armed = self.trainer.global_step == 3

    module = Late()
    with pytest.raises(KeyError):
        run(tmp_path, PULSED, [RehearsedGraph()], module)
    assert not {"log", "log_dict"} & module.__dict__.keys()


@both
def test_resume_in_the_middle(tmp_path, config):
    """Stopped in the middle of an epoch and a cycle, and gone on with: the bits of the run that never stopped."""

    def loader() -> Any:
        return ResumableLoader(data(), batch_size=10, seed=3)

    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=18, save_top_k=-1, filename="at")
    whole = run(tmp_path, config, [RehearsedGraph(), saver], train=loader(), enable_checkpointing=True)
    graph = RehearsedGraph()
    resumed = run(
        tmp_path,
        config,
        [graph, ModelCheckpoint(tmp_path / "other")],
        train=loader(),
        ckpt_path=str(tmp_path / "ckpt" / "at.ckpt"),
        enable_checkpointing=True,
    )
    assert graph.captures >= 2 and graph.replays > 18 - 4  # the first run's counters go on
    for name, value in whole[0].state_dict().items():
        assert same_bits(value, resumed[0].state_dict()[name]), name


# ------------------------------------------------------------------ shapes


class Shapes:
    """Batches of the given sizes."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Any:
        for size in self.sizes:
            x, y = data(size).tensors
            yield {"pair": (x, y), "name": "batch"}


class Named(Net):
    """Takes nested batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["pair"], 0)


def test_many_shapes_do_not_throw_each_other_out(tmp_path):
    """With room for two, two shapes are replayed and the others stay eager, which is said once."""
    sizes = [8, 6, 4, 2] * 6
    graph = RehearsedGraph(max_graphs=2)
    recorded = run(tmp_path, DIGITAL, [graph], Named, train=Shapes(sizes))
    assert graph.captures == 2 and graph.replays > 30
    assert len(graph.reasons) == 1 and "shape cache full (2), got (2, 6) float32" in graph.reasons[0]
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Named, train=Shapes(sizes)))


def test_values_in_a_batch_are_part_of_its_shape(tmp_path):
    """A Python value that is another in every batch never comes to a recording."""

    class Names(Shapes):
        def __iter__(self) -> Any:
            for i, batch in enumerate(super().__iter__()):
                yield {**batch, "name": f"file {i}"}

    graph = RehearsedGraph()
    recorded = run(tmp_path, DIGITAL, [graph], Named, train=Names([4] * 20), max_epochs=1)
    assert graph.captures == 0 and graph.eager_steps == 20
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Named, train=Names([4] * 20), max_epochs=1))


def test_unknown_containers_stay_eager(tmp_path):
    class Odd(Shapes):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield {**batch, "odd": object()}

    graph = RehearsedGraph()
    run(tmp_path, DIGITAL, [graph], Named, train=Odd([4] * 8), max_epochs=1)
    assert graph.captures == 0 and "got object" in graph.reasons[0]


def test_transfer_hooks_of_the_user_run(tmp_path):
    """``on_after_batch_transfer`` is applied before the static buffers are filled."""

    class Doubles(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [2 * t for t in batch]

    graph = RehearsedGraph()
    recorded = run(tmp_path, DIGITAL, [graph], Doubles)
    assert graph.replays > 20
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Doubles))


def test_modes_and_frozen_parameters_are_part_of_a_recording(tmp_path):
    """Batch norm set to eval, and a bias frozen, between epochs: new recordings, eager's bits."""

    class Freezes(Net):
        def on_train_epoch_start(self) -> None:
            self.net[1].train(self.current_epoch < 1)
            self.net[4].bias.requires_grad_(self.current_epoch < 2)

    graph = RehearsedGraph(max_graphs=8)
    recorded = run(tmp_path, PULSED, [graph], Freezes)
    assert graph.captures > 2 and graph.replays > 10
    assert_same_run(recorded, run(tmp_path, PULSED, [], Freezes))


# ------------------------------------------------------------------ logs and reports


def test_collections_and_methods_of_metrics(tmp_path):
    """A MetricCollection through log_dict, and update without a value, are called after every replay."""

    class Many(Net):
        def __init__(self) -> None:
            super().__init__()
            self.all = MetricCollection([MeanAbsoluteError()], prefix="train/")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, 0)
            self.log_dict(self.all(output["out"], batch[1]), on_step=True, on_epoch=True)
            return output

    graph = RehearsedGraph()
    recorded = run(tmp_path, DIGITAL, [graph], Many)
    assert graph.replays > 20 and "train/MeanAbsoluteError_epoch" in recorded[2].seen[-1]
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Many))


def test_metric_argument_changed_later_is_refused(tmp_path):
    class Changes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self.net(batch[0])
            seen = out.detach()
            self.error.update(seen, batch[1])
            seen.add_(1.0)
            return {"loss": (out - batch[1]).square().mean()}

    graph = RehearsedGraph()
    run(tmp_path, DIGITAL, [graph], Changes)
    assert "modified in place after the metric" in graph.reasons[0] and graph.replays == 0


def test_tile_monitor_sees_its_steps(tmp_path):
    """A TileMonitor's logging steps run eagerly between replays; it logs what it logs without recordings."""
    rows = []
    for graphs in ([], [RehearsedGraph()]):
        logger = Rows()
        run(tmp_path, PULSED, [TileMonitor(), *graphs], logger=logger)
        rows.append(logger.without_speed())
    assert rows[0] == rows[1] and any("tile/net.0/norm_A" in row for row in rows[0])


def test_tags(tmp_path):
    """Counters, times and the reasons' text, under the names that the docs tell."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="run", version=0)
    run(tmp_path, DIGITAL, [RehearsedGraph(parity_steps=1, timing=True, max_graphs=1)], Quiet, logger=logger)
    events = EventAccumulator(str(tmp_path / "run" / "version_0"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("graph/")
    }
    assert tags.keys() == {
        f"graph/{name}"
        for name in (
            "captures",
            "replays",
            "eager_steps",
            "pool_MiB",
            "capture_ms",
            "parity_max_abs",
            "transfer_ms",
            "step_ms",
        )
    }
    assert [step for step, _ in tags["graph/replays"]] == [6, 13, 20, 27, 32]  # every 7 steps, and at the end
    assert tags["graph/captures"][-1][1] == 1 and tags["graph/pool_MiB"][-1][1] == 1 and tags["graph/step_ms"][0][1] > 0
    assert tags["graph/replays"][-1][1] + tags["graph/eager_steps"][-1][1] + 1 == 32
    (text,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("graph/reasons")]
    assert b"shape cache full" in events.Tensors(text)[0].tensor_proto.string_val[0]


def test_reasons_are_logged_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lightning_lrtt"):
        run(tmp_path, DIGITAL, [CUDAGraph()])
    assert [r.message for r in caplog.records if "CUDAGraph" in r.message] == [
        "CUDAGraph: device cpu has no CUDA graphs; every step is eager"
    ]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"scope": "backward"}, "scope must be one of"),
        ({"warmup": 0}, "warmup must be >= 1"),
        ({"max_graphs": 0}, "max_graphs must be >= 1"),
        ({"parity_steps": -1}, "parity_steps must be >= 0"),
        ({"on_failure": "ignore"}, "on_failure must be one of"),
        ({"every_n_steps": 0}, "every_n_steps must be >= 1"),
        ({"timing": "yes"}, "timing must be True or False, got 'yes'"),
        ({"find_syncs": 3}, "find_syncs must be True or False, got 3"),
        ({"scope": "optimizer", "parity_steps": 1}, "parity_steps must be 0 with scope='optimizer', got 1"),
    ],
)
def test_arguments(numbers, message):
    with pytest.raises(ValueError, match=message):
        CUDAGraph(**numbers)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """``--trainer.callbacks+=CUDAGraph`` with its arguments, in the saved configuration too."""
    from lightning_lrtt.cli import main

    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    monkeypatch.setattr("sys.argv", ["lrtt"])
    monkeypatch.setattr(logging.getLogger("lightning_lrtt"), "handlers", [logging.NullHandler()])
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")
    main(
        [
            "fit",
            "-c",
            "examples/digits/convnet.yaml",
            "--trainer.accelerator=cpu",
            f"--trainer.logger.save_dir={tmp_path}",
            "--trainer.max_steps=5",
            "--trainer.callbacks+=CUDAGraph",
            "--trainer.callbacks.parity_steps=2",
            "--trainer.callbacks+=MemoryCleanup",
            "--test_after_fit=false",
        ]
    )
    saved = next(tmp_path.rglob("config.yaml")).read_text()
    assert "parity_steps: 2" in saved and "lightning_lrtt.callbacks.MemoryCleanup" in saved


def test_compiled_modules_are_recorded(tmp_path):
    """Dynamo saves the host's random state around a compiled call, which is no draw."""

    class Compiled(Net):
        def on_fit_start(self) -> None:
            self.fast = torch.compile(self.net, backend="eager")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.fast(batch[0]) - batch[1]).square().mean()

    graph = RehearsedGraph()
    recorded = run(tmp_path, PULSED, [graph], Compiled)
    assert graph.reasons == [] and graph.replays > 20
    assert_same_run(recorded, run(tmp_path, PULSED, [], Compiled))
