"""The graph machinery without Lightning and without a GPU."""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import same_bits
from rerun_recorder import RerunRecorder
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, devices
from lightning_lrtt.graphs import (
    DeviceForm,
    Finder,
    FrozenValues,
    GraphCache,
    GraphCaptureError,
    HostState,
    PhaseTimer,
    StateCopy,
    StaticBatch,
    TileGraphs,
    Unsupported,
    describe,
    max_difference,
)
from lightning_lrtt.graphs.batches import shapes
from lightning_lrtt.graphs.finder import read_argument
from lightning_lrtt.nn import LRTTConv2d, LRTTLinear

CPU = torch.device("cpu")

# ------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(3, 2).t(),
        3,
        "a",
        None,
    ],
    ids=["shape", "dtype", "strides", "number", "string", "none"],
)
def test_keys_differ(other):
    assert describe({"x": other})[0] != describe({"x": torch.zeros(2, 3)})[0]


def test_keys_depend_on_structure_not_on_values():
    x = torch.zeros(2)
    assert describe([x, x])[0] != describe((x, x))[0] != describe({"a": x, "b": x})[0]
    assert describe({"a": x, "n": 1})[0] == describe({"a": x + 1, "n": 1})[0]


@pytest.mark.parametrize(
    "leaf", [object(), torch.zeros(2, requires_grad=True), torch.eye(2).to_sparse()], ids=["object", "grad", "sparse"]
)
def test_unsupported_leaves(leaf):
    with pytest.raises(Unsupported, match="must"):
        describe([leaf])


def test_static_batch_keeps_addresses_and_strides():
    """Every batch lies at the same place, in fresh containers, with the strides that a transfer would give."""
    first = {"x": torch.randn(4, 3).t(), "y": [torch.arange(4), 7]}
    static = StaticBatch(*describe(first)[1:], CPU)
    one = static.fill(describe(first)[1])
    second = {"x": torch.randn(4, 3).t(), "y": [torch.arange(4) * 2, 7]}
    other = static.fill(describe(second)[1])
    assert one is not other and one["x"] is other["x"] and torch.equal(other["x"], second["x"])
    assert (
        other["x"].stride() == first["x"].stride() and torch.equal(other["y"][0], second["y"][0]) and other["y"][1] == 7
    )
    assert static.bytes == 4 * 3 * 4 + 4 * 8
    assert shapes(describe(first)[1]) == "(3, 4) float32, (4,) int64, 7"


# ------------------------------------------------------------------ cache


def recorded(cache: GraphCache, *key: Any) -> None:
    assert cache.room(key)
    cache.entry(key).recording = object()  # type: ignore[assignment]


def test_least_recently_used_makes_room_once_it_has_rested():
    cache = GraphCache(2, patience=5)
    recorded(cache, "a")
    recorded(cache, "b")
    cache.entry(("a",))
    assert not cache.room(("c",))  # b has not rested
    for _ in range(5):
        cache.entry(("a",))
    assert cache.room(("c",)) and len(cache) == 1
    assert cache.entry(("a",)).recording is not None and cache.entry(("b",)).recording is None


def test_later_micro_batches_go_with_the_first():
    cache = GraphCache(3, patience=0)
    for key in (("a",), ("a", "b"), ("a", "b", "c")):
        recorded(cache, *key)
    assert not cache.room(("a", "x"))  # would throw out what it continues
    assert cache.room(("z",)) and len(cache) == 0


def test_endless_keys_do_not_fill_the_memory():
    cache = GraphCache(1)
    recorded(cache, "kept")
    for i in range(2000):
        cache.entry((i,))
    assert len(cache._entries) <= 256 and cache.entry(("kept",)).recording is not None


# ------------------------------------------------------------------ finder

X = torch.tensor([1.0, -1.0, 2.0])


def item():
    X.sum().item()


def condition():
    if X.sum() > 0:
        pass


def mask():
    X[X > 0]


def mask_assignment():
    X.clone()[X > 0] = torch.tensor([1.0, 2.0])


def nonzero():
    torch.nonzero(X)


def unique():
    X.unique()


def to_list():
    X.tolist()


def to_numpy():
    X.numpy()


def equal():
    torch.equal(X, X)


def inverse():
    torch.linalg.inv(torch.eye(2))


def in_backward():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad.sum().item()
            return grad

    Reads.apply(X.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    "do",
    [item, condition, mask, mask_assignment, nonzero, unique, to_list, to_numpy, equal, inverse, in_backward],
    ids=lambda f: f.__name__,
)
def test_finder_names_the_line_of_a_synchronisation(do):
    """Each is found once, at a line of its own function."""
    finder = Finder(CPU)
    with finder.watch():
        do()
    (finding,) = finder.findings
    first = do.__code__.co_firstlineno
    file, line = finding.where.rsplit(":", 1)
    assert finding.kind == "sync" and Path(file) == Path(__file__) and first < int(line) < first + 15


