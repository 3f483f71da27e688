"""What a graph would freeze or leave out: told, renewed or undone, on a recorder that replays operators only."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from graph_helpers import Net, Rows, assert_same_run, data, run
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import DIGITAL, PULSED
from lightning_lrtt.callbacks import CUDAGraph, TileMonitor
from taped_recorder import TapedGraph
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SpearmanCorrCoef
from torchmetrics.classification import BinaryAUROC

from lightning_lrtt.graphs import GraphCaptureError


class Steady(Net):
    """A constant lr, which the recorder needs, and room for what a test adds to the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.net(x)
        loss = (out - y).square().mean() + self.more(out)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return {"loss": loss}

    def more(self, out: torch.Tensor) -> Any:
        return 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_operators_alone_equal_eager(tmp_path, config):
    """The recorder itself: without traps its replays have eager's bits, with clipping and accumulation."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    graph = TapedGraph(on_failure="raise", parity_steps=1)
    recorded = run(tmp_path, config, [graph], Steady, **options)
    assert graph.replays >= 15 and graph.parity_max_abs == 0.0
    assert_same_run(recorded, run(tmp_path, config, [], Steady, **options))


# ------------------------------------------------------------------ values that change between steps


class Anneals(Steady):
    """A weight of the loss that every epoch sets, first as an attribute of the class."""

    weight = 0.0

    def on_train_epoch_start(self) -> None:
        self.weight = 0.1 * self.current_epoch

    def more(self, out: torch.Tensor) -> Any:
        return self.weight * out.square().mean()


class Drops(Steady):
    """A library's attribute."""

    def on_train_epoch_start(self) -> None:
        self.net[3].p = 0.1 * self.current_epoch


class Clips(Steady):
    """The Trainer's."""

    def on_train_epoch_start(self) -> None:
        self.trainer.gradient_clip_val = 1.0 / (1 + self.current_epoch)


class Holds(Steady):
    """In a plain object."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = SimpleNamespace(weight=0.0)

    def on_train_epoch_start(self) -> None:
        self.settings.weight = 0.1 * self.current_epoch

    def more(self, out: torch.Tensor) -> Any:
        return self.settings.weight * out.square().mean()


class Rebinds(Steady):
    """Another tensor, at another address."""

    def on_train_epoch_start(self) -> None:
        self.weight = torch.full((), 0.1 * self.current_epoch)

    def more(self, out: torch.Tensor) -> Any:
        return self.weight * out.square().mean()


class Compiled(Anneals):
    """Reads the attribute where no Python runs."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.compile(self.more, backend="eager")  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [Anneals, Drops, Clips, Holds, Rebinds, Compiled], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("find_syncs", [True, False])
def test_a_value_set_once_an_epoch_is_captured_anew(tmp_path, kind, find_syncs):
    """Regression: the value of the capture was replayed for ever, and the parity check of later graphs saw nothing."""
    clip = {"gradient_clip_val": 1.0} if kind is Clips else {}
    graph = TapedGraph(on_failure="raise", find_syncs=find_syncs)
    recorded = run(tmp_path, DIGITAL, [graph], kind, **clip)
    assert graph.captures >= 4 and graph.replays >= 12 and not graph.reasons
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], kind, **clip))


def test_a_value_set_in_every_step_is_named(tmp_path):
    class Every(Anneals):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.weight = 0.01 * self.global_step

    graph = TapedGraph()
    recorded = run(tmp_path, DIGITAL, [graph], Every)
    assert graph.active_scope == "none" and any("weight changes from step to step" in r for r in graph.reasons)
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Every))
    with pytest.raises(MisconfigurationException, match="weight changes from step to step"):
        run(tmp_path, DIGITAL, [TapedGraph(on_failure="raise")], Every)
    on_cpu = CUDAGraph()
    run(tmp_path, DIGITAL, [on_cpu], Every)
    assert any("weight changes from step to step" in r for r in on_cpu.reasons)


def test_clipping_that_changes_in_every_step_is_named(tmp_path):
    """Regression: every step had a key of its own, none was captured, and nothing was said."""

    class Every(Steady):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.trainer.gradient_clip_val = 1.0 / (1 + self.global_step)

    graph = TapedGraph()
    recorded = run(tmp_path, DIGITAL, [graph], Every, gradient_clip_val=1.0)
    assert any("gradient clipping" in reason for reason in graph.reasons)
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Every, gradient_clip_val=1.0))


def test_a_counter_that_no_step_reads_is_nobodys_business(tmp_path):
    class Counts(Steady):
        batches_so_far = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches_so_far += 1

    graph = TapedGraph(on_failure="raise")
    run(tmp_path, DIGITAL, [graph], Counts)
    assert graph.captures == 2 and graph.replays >= 20


