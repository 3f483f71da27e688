"""Bursts (csrc/bursts.h): the pulses of one sample as one step, against the same pulses one after the other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from burst_cases import DEVICES
from helpers import fresh_counts, fresh_state, pack, pulse, quiet, randn, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from lightning_lrtt import LRTTConfig, PulseConfig, devices, presets
from lightning_lrtt.ops import COUNTS, reference

KINDS: dict[str, Any] = {
    "constant": quiet(devices.ConstantStep, dw_min=0.004),
    "linear": quiet(devices.LinearStep, dw_min=0.004, gamma_up=0.6, gamma_down=0.4),
    "soft": quiet(devices.SoftBounds, dw_min=0.004, w_max=0.8, w_min=-0.6),
    "reference": quiet(
        devices.SoftBoundsReference,
        dw_min=0.004,
        w_max=0.8,
        w_min=-0.6,
        reference_mean=0.1,
        subtract_symmetry_point=False,
    ),
}


def train(w: Tensor, n: int, up: bool, device: devices.Device, samples: int = 1, block: int = 0) -> None:
    """n slots for every one of ``samples``, in each of which both sides fire with certainty (but for 2^-32)."""
    rule = PulseConfig(desired_bl=n, update_management=False, update_bl_management=False)
    d = torch.full((samples, len(w)), -1.0 if up else 1.0)
    pulse(w, torch.ones(samples, w.shape[1]), d, 1e3, pack(visible_device=device, pulse=rule), first=512 * block)


def one_by_one(kind: str, w: Tensor, n: int, up: bool) -> Tensor:
    """n pulses in float64, each by the model's formula (docs/devices.md)."""
    model = KINDS[kind]
    w, s = w.double(), model.dw_min if up else -model.dw_min
    shift = model.reference_mean if kind == "reference" else 0.0
    slope = {"constant": 0.0, "linear": 0.6 if up else 0.4}.get(kind, 1.0) / (model.w_max if up else model.w_min)
    for _ in range(n):
        w = (w + s * (1.0 - slope * (w + shift))).clamp(model.w_min - shift, model.w_max - shift)
    return w


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(2, 31), up=st.booleans(), where=st.floats(-0.55, 0.55))
@settings(max_examples=25, deadline=None)
def test_a_burst_is_its_pulses(kind: str, n: int, up: bool, where: float) -> None:
    """Without noise a burst is the closed form of its pulses.

    Tolerance: float32 rounding of a dozen operations on numbers below 1 (each 2^-25, say 12 of them), and 1.3e-7 of the
    change for the terms that the two series leave out.
    """
    w = torch.full((3, 5), where)
    expected = one_by_one(kind, w, n, up)
    train(w, n, up, KINDS[kind])
    assert (w.double() - expected).abs().max() <= 12 * 2**-25 + 1.3e-7 * float((expected - where).abs().max())


@pytest.mark.parametrize("mult_noise", [True, False])
@pytest.mark.parametrize("up", [True, False])
def test_noise_of_a_burst_has_the_moments_of_its_pulses(up: bool, mult_noise: bool) -> None:
    """Mean and variance of 200,000 cells after 24 pulses with noise, against pulses with normal noise in float64.

    Tolerances: 4.5 standard errors of the difference, and for what the formula leaves out of the spread h / 2 of it, with
    h = 0.004 x 0.6 / 0.8; a variance's standard error is that of a normal, sqrt(2 / cells), relative.
    """
    model = quiet(devices.LinearStep, dw_min=0.004, dw_min_std=0.5, gamma_up=0.6, gamma_down=0.6, mult_noise=mult_noise)
    model = dataclasses.replace(model, w_max=0.8, w_min=-0.8)
    n, cells = 24, 200_000
    w = torch.full((400, 500), 0.1)
    train(w, n, up, model)
    oracle = torch.full((cells,), 0.1, dtype=torch.float64)
    generator, s, slope = torch.Generator().manual_seed(5), 0.004 if up else -0.004, 0.75 if up else -0.75
    for _ in range(n):
        distance, xi = 1.0 - slope * oracle, torch.randn(cells, generator=generator, dtype=torch.float64)
        oracle += s * (distance + 0.5 * xi * (distance if mult_noise else 1.0))
    ours = w.double().flatten()
    error = math.sqrt(float(ours.var() + oracle.var()) / cells)
    assert abs(float(ours.mean() - oracle.mean())) < 4.5 * error
    ratio = float(ours.var() / oracle.var())
    assert abs(ratio - 1.0) < 4.5 * math.sqrt(2 * 2 / cells) + 0.004 * 0.75