@pytest.mark.parametrize(
    "do",
    [random.random, lambda: random.uniform(0, 1), np.random.rand, time.time],
    ids=["random", "uniform", "numpy", "time"],
)
def test_finder_names_frozen_values(do):
    finder = Finder(CPU)
    with finder.watch():
        do()
    assert {f.kind for f in finder.findings} == {"frozen"}
    assert (__file__ if do is not np.random.rand else "unknown line") in finder.findings[0].where


def test_finder_lets_an_ordinary_step_pass():
    """A tile, cross-entropy, clipping, masked_fill, torch.where, dropout and an optimizer read nothing."""
    finder = Finder(CPU)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(), LRTTLinear(4, 2, config=LRTTConfig(rank=1, fast_device=devices.Ideal()))
    )
    optimizer = LRTT(model.parameters(), lr=0.1)
    with finder.watch():
        y = model(torch.randn(5, 3)).masked_fill(torch.rand(5, 2) > 0.5, 0.0)
        y[torch.zeros(5, 2, dtype=torch.bool)] = 0.0  # becomes masked_fill
        nn.functional.cross_entropy(torch.where(y > 0, y, 0.1 * y), torch.zeros(5, dtype=torch.long)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert finder.findings == []


def test_finder_pauses():
    finder = Finder(CPU)
    with finder.watch(), finder.pause():
        X.sum().item()
    assert finder.findings == []


def test_finder_is_not_told_of_collections_of_garbage(tmp_path):
    """Regression: hypothesis times them, and its clock counted as one that the step reads."""
    space: dict[str, Any] = {}
    source = "import time\ndef timed(phase, info):\n    time.perf_counter()\n"
    exec(compile(source, str(tmp_path / "user.py"), "exec"), space)
    gc.callbacks.append(space["timed"])
    finder = Finder(CPU)
    try:
        with finder.watch():
            rings = [[] for _ in range(100_000)]
            for ring in rings:
                ring.append(ring)
    finally:
        gc.callbacks.remove(space["timed"])
    assert finder.findings == [] and gc.isenabled()


def test_finder_leaves_a_profiler_alone():
    """Regression: cProfile's hook, put back by ``sys.setprofile``, was no longer callable and broke the step."""
    import cProfile

    finder = Finder(CPU)
    with cProfile.Profile() as profile, finder.watch():
        X.sum().item()
    assert [f.kind for f in finder.findings] == ["sync"] and profile.getstats()


def test_read_argument():
    class Module:
        def leaves(self, batch, batch_idx):
            return batch

        def reads(self, batch, batch_idx):
            return batch if batch_idx % 2 else None

        def inside(self, batch, index):
            return [b + index for b in batch]

        def short(self, batch):
            return batch

        def rest(self, batch, *args):
            return batch, args

        def unread(self, *args):
            return None

    module = Module()
    names = ("leaves", "reads", "inside", "short", "rest", "unread")
    assert [read_argument(getattr(module, n), 1) for n in names] == ["", "batch_idx", "index", "", "*args", ""]


# ------------------------------------------------------------------ host state, parity, timer


def test_host_state_tells_and_restores():
    module = nn.BatchNorm1d(2)
    module.calls, module.mean, module.same = 0, torch.zeros(()), float("nan")
    state = HostState({"": module, "sub": nn.Linear(1, 1)}, frozenset({"ignored"}))
    mean = module.mean
    module(torch.randn(4, 2))  # buffers change in place: no change
    assert state.changes() == []
    module.calls, module.mean, module.new, module.ignored = 1, torch.ones(()), "x", 3
    module.running_mean = torch.zeros(2)
    assert set(state.changes()) == {"calls", "mean", "new", "running_mean"}
    state.restore()
    assert state.changes() == [] and module.mean is mean and not hasattr(module, "new")


def test_host_state_looks_into_lists_objects_and_generators():
    """Elements and values of then come back, in the objects of then."""
    module = nn.Linear(1, 1)
    module.rows, module.seen, module._own = [1, 2], {3}, []
    module.meter = SimpleNamespace(count=0, last=deque([5]), by_name={"a": 1})
    module.generator = np.random.default_rng(0)
    rows, meter = module.rows, module.meter
    state = HostState({"": module})
    drawn = module.generator.random()
    rows.append(3)
    module.seen.clear()
    module._own.append(1)
    meter.count, meter.by_name["b"] = 1, 2
    meter.last.append(6)
    assert set(state.changes()) == {"rows", "seen", "generator", "meter.count", "meter.last", "meter.by_name"}
    module.rows = [1, 2]  # equal, and another list
    state.restore()
    assert state.changes() == [] and module.rows is rows and rows == [1, 2] and module.seen == {3}
    assert meter == SimpleNamespace(count=0, last=deque([5]), by_name={"a": 1}) and module._own == [1]
    assert module.generator.random() == drawn


def test_frozen_values_tell_what_changed_and_who_may_read_it():
    module = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2))
    module.weight, module.calls, module.mean = 0.5, 0, torch.zeros(())
    module.settings = SimpleNamespace(gain=float("nan"))
    frozen = FrozenValues(
        dict(module.named_modules()), {"p", "weight", "mean", "gain", "late"}, frozenset({"training"})
    )
    anything = FrozenValues(dict(module.named_modules()), None, frozenset({"training"}))
    module.calls, module[0].training = 1, False
    module.mean += 1  # in place, which a graph sees
    module.settings.gain = float("nan")  # NaN is NaN
    assert frozen.changed() == [] and anything.changed() == anything.changed() == ["calls"]
    module.settings = SimpleNamespace(gain=float("nan"))  # equal, and its name is in no code: looked into from now on
    module.unknown = 1
    assert frozen.changed() == [] and anything.changed() == ["calls", "settings", "unknown"]
    module.settings.gain = 1.0
    assert frozen.changed() == ["settings.gain"]
    module.settings.gain = float("nan")
    module.mean, module.weight, module.late, module[0].p = torch.ones(()), "half", 1, 0.2
    module.settings.gain = 2.0
    assert set(frozen.changed()) == {"mean", "weight", "late", "0.p", "settings.gain"}
    module.weight, module[0].p, module.settings.gain = 0.5, 0.1, float("nan")
    del module.late
    assert frozen.changed() == ["mean"]