# ------------------------------------------------------------------ what changes within a step


class Appends(Steady):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []

    def more(self, out: torch.Tensor) -> Any:
        self.outputs.append(out.detach())
        return 0.0


class Meter(Steady):
    def __init__(self) -> None:
        super().__init__()
        self.meter = SimpleNamespace(count=0, last=deque(maxlen=2), by_name={}, kinds=set())

    def more(self, out: torch.Tensor) -> Any:
        self.meter.count += 1
        self.meter.last.append(self.meter.count)
        self.meter.by_name["last"] = self.meter.count
        self.meter.kinds.add(self.meter.count)
        return 0.0


class Mixes(Steady):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def more(self, out: torch.Tensor) -> Any:
        return float(self.generator.beta(0.4, 0.4)) * out.mean()


class Unpacks(Net):
    def training_step(self, *args: Any) -> Any:
        batch, batch_idx = args
        return super().training_step(batch, 0) if batch_idx >= 0 else None


class Weighs(Steady):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def more(self, out: torch.Tensor) -> Any:
        self.mean.update(out.mean(), 3.0)
        return 0.0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Appends, "outputs changes in the step"),
        (Meter, "meter.count changes in the step"),
        (Mixes, "generator changes in the step"),
        (Unpacks, "*args, which holds batch_idx"),
        (Weighs, "mean.update is given a Python number"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_would_go_silent_is_named(tmp_path, kind, said):
    """Regression: lists, plain objects, NumPy's generators, ``*args`` and numbers for metrics were not looked at."""
    graph = TapedGraph()
    recorded = run(tmp_path, DIGITAL, [graph], kind)
    assert any(said in reason for reason in graph.reasons), graph.reasons
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], kind))


@pytest.mark.parametrize("trouble", [{"fail": RuntimeError("refused")}, {"parity_steps": 3}], ids=["failure", "parity"])
def test_a_capture_leaves_no_trace_in_plain_objects(tmp_path, trouble):
    """Regression: what a broken capture and the eager twin of a parity check had counted stayed counted.

    Without the finder these steps are captured, and given up when the count is another in every one of them.
    """
    graph = TapedGraph(find_syncs=False, **trouble)
    module, _, _ = run(tmp_path, DIGITAL, [graph], Meter)
    meter = module.meter
    assert graph.captures == (0 if "fail" in trouble else 4)  # of two shapes
    assert meter.count == meter.by_name["last"] == meter.last[-1] == len(meter.kinds) == 32


def test_a_plain_tensor_is_part_of_the_state(tmp_path):
    """Regression: a parity check applied the change of a tensor that is no buffer twice, and gave every graph up."""

    class Follows(Steady):
        def __init__(self) -> None:
            super().__init__()
            self.average = torch.zeros(())

        def more(self, out: torch.Tensor) -> Any:
            self.average.mul_(0.9).add_(out.detach().mean())
            return self.average * out.mean()

    graph = TapedGraph(on_failure="raise", parity_steps=2)
    recorded = run(tmp_path, DIGITAL, [graph], Follows)
    eager = run(tmp_path, DIGITAL, [], Follows)
    assert graph.parity_max_abs == 0.0 and graph.replays >= 20
    assert recorded[0].average == eager[0].average
    assert_same_run(recorded, eager)


