"""Converters on a GPU: the bits of the CPU, no host synchronisation, fresh noise at every replay of a CUDA graph."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import fresh_state, randn
from test_io import CONFIGS
from torch import nn

from lightning_lrtt import LRTT, IOConfig, LRTTConfig, build_info, devices
from lightning_lrtt.nn import LRTTConv2d, LRTTLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one"),
    pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only"),
]
OPS = torch.ops.lrtt


@pytest.mark.parametrize("round", [0, 1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (70, 64), (9, 1000)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", CONFIGS)
def test_converters_bits(name, shape, round):
    """Operands, scales, outputs and flags of the same inputs and products."""
    x, acc, packed = randn(1, *shape), 30.0 * randn(2, *shape), CONFIGS[name].pack()
    x[-1] *= 1e-3
    x[0] = 0.0
    pending = (torch.arange(shape[0]) % 3 != 1).int() if round else None
    found = []
    for target in ("cpu", "cuda"):
        ticket, state = torch.tensor(6).to(target), fresh_state(3).to(target)
        flags = None if pending is None else pending.to(target)
        u, per = OPS.io_input(x.to(target), ticket, state, packed, 1, round, 5, flags, torch.float32)
        y = torch.full_like(acc, 7.0, device=target)
        clipped = OPS.io_output_(y, acc.to(target), per, ticket, state, packed, 1, round, 5, flags)
        found.append([t.cpu() for t in (u, per, y, clipped)])
    for what, cpu, gpu in zip(("operand", "per", "y", "clipped"), *found, strict=True):
        assert torch.equal(cpu, gpu), f"{what}: {(cpu != gpu).sum()} of {cpu.numel()} differ"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_operands_in_half_precision_are_the_same_levels(dtype):
    """63 steps are whole numbers: nothing is lost. Inputs in half precision are read as they are."""
    x, packed = randn(1, 40, 300).cuda(), IOConfig().pack()
    common = torch.tensor(0, device="cuda"), fresh_state().cuda(), packed, 2, 0, 0, None
    u, per = OPS.io_input(x.to(dtype), *common, dtype)
    exact, same = OPS.io_input(x.to(dtype).float(), *common, torch.float32)
    assert u.dtype == dtype
    assert torch.equal(u.float(), exact)
    assert torch.equal(per, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 33, 70), (200, 129, 64), (64, 512, 300)], ids=str)
def test_products_of_pending_samples(shape, dtype):
    """Against float64: at most k roundings of float32 of each sum, k 2^-24 of the sum of absolute products."""
    n, k, d = shape
    u, w = randn(1, n, k).to(dtype), randn(2, d, k)
    pending = (torch.arange(n) % 7 == 0).int()
    products = OPS.io_product(u.cuda(), w.cuda(), pending.cuda()).cpu().double()
    rounded = w.to(dtype).double()
    exact, size = u.double() @ rounded.t(), u.double().abs() @ rounded.abs().t()
    rows = pending.bool()
    assert ((products - exact).abs() <= k * 2.0**-24 * size + 1e-30)[rows].all()
    assert OPS.io_product(u.cuda(), w.cuda(), torch.zeros_like(pending).cuda()).count_nonzero() == 0


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["f32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "make",
    [lambda c: LRTTLinear(40, 30, config=c, tile=0), lambda c: LRTTConv2d(3, 8, 3, config=c, tile=0)],
    ids=["linear", "conv"],
)
def test_layers_agree_with_the_cpu(make, autocast):
    """Up to the result's rounding and two output steps (of 24/510 of the largest input).

    Sums of another order, or weights in half precision, fall on the other side of a tie: one step for C, one for A.
    """
    io = IOConfig(out_noise=0.0, bound_management="none")
    torch.manual_seed(0)
    layer = make(LRTTConfig(rank=4, io=io, reinit_gain=1.0))
    x = randn(1, 16, 40) if isinstance(layer, LRTTLinear) else randn(1, 4, 3, 9, 9)
    exact = layer(x)
    twin = layer.cuda()
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        y = twin(x.cuda())
    assert y.dtype == (autocast or torch.float32)
    step = 24 / 510 * float(x.abs().max())
    torch.testing.assert_close(y.float().cpu(), exact, rtol=2**-7 if autocast else 1e-5, atol=2.01 * step)


@pytest.mark.parametrize("fast", [None, devices.SoftBounds()], ids=["digital", "pulsed"])
@pytest.mark.parametrize("kind", ["iterative", "iterative_worst_case"])
def test_captured_steps_equal_eager_ones(kind, fast):
    """Steps in a CUDA graph take fresh noise at every replay, and give the bits of eager ones; nothing is read back."""
    io = IOConfig(inp_noise=0.01, w_noise=0.01, out_bound=1.0, bound_management=kind, out_sto_round=True)
    config = LRTTConfig(rank=4, transfer_every=3, reinit_gain=1.0, io=io, fast_device=fast, visible_device=fast)
    finals = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(
            LRTTLinear(32, 48, config=config, tile=0), nn.Tanh(), LRTTLinear(48, 10, config=config, tile=1)
        ).cuda()
        optimizer = LRTT(model.parameters(), lr=0.1)
        static = randn(0, 16, 32).cuda()
        seen = torch.zeros(16, 10, device="cuda")

        def step(model=model, optimizer=optimizer, static=static, seen=seen):
            optimizer.zero_grad()
            y = model(static)
            seen.copy_(y.detach())
            y.square().mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        outputs = []
        try:
            for _ in range(6):
                graph.replay() if captured else step()
                outputs.append(seen.clone())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))
        finals.append([*outputs, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_captured_evaluation_takes_fresh_noise():
    """The only thing that changes between replays of a read is its count."""
    layer = LRTTLinear(8, 8, config=LRTTConfig(rank=1, io=IOConfig())).cuda().eval()
    x = randn(0, 4, 8).cuda()
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(y.clone())
    assert not torch.equal(replays[0], replays[1])
    assert not torch.equal(replays[1], replays[2])
    assert layer.tile_reads.tolist() == [0, 4]
