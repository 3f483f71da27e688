"""The compiled window of a Hopfield network on a GPU: the bits of the CPU, torch's products, and where it is taken."""

from __future__ import annotations

import logging

import pytest
import torch
from test_hopfield_window import CASES, SIZES, N, assert_near, network, relaxed

from lightning_lrtt import LRTTConfig, build_info, convert_to_lrtt
from lightning_lrtt.free_nudged import Estimator, TwoPhase, fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one"),
    pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only"),
]
WIDE = (784, 512, 512, 10)


@pytest.mark.parametrize("order", ["synchronous", "even_odd"])
@pytest.mark.parametrize(("activation", "output", "cost"), CASES)
def test_bits_of_the_cpu(activation: str, output: str, cost: str, order: str) -> None:
    """The products of both devices are added up in the same order; the input's drive is made on the CPU for both."""
    system = network(SIZES["deep"], activation=activation, output=output, cost=cost, order=order)
    with torch.no_grad():
        x = torch.rand(N, 12)
        context = system.prepare(x=x, differentiable=False)
        states = system.start(x=x, context=context)
        y, beta = torch.eye(5)[torch.arange(N) % 5], torch.linspace(-0.5, 0.5, N)
        results = []
        for device in ("cpu", "cuda"):
            there = type(context)(*(t.to(device) for t in (context.matrix, context.odd, context.even)))
            odd, even = states["odd"].to(device), states["even"].to(device)
            odd, even = fused.window(system, there, odd, even, None, None, None, 6)
            odd, even = fused.window(system, there, odd, even, y.to(device), beta.to(device), None, 3)
            results.append((odd.cpu(), even.cpu()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("hold", [False, True], ids=["nudged", "held"])
@pytest.mark.parametrize("order", ["synchronous", "even_odd"])
@pytest.mark.parametrize("sizes", [*SIZES.values(), (64, 128, 10), WIDE], ids=[*SIZES, "digits", "wide"])
def test_as_torch(sizes: tuple[int, ...], order: str, hold: bool) -> None:
    """Against torch's products on the same device."""
    system = network(sizes, order=order)
    assert_near(relaxed(system, True, "cuda", hold), relaxed(system, False, "cuda", hold))


def test_many_samples() -> None:
    """More samples than blocks are resident: groups take several tiles in turn. Each sample is as it is alone."""
    system = network(WIDE).cuda()
    with torch.no_grad():
        x = torch.rand(2000, 784, device="cuda")
        context = system.prepare(x=x, differentiable=False)
        states = system.start(x=x, context=context)
        odd, even = fused.window(system, context, states["odd"], states["even"], None, None, None, 4)
        part = type(context)(context.matrix, context.odd[1990:].contiguous(), context.even)
        some = fused.window(system, part, states["odd"][:10], states["even"][:10], None, None, None, 4)
    assert torch.equal(odd[1990:], some[0]) and torch.equal(even[1990:], some[1])


@pytest.mark.parametrize("tiles", [False, True], ids=["plain", "tiles"])
def test_the_engine_takes_it(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain weights and tiles, by the surrogate's gradient: as by torch's products; and the kernel did run."""
    system = network((12, 40, 70, 33, 5))
    if tiles:
        convert_to_lrtt(system, LRTTConfig(rank=4, seed=0))
    system = system.cuda()
    engine = TwoPhase(system, Estimator(beta=0.1))
    calls, window = [], fused.window
    monkeypatch.setattr(fused, "window", lambda *a: calls.append(1) or window(*a))
    x, y = torch.rand(16, 12, device="cuda"), torch.arange(16, device="cuda") % 5
    ends = []
    for system.fused in (True, False):
        outcome = engine.run(x, y)
        ends.append([phase.states[name] for phase in outcome.phases for name in ("odd", "even")])
    assert len(calls) == 2  # one free window, one doubled batch of nudged ones
    assert_near(*ends)


def test_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """Float64, gradients and couplings beyond shared memory go by torch's products, and a DEBUG line says why."""
    small, large = torch.zeros(4, 4, device="cuda"), torch.zeros(4096, 4096, device="cuda")
    with caplog.at_level(logging.DEBUG, "lightning_lrtt"):
        assert not fused.serves(small, small)
        with torch.no_grad():
            assert fused.serves(small, small)
            assert not fused.serves(small.double(), small.double())
            assert not fused.serves(large, large)
    assert all(word in text for word, text in zip(("gradients", "float64", "no kernel"), caplog.messages, strict=True))


def test_captured() -> None:
    """In a CUDA graph, replayed with other states, to the bits of the eager call."""
    system = network(WIDE).cuda()
    with torch.no_grad():
        x = torch.rand(64, 784, device="cuda")
        context = system.prepare(x=x, differentiable=False)
        odd, even = torch.zeros(64, 522, device="cuda"), torch.zeros(64, 512, device="cuda")

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            return fused.window(system, context, odd, even, None, None, None, 20)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        odd.uniform_(-1, 1)
        even.uniform_(-1, 1)
        for _ in range(3):
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
