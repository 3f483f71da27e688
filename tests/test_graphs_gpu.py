"""CUDA graphs without Lightning, on a GPU: recording, recovery, device forms of optimizers, the tiles' update."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import same_bits
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, build_info, devices
from lightning_lrtt.graphs import CudaRecorder, DeviceForm, Finder, PhaseTimer, StaticBatch, TileGraphs, describe
from lightning_lrtt.nn import LRTTLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one"),
    pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only"),
]
CUDA = torch.device("cuda", 0)


class Kept:
    """A recorded function's tensors."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.kept = list(tensors)

    def tensors(self) -> list[torch.Tensor]:
        return self.kept


def test_record_runs_once_and_replays():
    """Recording does the work once, as a call would; a replay does it again on what the inputs hold."""
    recorder = CudaRecorder(CUDA)
    x, total = torch.ones(5, device=CUDA), torch.zeros(5, device=CUDA)

    def add() -> Kept:
        total.add_(x)
        return Kept(2 * total)

    recorder.eager(add)
    recording = recorder.record(add)
    assert total.tolist() == [2.0] * 5
    x.fill_(3.0)
    recording.replay()
    assert total.tolist() == [5.0] * 5 and recording.outputs.kept[0].tolist() == [10.0] * 5
    assert recorder.pool_bytes() > 0


def test_random_numbers_go_on_as_eagerly():
    """Dropout of eager, recorded and replayed steps draws the same numbers as eager steps only."""
    drawn = []
    for record in (False, True):
        recorder = CudaRecorder(CUDA)
        torch.cuda.manual_seed(3)
        out = torch.zeros(1000, device=CUDA)

        def draw(out: torch.Tensor = out) -> Kept:
            out.copy_(nn.functional.dropout(torch.ones_like(out)) + torch.rand_like(out))
            return Kept()

        values, recording = [], None
        for step in range(6):
            if recording is not None:
                recording.replay()
            elif record and step == 2:
                recording = recorder.record(draw)
            else:
                recorder.eager(draw)
            values.append(out.clone())
        drawn.append(torch.stack(values))
    assert same_bits(*drawn)


@pytest.mark.parametrize("trap", ["python", "item"])
def test_failed_capture_leaves_everything_usable(trap):
    """After an error in a capture, Python's or the device's, eager work, random numbers and new captures go on."""
    recorder = CudaRecorder(CUDA)
    x = torch.ones(1000, device=CUDA)

    def broken() -> Kept:
        nn.functional.dropout(x)
        if trap == "python":
            raise ValueError("on purpose")
        return Kept(x * x.sum().item())

    torch.cuda.manual_seed(0)
    expected = [nn.functional.dropout(x) for _ in range(3)]
    torch.cuda.manual_seed(0)
    stream = torch.cuda.current_stream()
    with pytest.raises((ValueError, RuntimeError)):
        recorder.record(broken)
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    assert same_bits(nn.functional.dropout(x), expected[0])
    out = torch.zeros_like(x)

    def good() -> Kept:
        out.copy_(nn.functional.dropout(x))
        return Kept()

    recording = recorder.record(good)
    assert same_bits(out, expected[1])
    recording.replay()
    assert same_bits(out, expected[2])


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "sgd-momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adam-fused": partial(torch.optim.Adam, lr=1e-2, fused=True),
    "adamw-amsgrad": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "radam": partial(torch.optim.RAdam, lr=1e-2),
    "adamax": partial(torch.optim.Adamax, lr=1e-2),
    "asgd": partial(torch.optim.ASGD, lr=1e-2),
    "adadelta": partial(torch.optim.Adadelta, lr=0.5),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5),
    "rprop": partial(torch.optim.Rprop, lr=1e-3),
}


