"""Bursts on CUDA: the CPU's bits for every width of a train and every way to walk its words."""

from __future__ import annotations

import pytest
import torch
from burst_cases import DEVICES
from gpu_helpers import NEEDS_GPU, assert_same, on_both, state_and_counts

from lightning_lrtt import LRTTConfig, PulseConfig

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 12, 31, 32, 33, 100])
@pytest.mark.parametrize("device", DEVICES)
def test_trains_of_every_width(device: str, slots: int, dtype: torch.dtype) -> None:
    """Widths 1 to 128, few and many coincidences, both orientations, sides that are and are not multiples of four."""
    model = DEVICES[device]
    pulse = PulseConfig(desired_bl=slots, update_bl_management=False)
    config = LRTTConfig(rank=1, reinit_gain=1.0, fast_device=model, visible_device=model, pulse=pulse)
    for rows, columns, scale in ((90, 5, 1.0), (6, 132, 0.1), (64, 160, 0.02)):
        generator = torch.Generator().manual_seed(rows + slots)
        samples = 1100 if slots <= 32 else 300
        w = (0.05 * torch.randn(rows, columns, generator=generator)).clamp(-0.1, 0.1)
        x, d = (torch.randn(samples, n, generator=generator).to(dtype).float() for n in (columns, rows))
        planes = 2 if device == "pair" else 1 if device == "written" else 0
        cells = torch.rand(planes, rows, columns, generator=generator) * 0.1 if planes else torch.zeros(0)
        state, counts = state_and_counts()
        hyper = config.pack(columns)

        def run(w, counts, cells, x, d, eta, state, hyper=hyper, planes=planes):  # type: ignore[no-untyped-def]
            if w.is_cuda:  # the CPU's kernels take float32
                x, d = x.to(dtype), d.to(dtype)
            held = [cells] if planes else None
            torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [2], [0], held)

        results = on_both(run, w, counts, cells, x, d, torch.tensor(0.05 * scale), state)
        assert results[0][1][2] > 0, "no pulses: the test would compare nothing"
        assert_same([result[:3] for result in results], ("w", "counts", "cells"))


@pytest.mark.parametrize("device", ["soft", "shaky", "pair"])
@pytest.mark.parametrize("columns", [40, 9000], ids=["one round", "several"])
def test_blocks_of_long_and_short_trains(device: str, columns: int) -> None:
    """Words with and without a sign of their own take turns, so that some blocks must wait for the next round."""
    model = DEVICES[device]
    config = LRTTConfig(rank=1, reinit_gain=1.0, fast_device=model, visible_device=model)
    generator = torch.Generator().manual_seed(columns)
    scales = (1.0, 1.0, 1.0, 1.0, 1.0, 1e-4, 0.0, 0.05, 0.3, 0.02)  # of blocks of 512 samples; the last is cut
    samples = 512 * len(scales) - 100
    scale = torch.tensor(scales).repeat_interleave(512)[:samples, None]
    x, d = torch.rand(samples, columns, generator=generator), torch.randn(samples, 4, generator=generator) * scale
    planes = 2 if device == "pair" else 0
    w, cells = torch.zeros(4, columns), torch.rand(planes, 4, columns, generator=generator) * 0.1
    state, counts = state_and_counts()
    hyper = config.pack(columns)

    def run(w, counts, cells, x, d, eta, state):  # type: ignore[no-untyped-def]
        held = [cells] if planes else None
        torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [2], [0], held)

    results = on_both(run, w, counts, cells, x, d, torch.tensor(-0.05), state)
    assert results[0][1][2] > 0, "no pulses: the test would compare nothing"
    assert_same([result[:3] for result in results], ("w", "counts", "cells"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("columns", [40, 9000], ids=["one round", "several"])
@pytest.mark.parametrize(
    "pulse",
    [PulseConfig(x_res=0.01), PulseConfig(desired_bl=100), PulseConfig(desired_bl=1, d_res=0.01)],
    ids=["grid", "long", "single on a grid"],
)
def test_single_slots_of_trains_that_may_be_long(pulse: PulseConfig, columns: int, dtype: torch.dtype) -> None:
    """Words of 32 samples in kernels for long trains and grids: threads took the first half of their samples only."""
    model = DEVICES["soft"]
    config = LRTTConfig(rank=1, reinit_gain=1.0, fast_device=model, visible_device=model, pulse=pulse)
    generator = torch.Generator().manual_seed(columns)
    x, d = ((torch.rand(1100, n, generator=generator) - 0.5).to(dtype).float() for n in (columns, 6))
    state, counts = state_and_counts()
    hyper, eta = config.pack(columns), torch.tensor(0.004)  # eta max|x| max|d| / dw_min <= 0.5: one slot a sample

    def run(w, counts, x, d, eta, state):  # type: ignore[no-untyped-def]
        if w.is_cuda:
            x, d = x.to(dtype), d.to(dtype)
        torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [2], [0], None)

    results = on_both(run, torch.zeros(6, columns), counts, x, d, eta, state)
    assert results[0][1][2] > 0, "no pulses: the test would compare nothing"
    assert_same([result[:2] for result in results], ("w", "counts"))


def test_blocks_of_single_slots_beside_blocks_of_pairs_and_more() -> None:
    """Neighbouring blocks of 512 samples whose words hold 32, 16 and 4 samples, by the same kernel at the same time."""
    model = DEVICES["soft"]
    config = LRTTConfig(rank=1, reinit_gain=1.0, fast_device=model, visible_device=model)
    generator = torch.Generator().manual_seed(0)
    x, d = ((torch.rand(4096, n, generator=generator) - 0.5).bfloat16().float() for n in (600, 40))
    d *= torch.tensor([1.0, 4.0, 1.0, 16.0, 1.0, 4.0, 16.0, 1.0]).repeat_interleave(512)[:, None]
    state, counts = state_and_counts()
    hyper, eta = config.pack(600), torch.tensor(0.004)  # eta max|x| max|d| / dw_min <= 0.5 where d is not scaled

    def run(w, counts, x, d, eta, state):  # type: ignore[no-untyped-def]
        if w.is_cuda:
            x, d = x.bfloat16(), d.bfloat16()
        torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [2], [0], None)

    results = on_both(run, torch.zeros(40, 600), counts, x, d, eta, state)
    assert results[0][1][2] > 100_000
    assert_same([result[:2] for result in results], ("w", "counts"))