def test_noise_of_many_bursts_is_independent() -> None:
    """The variance over 20 samples of 6 pulses up is that of 120 pulses: noise numbers are not used twice."""
    model = quiet(devices.ConstantStep, dw_min=0.001, dw_min_std=0.5, w_max=10.0, w_min=-10.0)
    w = torch.zeros(200, 300)
    train(w, 6, True, model, samples=20)
    variance = float(w.double().var()) / (120 * (0.001 * 0.5) ** 2)
    assert abs(variance - 1.0) < 4.5 * math.sqrt(2 / w.numel())


@pytest.mark.parametrize("device", ["coarse", "noisy", "exp"])
def test_large_bursts_and_other_devices_take_pulses(device: str) -> None:
    """One sample of 7 slots is then 7 samples of one slot, to the bit: every pulse takes the next noise number."""
    model = {
        "coarse": devices.SoftBounds(dw_min=0.2),  # h = 0.2 / 0.6 is no small step
        "noisy": devices.SoftBounds(dw_min=0.002, dw_min_std=1.5),
        "exp": devices.ExpStep(dw_min=0.005),
    }[device]
    at_once, singly = torch.zeros(5, 7), torch.zeros(5, 7)
    train(at_once, 7, True, model)
    train(singly, 1, True, model, samples=7)
    assert same_bits(at_once, singly)


def test_small_steps_and_a_large_burst() -> None:
    """31 pulses of h = 0.01 are more than may act at once, 20 are not; one as 31, or 20 and 11, give nearly the same."""
    model = quiet(devices.SoftBounds, dw_min=0.01, w_max=1.0, w_min=-1.0)
    whole, parts = torch.zeros(2, 2), torch.zeros(2, 2)
    train(whole, 31, True, model)
    for n in (20, 11):
        train(parts, n, True, model)
    expected = 1.0 - 0.99**31
    assert (whole - expected).abs().max() < 31 * 2 * 2**-25  # two roundings a pulse
    assert (parts - expected).abs().max() < 24 * 2**-25 + 1.3e-7
    assert not same_bits(whole, parts)


@pytest.mark.parametrize("slots", [1, 4, 6, 31, 40])
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_bursts_equal_the_reference(device: str, slots: int) -> None:
    """The same bits from lanes and from plain PyTorch, in blocks of several samples."""
    model = DEVICES[device]
    pulse = PulseConfig(desired_bl=slots, update_bl_management=False)
    config = LRTTConfig(rank=1, reinit_gain=1.0, fast_device=model, visible_device=model, pulse=pulse)
    x, d, w = randn(1, 12, 19), randn(2, 12, 4), 0.05 * randn(3, 4, 19).clamp(-2, 2)
    planes = 2 if device == "pair" else 1 if device == "written" else 0
    cells = 0.05 * randn(4, planes, 4, 19).abs() if planes else None
    found = []
    for update in (torch.ops.lrtt.pulsed_update_, reference.pulsed_update_):
        own, held, counts = w.clone(), None if cells is None else [cells.clone()], fresh_counts()
        eta = torch.tensor(0.05)
        update([own], [x], [d], [eta], [fresh_state(7, 3)], [counts], [config.pack(19)], [2], [0], held)
        found.append((own, counts, *(held or ())))
    assert found[0][1][COUNTS["pulses_c"]] > 0
    for ours, theirs in zip(*found, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("name", ["gokmen_vlasov", "ecram", "capacitor", "reram_array_om"])
def test_bursts_on_a_preset_are_distributed_like_pulses(name: str) -> None:
    """47 pulses in five trains of both directions, as bursts and as single slots with noise of their own: 120,000 cells."""
    model = getattr(presets, name)().visible_device
    model = dataclasses.replace(model, write_noise_std=0.0) if model.write_noise_std else model
    at_once, singly = torch.zeros(300, 400), torch.zeros(300, 400)
    for block, (n, up) in enumerate(((7, True), (5, False), (12, True), (3, False), (20, False))):
        train(at_once, n, up, model, block=block)
        train(singly, 1, up, model, samples=n, block=block)
    found = stats.ks_2samp(at_once.flatten().numpy(), singly.flatten().numpy())
    assert found.pvalue > 1e-4