class Hooked(Callback):
    def __init__(self, what: str) -> None:
        self.what, self.calls = what, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.what == "forward":
            pl_module.net[2].register_forward_hook(self.look)
        else:
            pl_module.net[1].weight.register_hook(self.look)

    def look(self, *args: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_hooks_on_modules_and_parameters_are_named_and_keep_speaking(tmp_path, what):
    graph, hook, alone = TapedGraph(), Hooked(what), Hooked(what)
    run(tmp_path, DIGITAL, [hook, graph], Steady)
    run(tmp_path, DIGITAL, [alone], Steady)
    assert hook.calls == alone.calls and any(f"a {what} hook of net" in reason for reason in graph.reasons)


# ------------------------------------------------------------------ metrics and batches that are kept


class Lists(Steady):
    """Metrics that keep their arguments, and a module that keeps its targets until the epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.area, self.rank = BinaryAUROC(), SpearmanCorrCoef()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        self.area(out[:, 0].sigmoid(), (batch[1][:, 0] > 0).long())
        self.rank(out[:, 0], batch[1][:, 0])
        self.log("area", self.area, on_step=False, on_epoch=True)
        self.log("rank", self.rank, on_step=False, on_epoch=True)
        return (out - batch[1]).square().mean()


@pytest.mark.parametrize("make", [CUDAGraph, lambda: TapedGraph(find_syncs=False)], ids=["eager", "graph"])
def test_metrics_with_lists(tmp_path, make):
    """Regression: they kept the static tensors themselves, which the next batch overwrote, in eager steps too.

    torchmetrics reads values, which only a device would refuse.
    """
    graph = make()
    recorded = run(tmp_path, DIGITAL, [graph], Lists)
    assert graph.replays >= 20 if isinstance(graph, TapedGraph) else graph.replays == 0
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Lists))


def test_batches_of_eager_steps_may_be_kept(tmp_path):
    class Keeps(Callback):
        def __init__(self) -> None:
            self.kept: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.kept.append(batch[1])

    keeps = Keeps()
    run(tmp_path, DIGITAL, [CUDAGraph(), keeps], Steady, max_epochs=1, train=DataLoader(data(), batch_size=10))
    assert torch.equal(torch.cat(keeps.kept), data().tensors[1])


class Dicts(Steady):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["pair"], 0)


class Named:
    """Batches of given sizes, each with a name of its own."""

    def __init__(self, sizes: list[int], names: bool) -> None:
        self.sizes, self.names = sizes, names

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Any:
        for i, size in enumerate(self.sizes):
            yield {"pair": data(size).tensors, "name": f"image {i}" if self.names else ""}


def test_names_in_batches_are_said_once_and_hold_no_memory(tmp_path):
    """Regression: every batch after the sixteenth was a reason of its own, and sixteen were kept on the device."""
    graph = TapedGraph()
    run(tmp_path, DIGITAL, [graph], Dicts, train=Named([4] * 100, names=True), max_epochs=1)
    assert graph.captures == 0 and graph.eager_steps == 100
    (reason,) = graph.reasons
    assert "Python values that change from step to step, such as 'image 8'" in reason and "collate_fn" in reason


def test_shapes_that_came_once_do_not_keep_a_later_one_from_its_graph(tmp_path):
    """Regression: sixteen other shapes at the start, and no graph was ever captured."""
    graph = TapedGraph(max_graphs=2)
    sizes = [*range(5, 21), *[4] * 30]
    recorded = run(tmp_path, DIGITAL, [graph], Dicts, train=Named(sizes, names=False), max_epochs=1)
    assert graph.captures == 1 and graph.replays == 26  # after three eager steps
    assert_same_run(recorded, run(tmp_path, DIGITAL, [], Dicts, train=Named(sizes, names=False), max_epochs=1))


# ------------------------------------------------------------------ windows, watchers, options


class CountsUpdates(Steady):
    updates = 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.updates += 1


def test_a_scheduler_of_accumulation_counts_as_accumulation(tmp_path):
    """Regression: ``optimizer_step`` was called for every micro-batch, and the cache was too small for its windows."""
    graph = TapedGraph()
    module, trainer, _ = run(tmp_path, DIGITAL, [graph, GradientAccumulationScheduler({2: 4})], CountsUpdates)
    assert module.updates == trainer.global_step == 20
    assert any("optimizer_step is overridden" in reason for reason in graph.reasons)
    graph = TapedGraph(max_graphs=2, warmup=1)
    options: dict[str, Any] = {"max_epochs": 12}
    recorded = run(tmp_path, DIGITAL, [graph, GradientAccumulationScheduler({2: 4})], Steady, **options)
    assert not any("full" in reason for reason in graph.reasons), graph.reasons
    assert_same_run(recorded, run(tmp_path, DIGITAL, [GradientAccumulationScheduler({2: 4})], Steady, **options))


def test_a_watcher_of_every_step_is_named(tmp_path):
    graph = TapedGraph()
    run(tmp_path, PULSED, [TileMonitor(), graph], Steady, logger=Rows(), log_every_n_steps=1)
    assert graph.captures == 0
    assert ["TileMonitor has asked for an eager step 20 times in a row" in reason for reason in graph.reasons] == [True]


class Odd(Named):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield {**batch, "odd": object()}


@pytest.mark.parametrize(
    ("train", "said"),
    [(Odd([4] * 8, False), "got object"), (Named([*range(2, 8)] * 3, False), r"shape cache full \(1\)")],
    ids=["object", "shapes"],
)
def test_raise_raises_wherever_a_step_stays_eager(tmp_path, train, said):
    graph = TapedGraph(on_failure="raise", max_graphs=1)
    with pytest.raises(GraphCaptureError, match=said):
        run(tmp_path, DIGITAL, [graph], Dicts, train=train, max_epochs=1)