def _train(make, mode: str, steps: int = 12) -> tuple[nn.Module, torch.optim.Optimizer]:
    """``default``: the optimizer as it is; ``eager``: its device form; ``graph``: that, recorded. lr falls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).to(CUDA)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    recorder, recording = CudaRecorder(CUDA), None
    static = torch.empty(16, 7, device=CUDA)
    form = DeviceForm(optimizer, CUDA)

    def step() -> Kept:
        optimizer.zero_grad()
        model(static).square().mean().backward()
        if mode == "default":
            optimizer.step()
        else:
            with form.active():
                optimizer.step()
        return Kept()

    for i in range(steps):
        static.copy_(torch.randn(16, 7, generator=torch.Generator().manual_seed(i)))
        if mode == "default":
            step()
        else:
            form.refresh()
            if mode == "graph" and recording is not None:
                recording.replay()
            elif mode == "graph" and i == 3:
                recording = recorder.record(step)
            else:
                recorder.eager(step)
        schedule.step()
    form.release()
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_device_form_replays_to_the_bit(name):
    """A recorded device form under a falling lr gives the bits of the eager device form, and the default form's values.

    The device forms take bias corrections in float32: twelve steps of relative error 2^-23 each, of updates below 0.5,
    stay below 1e-5; Rprop and Adadelta move by signs and ratios, which keep that.
    """
    eager, optimizer = _train(OPTIMIZERS[name], "eager")
    graph, _ = _train(OPTIMIZERS[name], "graph")
    default, plain = _train(OPTIMIZERS[name], "default")
    for one, other, usual in zip(eager.parameters(), graph.parameters(), default.parameters(), strict=True):
        assert same_bits(one, other)
        torch.testing.assert_close(other, usual, rtol=1e-5, atol=1e-5)
    for group, usual in zip(
        optimizer.param_groups, plain.param_groups, strict=True
    ):  # flags and lr are the user's again
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in usual.items() if k != "params"}


def test_device_form_of_plain_sgd_has_the_default_bits():
    """``p - lr g`` rounds once in both forms, so a run with graphs equals one without, to the bit."""
    graph, _ = _train(OPTIMIZERS["sgd"], "graph", steps=40)
    default, _ = _train(OPTIMIZERS["sgd"], "default", steps=40)
    for one, other in zip(graph.parameters(), default.parameters(), strict=True):
        assert same_bits(one, other)


def test_device_form_goes_on_from_a_checkpoint():
    """Adam's step count of a default form, on the CPU after a load, moves to the device, and back when released."""
    model, optimizer = _train(OPTIMIZERS["adam"], "default", steps=3)
    twin = torch.optim.Adam(model.parameters(), lr=1e-2)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    form = DeviceForm(twin, CUDA)
    form.refresh()
    with form.active():
        twin.step()
    assert all(state["step"].device == CUDA and state["step"] == 4 for state in twin.state.values())
    form.release()
    assert all(state["step"].device.type == "cpu" for state in twin.state.values())


@pytest.mark.parametrize("fast", [None, devices.SoftBounds()], ids=["digital", "pulsed"])
def test_tile_graphs_equal_eager(fast):
    """The tiles' update alone as a graph; eager backward, a falling lr, a ragged batch: the bits of eager steps."""
    finals = []
    for graphs in (False, True):
        torch.manual_seed(1)
        config = LRTTConfig(rank=4, transfer_every=3, fast_device=fast, visible_device=fast)
        model = nn.Sequential(LRTTLinear(32, 48, config=config), nn.Tanh(), LRTTLinear(48, 10, config=config)).to(CUDA)
        optimizer = LRTT(model.parameters(), lr=0.1)
        events: list[str] = []
        if graphs:
            optimizer.runner = TileGraphs(
                CudaRecorder(CUDA), report=lambda event, _, events=events: events.append(event)
            )
        for i in range(14):
            x = torch.randn(16 if i % 5 else 7, 32, generator=torch.Generator().manual_seed(i)).to(CUDA)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
        if graphs:
            assert events.count("replay") >= 7
        finals.append({name: t.cpu() for name, t in model.state_dict().items()})
    for name, eager in finals[0].items():
        assert same_bits(eager, finals[1][name]), name


def test_static_batch_from_the_host_does_not_wait():
    """Pageable and pinned batches are copied without a host synchronisation."""
    batch = {"x": torch.randn(4, 3), "y": torch.arange(4).pin_memory(), "n": 3}
    _, leaves, spec = describe(batch)
    static = StaticBatch(leaves, spec, CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = static.fill(leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out["x"].cpu(), batch["x"]) and torch.equal(out["y"].cpu(), batch["y"]) and out["n"] == 3


def test_finder_tells_devices_apart():
    """On CUDA a value read from a CPU tensor does not wait."""
    finder, x = Finder(CUDA), torch.ones(4, device=CUDA)
    with finder.watch():
        float(torch.ones(()))
        x.add_(1.0)
    assert finder.findings == []


CROSSINGS = {
    "cpu": (lambda x: x.cpu(), "sync"),
    "item": (lambda x: x.sum().item(), "sync"),
    "tensor": (lambda x: torch.tensor(2.0, device=CUDA), "sync"),
    "to": (lambda x: torch.ones(3).to(CUDA), "sync"),
    "rand": (lambda x: torch.rand(3), "frozen"),
    "mask": (lambda x: x[x > 0], "sync"),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_finder_sees_the_host(name):
    """Copies across, values read and random numbers of the host are found, with their line."""
    do, kind = CROSSINGS[name]
    finder, x = Finder(CUDA), torch.ones(4, device=CUDA)
    with finder.watch():
        do(x)
    assert [f.kind for f in finder.findings] == [kind] and __file__ in finder.findings[0].where


def test_timer_reads_events_later():
    """Nothing waits when a phase ends; once the device has passed it, its mean is there."""
    recorder = CudaRecorder(CUDA)
    timer = PhaseTimer(recorder.mark)
    big = torch.randn(4096, 4096, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        timer.begin("step")
        big @ big
        timer.end()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert timer.means()["step"] > 0