def test_finder_knows_the_names_that_a_step_may_read():
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x) * self.in_a_string

    module = Reads()
    module.drop, module.in_a_string, module.not_read_by_anything = nn.Dropout(0.5), 2.0, 1
    finder = Finder(CPU)
    with finder.watch():
        module(torch.ones(2))
    assert finder.names is not None and finder.names >= {"p", "in_a_string"}
    assert "not_read_by_anything" not in finder.names
    compiled = Finder(CPU)
    with compiled.watch():
        torch.compile(module, backend="eager")(torch.ones(2))
    assert compiled.names is None


INSTALLED = """
import time
from collections import deque
def step(trainer):
    step = trainer.global_step
    return step, time.time()
"""


@pytest.mark.parametrize("package", ["user_models", "lightning"])
def test_a_model_may_be_an_installed_package(tmp_path, package):
    """Regression: what it read of the Trainer or of a clock counted as read by a library."""
    folder = tmp_path / "site-packages" / package
    space: dict[str, Any] = {}
    exec(compile(INSTALLED, str(folder / "model.py"), "exec"), space)
    finder = Finder(CPU, {pl.Trainer.global_step.fget.__code__: "Trainer.global_step"})
    with finder.watch():
        space["step"](pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
    found = [finding for finding in finder.findings if str(folder) in finding.where]
    assert [str(f).partition(" is read")[0] for f in found] == (
        ["Trainer.global_step", "time.time()"] if package == "user_models" else []
    )


def test_state_copy_and_difference():
    x, parameter = torch.randn(3), nn.Parameter(torch.randn(2))
    torch.manual_seed(0)
    copy = StateCopy([x, parameter], CPU)
    before = copy.now()
    version = x._version
    drawn = torch.rand(2)
    x.add_(0.5)
    assert max_difference(before, copy.now()) == pytest.approx(0.5, abs=1e-6)
    copy.restore()
    assert max_difference(before, copy.now()) == 0.0 and torch.equal(torch.rand(2), drawn)
    assert x._version == version + 1  # putting back is no modification that autograd or a latch should mind


@pytest.mark.parametrize(
    ("a", "b", "gap"),
    [
        (float("nan"), float("nan"), 0.0),
        (float("inf"), float("inf"), 0.0),
        (float("nan"), 1.0, float("inf")),
        (float("inf"), 1.0, float("inf")),
        (float("inf"), float("-inf"), float("inf")),
        (1.0, 3.0, 2.0),
        (-0.0, 0.0, 0.0),
    ],
)
def test_difference_of_special_values(a, b, gap):
    assert max_difference([torch.tensor([0.0, a])], [torch.tensor([0.0, b])]) == gap
    assert max_difference([torch.tensor([])], [torch.tensor([])]) == 0.0


class _Tick:
    now = 0.0
    passed = 0.0

    def __init__(self) -> None:
        _Tick.now += 1.0
        self.at = _Tick.now

    def ready(self) -> bool:
        return self.at <= _Tick.passed

    def milliseconds_since(self, earlier: Any) -> float:
        return self.at - earlier.at


def test_timer_reads_what_has_passed():
    timer = PhaseTimer(_Tick, keep=3)
    for phase in ("a", "b", "a"):
        timer.begin(phase)  # a mark each; the next begin ends the phase
    timer.end()
    assert timer.means() == {}
    _Tick.passed = 3.0
    assert timer.means() == {"a": 1.0, "b": 1.0}
    _Tick.passed = 9.0
    assert timer.means() == {"a": 1.0} and timer.means() == {}


# ------------------------------------------------------------------ optimizers


class _Own(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: _Own(p, lr=0.1), "no capturable or fused form"),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), "no capturable or fused form"),
        (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), "differentiable"),
        (lambda p: torch.optim.SGD(p, lr=0.1), ""),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)), ""),
    ],
    ids=["own", "adagrad", "differentiable", "sgd", "adamw"],
)
def test_which_optimizers_have_a_device_form(make, said):
    optimizer = make([nn.Parameter(torch.zeros(2))])
    reason = DeviceForm.why_not(optimizer, CPU)
    assert said in reason and bool(said) == bool(reason)
    if said:
        with pytest.raises(ValueError, match=said):
            DeviceForm(optimizer, CPU)


