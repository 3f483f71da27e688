"""Pulse trains against the rules of Gokmen & Vlasov (2016): probabilities, management, saturation, bad operands."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import WIDE, fresh_counts, fresh_state, pack, pulse, randn, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lrtt import PulseConfig
from lightning_lrtt.ops import COUNTS

# On WIDE a pulse is a step of exactly 1 and nothing clips, so -w counts pulses (positive lr) and kappa = lr max|x| max|d|.
X, D = [1.0, 0.5, 0.1, -0.7], [1.0, -0.3, 0.05]


def probabilities(lr, um, ublm, bl=31):
    """Steps 3 to 5 of the rules in float64: (BL, p_x, p_d) of X and D, unclipped."""
    x, d = torch.tensor(X, dtype=torch.float64).abs(), torch.tensor(D, dtype=torch.float64).abs()
    kappa = lr * float(x.max() * d.max())
    n = min(math.ceil(kappa), bl) if ublm else bl
    s_x = s_d = math.sqrt(lr / n)
    if um:
        d_max = float(d.max()) * (bl / kappa if kappa > bl else 1.0)
        s_d, s_x = s_d * math.sqrt(float(x.max()) / d_max), s_x * math.sqrt(d_max / float(x.max()))
    return n, x * s_x, d * s_d


@pytest.mark.parametrize("um", [True, False], ids=["um", "no_um"])
@pytest.mark.parametrize("ublm", [True, False], ids=["ublm", "no_ublm"])
@pytest.mark.parametrize("kappa", [3.2, 20.0, 80.0])
def test_pulse_count_is_binomial(kappa, um, ublm):
    """E[n] = BL q and Var[n] = BL q (1 - q) with q = min(1, p_x) min(1, p_d), from 4000 trains.

    Tolerances: 5 standard errors; of the variance, sqrt((2 + excess kurtosis) / trials) relative.
    """
    trials = 4000
    hyper = pack(visible_device=WIDE, pulse=PulseConfig(update_management=um, update_bl_management=ublm))
    w = [torch.zeros(len(D), len(X)) for _ in range(trials)]
    torch.ops.lrtt.pulsed_update_(
        w,
        [torch.tensor([X])] * trials,
        [torch.tensor([D])] * trials,
        [torch.tensor(kappa)] * trials,
        [fresh_state()] * trials,
        [fresh_counts()] * trials,
        [hyper] * trials,
        [2] * trials,
        [512 * i for i in range(trials)],
    )
    pulses = torch.stack(w).double()
    bl, p_x, p_d = probabilities(kappa, um, ublm)
    q = p_d.clamp(max=1.0)[:, None] * p_x.clamp(max=1.0)
    sign = -torch.tensor(D).sign()[:, None] * torch.tensor(X).sign()
    mean, variance = bl * q, bl * q * (1 - q)
    assert bool(((pulses.mean(0) - sign * mean).abs() <= 5 * (variance / trials).sqrt() + 1e-6 * mean).all())
    kurtosis = ((1 - 6 * q * (1 - q)) / variance.clamp(min=1e-12)).clamp(min=0.0)
    assert bool(((pulses.var(0) - variance).abs() <= 5 * variance * ((2 + kurtosis) / trials).sqrt() + 1e-6).all())
    assert float(pulses.abs().max()) <= bl


def test_bits_are_shared_by_rows_and_columns():
    """x's bits serve all rows: two rows whose d always fires get the same pulses."""
    w = torch.zeros(2, 50)
    counts = pulse(w, randn(0, 1, 50).abs(), torch.ones(1, 2), 31.0, pack(visible_device=WIDE))
    assert torch.equal(w[0], w[1])
    assert int(counts[COUNTS["pulses_c"]]) == int(-w.sum())


@pytest.mark.parametrize(("kappa", "expected"), [(80, {1: 0.388, 2: 0.775, 8: 1.0}), (8, {1: 1.0, 2: 1.0, 8: 1.0})])
@pytest.mark.parametrize("x", [1.0, 0.4])
def test_published_saturation(kappa, expected, x):
    """lr .1, g_w .001, BL 31: mean/ideal at d_max, d_max/2, d_max/8; x never saturates. 20000 trains: a mean pulse
    count of BL q has a relative error below sqrt(1 / (20000 BL q)) = 0.5% in the smallest case; 2% is four of them.
    """
    n, lr, g = 20_000, 0.1, 0.001
    d = torch.tensor([kappa * g / lr / share for share in expected])
    w = torch.zeros(len(d), 2)
    # WIDE has g_w = 1: lr / g_w is what counts, and sums of whole steps do not round.
    pulse(w, torch.tensor([[1.0, x]]).repeat(n, 1), d.repeat(n, 1), lr / g, pack(visible_device=WIDE))
    ratio = -w[:, 1].double() * g / (n * lr * x * d.double())
    assert ratio.tolist() == pytest.approx(list(expected.values()), rel=0.02)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(kappa=st.floats(0.01, 60.0), bl=st.integers(1, 31), ublm=st.booleans(), seed=st.integers(0, 1000))
