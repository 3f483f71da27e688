"""Decay and diffusion: once per optimizer step, on every array whose device has them."""

from __future__ import annotations

import pytest
import torch
from helpers import fresh_state, pack, quiet, randn, same_bits
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, devices, presets
from lightning_lrtt.nn import LRTTLinear
from lightning_lrtt.ops import STEP, reference

OPS = torch.ops.lrtt
KINDS = {
    "decay": {"lifetime": 10.0, "lifetime_dtod": 0.3, "reset": 0.1, "reset_dtod": 0.05},
    "short-lived": {"lifetime": 1.2, "lifetime_dtod": 0.5},
    "diffusion": {"diffusion": 0.02, "diffusion_dtod": 0.5},
    "both": {"lifetime": 50.0, "diffusion": 0.02},
}


@pytest.mark.parametrize("kind", KINDS)
def test_relax_equals_reference(kind):
    """Three steps on two arrays, bit for bit."""
    hyper = pack(9, visible_device=devices.SoftBounds(**KINDS[kind]), fast_device=devices.LinearStep(**KINDS[kind]))
    results = []
    for op in (OPS.relax_, reference.relax_):
        state, a, c = fresh_state(), randn(1, 7, 3), randn(2, 30, 9)
        for _ in range(3):
            op([a, c], [state, state], [hyper, hyper], [0, 2])
            state[STEP] += 1
        results.append((a, c))
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))
    assert not torch.equal(results[0][1], randn(2, 30, 9))


def test_decay_in_closed_form():
    """Without spread, n steps leave (1 - 1/lifetime)^n of the distance to ``reset``."""
    device = quiet(devices.ConstantStep, lifetime=20.0, reset=0.2, w_max=1.0, w_min=-1.0)
    hyper, state, w = pack(8, visible_device=device), fresh_state(), torch.full((4, 8), 0.7)
    for _ in range(30):
        OPS.relax_([w], [state], [hyper], [2])
    expected = 0.2 + 0.5 * (1 - 1 / 20.0) ** 30
    # 30 steps, each rounded to half an ulp of at most 0.7: 30 * 2^-25
    assert torch.allclose(w, torch.full_like(w, expected), rtol=0.0, atol=30 * 2.0**-25)


def test_diffusion_is_a_random_walk():
    """After n steps the spread is rate sqrt(n); steps and cells draw anew."""
    device = quiet(devices.ConstantStep, diffusion=0.01, w_max=10.0, w_min=-10.0)
    hyper, state, w = pack(100, visible_device=device), fresh_state(), torch.zeros(100, 100)
    for _ in range(25):
        OPS.relax_([w], [state], [hyper], [2])
        state[STEP] += 1
    # standard error of a std from 10^4 cells: 1/sqrt(2e4) = 0.7%; of the mean: 1% of the std
    assert w.std().item() == pytest.approx(0.05, rel=4 * 0.0071)
    assert abs(w.mean().item()) < 4 * 0.0005


def test_relax_stays_within_bounds():
    """A reset value beyond a cell's bound is reached only up to the bound."""
    hyper = pack(8, visible_device=quiet(devices.SoftBounds, lifetime=2.0, reset=5.0))
    w = torch.zeros(4, 8)
    for _ in range(20):
        OPS.relax_([w], [fresh_state()], [hyper], [2])
    assert torch.equal(w, torch.full_like(w, 0.6))


def test_optimizer_relaxes_each_array_once_per_step():
    """C decays in every step although it takes updates at transfers only; a tile without decay is left alone."""
    leaky = quiet(devices.ConstantStep, lifetime=10.0, w_max=1.0, w_min=-1.0)
    layer = LRTTLinear(6, 4, bias=False, config=LRTTConfig(rank=2, transfer_every=100, visible_device=leaky), tile=0)
    other = LRTTLinear(6, 4, bias=False, config=LRTTConfig(rank=2, transfer_every=100), tile=1)
    for seed, tile in enumerate((layer, other)):
        tile.write_visible(0.2 * randn(seed, 4, 6))
    before, untouched = layer.matrix.clone(), other.matrix.clone()
    model = nn.ModuleList([layer, other])
    optimizer = LRTT(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        sum(m(torch.ones(3, 6)).square().sum() for m in model).backward()
        optimizer.step()
    # Each step rounds twice, 1 - 1/lifetime and the product with it, and so does the expected value: 12 * 2^-24.
    assert torch.allclose(layer.matrix, before * 0.9**5, rtol=12 * 2.0**-24, atol=0.0)
    assert torch.equal(other.matrix, untouched)


@pytest.mark.parametrize("name", presets.DEVICES)
def test_presets_compose(name):
    """A preset is a config with its device everywhere; options override."""
    config = getattr(presets, name)(rank=3, visible_device=None)
    assert config.rank == 3 and config.fast_device == presets.device(name) and config.visible_device is None
    layer = LRTTLinear(12, 8, config=getattr(presets, name)(rank=4))
    assert torch.isfinite(layer(torch.ones(2, 12))).all()


def test_unknown_preset():
    """The error lists what there is."""
    with pytest.raises(ValueError, match=r"name must be one of 'capacitor', .*, got 'flash'"):
        presets.device("flash")


def test_pulses_need_a_device():
    """An array without a device is refused instead of silently left as it is."""
    config = LRTTConfig(rank=2, visible_device=devices.SoftBounds())
    with pytest.raises(ValueError, match="array 0 must have a device to take pulses; give the config a fast_device"):
        OPS.pulsed_update_(
            [torch.zeros(3, 2)],
            [torch.ones(1, 2)],
            [torch.ones(1, 3)],
            [torch.tensor(0.1)],
            [fresh_state()],
            [torch.zeros(8, dtype=torch.int64)],
            [config.pack(4)],
            [0],
            [0],
        )