def test_device_form_refuses_hooks_and_other_devices():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert "must be on meta" in DeviceForm.why_not(optimizer, torch.device("meta"))
    optimizer.register_step_post_hook(lambda *args: None)
    assert "hooks" in DeviceForm.why_not(optimizer, CPU)


def test_signature_leaves_out_lr():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.1)
    form = DeviceForm(optimizer, CPU)
    before = form.signature()
    optimizer.param_groups[0]["lr"] = 0.2
    assert form.signature() == before
    optimizer.param_groups[0]["betas"] = (0.8, 0.9)
    assert form.signature() != before


# ------------------------------------------------------------------ lr on the device, and the tiles' update


def test_lr_is_refreshed_in_place():
    """A held step moves by what `refresh_lr` wrote, whatever the group says; the scalar stays where it is."""
    layer = LRTTLinear(3, 2, config=LRTTConfig(rank=1))
    optimizer = LRTT(layer.parameters(), lr=0.5, tile_lr_scale=2.0)
    optimizer.refresh_lr()
    (held,) = optimizer._lr.values()
    assert held.item() == 1.0
    optimizer.param_groups[0]["lr"] = 0.0
    layer(torch.ones(4, 3)).sum().backward()
    before = layer.A.detach().clone()
    with optimizer.lr_held():
        optimizer.step()
    assert not torch.equal(layer.A, before) and held.item() == 1.0
    optimizer.refresh_lr()
    assert optimizer._lr[0, CPU] is held and held.item() == 0.0


def tile_run(fast: Any, runner: Any, conv: bool, steps: int = 12) -> dict[str, torch.Tensor]:
    """Steps with a falling lr, two backward passes in each, and a ragged batch now and then."""
    torch.manual_seed(1)
    config = LRTTConfig(rank=2, transfer_every=3, fast_device=fast, visible_device=fast)
    model: nn.Module = nn.Sequential(LRTTLinear(6, 5, config=config), nn.Tanh(), LRTTLinear(5, 3, config=config))
    if conv:
        model = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Unflatten(2, (2, 3)), LRTTConv2d(1, 4, 2, config=config))
    optimizer = LRTT(model.parameters(), lr=0.1)
    optimizer.runner = runner
    for i in range(steps):
        optimizer.zero_grad()
        for part in range(2):
            x = torch.randn(8 if i % 5 else 3, 6, generator=torch.Generator().manual_seed(2 * i + part))
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("fast", [None, devices.SoftBounds()], ids=["digital", "pulsed"])
def test_tile_graphs_equal_eager(fast, conv):
    events: list[str] = []
    eager = tile_run(fast, None, conv)
    graphs = tile_run(fast, TileGraphs(RerunRecorder(), report=lambda event, reason: events.append(event)), conv)
    assert events.count("replay") >= 5 and events.count("capture") == 1
    for name, value in eager.items():
        assert same_bits(value, graphs[name]), name


def test_tile_graphs_fail_softly_or_raise():
    reasons: list[str] = []
    broken = RerunRecorder(fail=RuntimeError("refused by the device"))
    soft = tile_run(
        None, TileGraphs(broken, report=lambda event, reason: reasons.append(reason) if reason else None), False
    )
    assert broken.records == 1 and "refused by the device" in reasons[0]
    for name, value in tile_run(None, None, False).items():
        assert same_bits(value, soft[name]), name
    with pytest.raises(GraphCaptureError, match="refused by the device"):
        tile_run(None, TileGraphs(broken, on_failure="raise"), False)


def test_tile_graphs_stay_eager_while_watched():
    events: list[str] = []
    tile_run(None, TileGraphs(RerunRecorder(), eager_now=lambda: True, report=lambda e, _: events.append(e)), False)
    assert set(events) == {"eager"}