def test_bl_management_limits_the_train(kappa, bl, ublm, seed):
    """No cell sees more than min(ceil(kappa), desired_bl) pulses of one sample, or desired_bl without management."""
    hyper = pack(visible_device=WIDE, pulse=PulseConfig(desired_bl=bl, update_bl_management=ublm))
    w = torch.zeros(2, 3)
    pulse(w, torch.ones(1, 3), torch.ones(1, 2), kappa, hyper, seed=seed)
    kappa32 = float(torch.tensor(kappa))  # lr reaches the kernel as float32
    assert -float(w.min()) <= (min(math.ceil(kappa32), bl) if ublm else bl)


@pytest.mark.parametrize("kappa", [1, 7, 31])
def test_integral_kappa_gives_exactly_kappa_pulses(kappa):
    """BL = kappa and p_x = p_d = 1: nothing is left to chance."""
    w = torch.zeros(2, 3)
    pulse(w, torch.ones(1, 3), torch.ones(1, 2), float(kappa), pack(visible_device=WIDE))
    assert torch.equal(w, torch.full((2, 3), -float(kappa)))


@pytest.mark.parametrize("lr", [1.0, -1.0])
def test_sign(lr):
    """A pulse goes downwards where lr x d > 0."""
    w = torch.zeros(2, 2)
    pulse(w, torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, -1.0]]), lr, pack(visible_device=WIDE))
    assert torch.equal(w, lr * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_rank_one_mean_is_the_exact_update():
    """Below saturation E[dW] = -lr d x^T, summed over samples. Each cell's error is binomial: 5 standard errors."""
    n, lr = 400, 0.5
    x, d = randn(0, n, 12), randn(1, n, 9)
    total = torch.zeros(9, 12, dtype=torch.float64)
    runs = 30
    for seed in range(runs):
        w = torch.zeros(9, 12)
        pulse(w, x, d, lr, pack(visible_device=WIDE), seed=seed)
        total += w.double() / runs
    expected = -lr * d.double().t() @ x.double()
    variance = lr * (d.double().abs().t() @ x.double().abs())  # BL q (1 - q) <= BL q = lr |x| |d|
    assert bool(((total - expected).abs() <= 5 * (variance / runs).sqrt()).all())


# ------------------------------------------------------------------ nothing and nonsense


@pytest.mark.parametrize("which", ["x", "d", "lr", "samples"])
def test_zero_gives_no_pulse(which):
    x, d, lr = torch.ones(4, 3), torch.ones(4, 2), 5.0
    if which == "x":
        x = torch.zeros_like(x)
    elif which == "d":
        d = torch.zeros_like(d)
    elif which == "lr":
        lr = 0.0
    else:
        x, d = x[:0], d[:0]
    w = torch.full((2, 3), 0.25)
    counts = pulse(w, x, d, lr, pack(visible_device=WIDE))
    assert torch.equal(w, torch.full((2, 3), 0.25))
    assert torch.equal(counts, fresh_counts())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "d"])
def test_nonfinite_sample_gives_no_pulse_and_is_counted(where, bad):
    """Only the sample that holds the bad number is skipped; the others get the pulses they would have had."""
    x, d = randn(0, 6, 8), randn(1, 6, 5)
    quiet_x, quiet_d = x.clone(), d.clone()
    (x if where == "x" else d)[2, 3] = bad
    (quiet_x if where == "x" else quiet_d)[2] = 0.0
    w, expected = torch.zeros(5, 8), torch.zeros(5, 8)
    counts = pulse(w, x, d, 4.0, pack(visible_device=WIDE), step=9)
    pulse(expected, quiet_x, quiet_d, 4.0, pack(visible_device=WIDE), step=9)
    assert same_bits(w, expected)
    assert w.count_nonzero() > 0
    assert (counts[COUNTS["nonfinite"]], counts[COUNTS["first_bad_step"]]) == (1, 9)


@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
def test_nonfinite_rate_gives_no_pulse(lr):
    """A gradient clipped by an infinite norm makes eta a NaN: every sample is skipped and counted."""
    w = torch.zeros(2, 3)
    counts = pulse(w, torch.ones(4, 3), torch.ones(4, 2), lr, pack(visible_device=WIDE), step=3)
    assert w.count_nonzero() == 0
    assert (counts[COUNTS["nonfinite"]], counts[COUNTS["first_bad_step"]]) == (4, 3)


def test_first_bad_step_is_kept():
    hyper, counts = pack(visible_device=WIDE), fresh_counts()
    for step in (5, 6):
        torch.ops.lrtt.pulsed_update_(
            [torch.zeros(1, 1)],
            [torch.full((1, 1), float("nan"))],
            [torch.ones(1, 1)],
            [torch.tensor(1.0)],
            [fresh_state(step=step)],
            [counts],
            [hyper],
            [2],
            [0],
        )
    assert (counts[COUNTS["nonfinite"]], counts[COUNTS["first_bad_step"]]) == (2, 5)
