"""Pulse types, long trains, resolutions and stochastic rounding: bits, closed forms, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import DEVICES, WIDE, fresh_counts, fresh_state, pack, pulse, randn, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from pulse_cases import PULSES

from lightning_lrtt import LRTT, LRTTConfig, PulseConfig, devices
from lightning_lrtt.nn import LRTTLinear
from lightning_lrtt.ops import COUNTS, reference

OPS = torch.ops.lrtt
DETERMINISTIC = ("mean_count", "deterministic_implicit")
PULSED = ("stochastic_compressed", "stochastic", *DETERMINISTIC)
SHAPES = {"wide": (3, 40), "tall": (35, 4), "cell": (1, 1)}


def update_both(shape, samples, config, lr, device=DEVICES["soft"], first=0, keep=20):
    """One pulsed update by the kernel and by the plain reference; returns (w, counts) of each.

    All but ``keep`` samples are zero and have no train: the reference walks slot by slot.
    """
    rows, columns = SHAPES[shape]
    x, d = randn(1, samples, columns), randn(2, samples, rows)
    x[torch.randperm(samples, generator=torch.Generator().manual_seed(3))[keep:]] = 0.0
    results = []
    for op in (OPS.pulsed_update_, reference.pulsed_update_):
        w, counts = 0.1 * randn(0, rows, columns), fresh_counts()
        op(
            [w],
            [x],
            [d],
            [torch.tensor(lr)],
            [fresh_state(0, 3)],
            [counts],
            [pack(visible_device=device, pulse=config)],
            [2],
            [first],
        )
        results.append((w, counts))
    return results


# ------------------------------------------------------------------ bits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", PULSES)
def test_update_equals_reference(case, shape):
    """Up to 300 samples: several blocks where trains are long."""
    config = PULSES[case]
    long = config.longest > 496
    (w, counts), (plain, plain_counts) = update_both(shape, 30 if long else 300, config, 0.02, keep=3 if long else 20)
    assert same_bits(w, plain)
    assert torch.equal(counts, plain_counts)
    assert counts[COUNTS["pulses_c"]] > 0


@pytest.mark.parametrize("case", ["stochastic_long", "mean_count_long", "unfixed"])
def test_long_trains_late_in_a_step_equal_reference(case):
    """The noise counter of late blocks of few samples needs more than 24 bits of segment number."""
    (w, counts), (plain, plain_counts) = update_both("wide", 8, PULSES[case], 0.5, first=512 * 130_000, keep=2)
    assert same_bits(w, plain)
    assert torch.equal(counts, plain_counts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_counted_trains_equal_reference_on_every_device(device, kind):
    (w, counts), (plain, plain_counts) = update_both("wide", 12, PulseConfig(pulse_type=kind), -0.1, DEVICES[device])
    assert same_bits(w, plain)
    assert torch.equal(counts, plain_counts)


HELD = {
    "noisy": devices.SoftBounds(dw_min=0.01, write_noise_std=3.0),
    "pair": devices.OneSided(device=devices.SoftBounds(dw_min=0.01)),
}


@pytest.mark.parametrize("device", HELD)
@pytest.mark.parametrize("case", ["stochastic_100", "grid_random", "mean_count", "mean_count_long", "implicit_random"])
def test_cells_that_hold_more_equal_reference(case, device):
    """Write noise (its counter is the number of the block) and pairs, both orientations, over several blocks."""
    model, config = HELD[device], PULSES[case]
    for rows, columns in ((3, 40), (35, 4)):
        x, d = randn(1, 150, columns), randn(2, 150, rows)
        x[torch.randperm(150, generator=torch.Generator().manual_seed(3))[12:]] = 0.0
        results = []
        for ops in (OPS, reference):
            w, counts, cells = (
                torch.zeros(rows, columns),
                fresh_counts(),
                0.2 * randn(4, model.planes, rows, columns).abs(),
            )
            hyper = pack(visible_device=model, pulse=config)
            eta, state = torch.tensor(0.02 if device == "noisy" else -0.02), fresh_state(0, 3)
            ops.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [2], [0], [cells])
            results.append((w, counts, cells))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
        assert results[0][1][COUNTS["pulses_c"]] > 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(PULSED),
    bl=st.integers(1, 120),
    um=st.booleans(),
    ublm=st.booleans(),
    res=st.sampled_from([0.0, 1.0, 0.3, 1 / 31]),
    sto=st.booleans(),
    scale=st.sampled_from([0.25, 1.0, 3.0]),
    lr=st.floats(1e-4, 20.0),
    seed=st.integers(0, 99),
)
def test_any_train_equals_reference(kind, bl, um, ublm, res, sto, scale, lr, seed):
    config = PulseConfig(
        pulse_type=kind,
        desired_bl=bl,
        update_management=um,
        update_bl_management=ublm,
        x_res=res,
        sto_round=sto and res > 0,
        um_grad_scale=scale if um or ublm else 1.0,
    )
    x, d = randn(seed, 6, 5), 0.05 * randn(seed + 1, 6, 7)
    results = []
    for op in (OPS.pulsed_update_, reference.pulsed_update_):
        w, counts = torch.zeros(7, 5), fresh_counts()
        op(
            [w],
            [x],
            [d],
            [torch.tensor(lr, dtype=torch.float32)],
            [fresh_state(seed)],
            [counts],
            [pack(visible_device=DEVICES["constant"], pulse=config)],
            [2],
            [0],
        )
        results.append((w, counts))
    assert same_bits(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("mode", ["pulsed", "pulsed_residual"])
@pytest.mark.parametrize("case", [name for name, p in PULSES.items() if p.fixed_bl and p.um_grad_scale == 1.0])
def test_transfer_equals_reference(case, mode):
    if mode == "pulsed_residual" and not PULSES[case].update_management:
        pytest.skip("pulsed_residual needs update_management")
    config = {
        "rank": 3,
        "visible_device": DEVICES["soft"],
        "transfer_pulse": PULSES[case],
        "transfer_mode": mode,
        "transfer_every": 1,
        "transfer_max_words": 1 if PULSES[case].desired_bl > 100 else 4,
    }
    results = []
    for op in (OPS.transfer_, reference.transfer_):
        tile = [0.7 * randn(0, 18, 3), randn(1, 3, 21), 0.1 * randn(2, 18, 21), fresh_state(2, 11), fresh_counts()]
        op(*([t] for t in tile), [pack(21, **config)], [1], False)
        results.append(tile)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert results[0][4][COUNTS["pulses_c"]] > 0


@pytest.mark.parametrize("case", PULSES)
def test_threads_do_not_change_bits(case):
    rows, columns = 48, 96
    hyper, results = pack(visible_device=DEVICES["soft"], pulse=PULSES[case]), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            w = torch.zeros(rows, columns)
            pulse(w, randn(1, 40, columns), randn(2, 40, rows), 0.01, hyper)
            results.append(w)
    finally:
        torch.set_num_threads(before)
    assert results[0].count_nonzero() > 0
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_stochastic_is_stochastic_compressed():
    """One distribution, one implementation: the same bits."""
    results = []
    for kind in ("stochastic", "stochastic_compressed"):
        w = torch.zeros(9, 12)
        pulse(
            w,
            randn(1, 60, 12),
            randn(2, 60, 9),
            0.1,
            pack(visible_device=DEVICES["soft"], pulse=PulseConfig(pulse_type=kind)),
        )
        results.append(w)
    assert same_bits(*results)
    assert results[0].count_nonzero() > 0


# ------------------------------------------------------------------ closed forms, independent of the reference

# On WIDE a pulse is a step of exactly 1 and nothing clips, so -w counts pulses (positive lr) and kappa = lr max|x| max|d|.
X, D = [1.0, 0.45, 0.2, -0.7], [1.0, -0.45, 0.2]
SIGN = -torch.outer(torch.tensor(D).sign(), torch.tensor(X).sign()).double()


def scaled(lr, config):
    """docs/pulses.md in float64: (BL, p_x, p_d) of X and D, unclipped."""
    x, d = (torch.tensor(v, dtype=torch.float64).abs() for v in (X, D))
    bl, s = config.desired_bl, None
    x_max, d_max = float(x.max()), float(d.max()) * config.um_grad_scale
    kappa = lr * x_max * d_max
    if config.update_bl_management:
        bl = min(math.ceil(kappa), bl)
    elif not config.fixed_bl and bl < lr:
        bl, s = (math.ceil(lr), 1.0) if lr <= config.longest else (config.longest, None)
    s = s or math.sqrt(lr / bl)
    ratio = 1.0
    if config.update_management:
        ratio = math.sqrt(x_max / (d_max * min(config.desired_bl / kappa, 1.0)))
    return bl, x * s / ratio, d * s * ratio


def count(lr, config, trials):
    """Pulses of each cell, ``[trials, rows, columns]``, of as many trains with their own random numbers."""
    w = [torch.zeros(len(D), len(X)) for _ in range(trials)]
    OPS.pulsed_update_(
        w,
        [torch.tensor([X])] * trials,
        [torch.tensor([D])] * trials,
        [torch.tensor(lr)] * trials,
        [fresh_state()] * trials,
        [fresh_counts()] * trials,
        [pack(visible_device=WIDE, pulse=config)] * trials,
        [2] * trials,
        [512 * i for i in range(trials)],
    )
    return torch.stack(w).double()


def assert_binomial(pulses, bl, q):
    """Mean and variance of BL slots of probability q. 5 standard errors; a variance has sqrt((2 + kurtosis) / trials)."""
    trials, mean, variance = len(pulses), bl * q, bl * q * (1 - q)
    assert bool(((pulses.mean(0) - SIGN * mean).abs() <= 5 * (variance / trials).sqrt() + 1e-5 * mean).all())
    kurtosis = ((1 - 6 * q * (1 - q)) / variance.clamp(min=1e-12)).clamp(min=0.0)
    assert bool(((pulses.var(0) - variance).abs() <= 5 * variance * ((2 + kurtosis) / trials).sqrt() + 1e-6).all())


BINOMIAL = {
    name: PULSES[name]
    for name in (
        "stochastic",
        "stochastic_32",
        "stochastic_100",
        "stochastic_long",
        "unfixed",
        "unfixed_um",
        "grid",
        "early_cut",
        "late_cut",
    )
}


@pytest.mark.parametrize("kappa", [3.2, 20.0, 80.0])
@pytest.mark.parametrize("case", BINOMIAL)
def test_bits_are_binomial(case, kappa):
    """E[n] = BL q and Var[n] = BL q (1 - q), q = min(1, p_x) min(1, p_d), whatever the length of the train."""
    config = BINOMIAL[case]
    bl, p_x, p_d = scaled(kappa, config)
    if config.x_res:  # float32 like the kernel; no probability lies near the middle between two steps
        p_x, p_d = (p_x / config.x_res).round() * config.x_res, (p_d / config.d_res).round() * config.d_res
    assert_binomial(count(kappa, config, 1000), bl, torch.outer(p_d.clamp(max=1.0), p_x.clamp(max=1.0)))


@pytest.mark.parametrize("case", ["grid_random", "grid_100"])
def test_random_rounding_keeps_the_mean(case):
    """E[q(p)] = p on both sides, which are rounded independently; 5 standard errors, sampled. kappa 3: nothing saturates
    and no probability is rounded to above 1.
    """
    pulses = count(3.0, dataclasses.replace(PULSES[case], update_bl_management=False), 4000)
    expected = 3.0 * torch.outer(torch.tensor(D), torch.tensor(X)).abs().double()
    assert bool(((pulses.mean(0) - SIGN * expected).abs() <= 5 * pulses.std(0) / math.sqrt(4000)).all())


def test_grid_without_random_rounding_moves_the_mean():
    """The test above can fail: rounding to the nearest of 10 and 7 steps loses 3% of the largest product."""
    config = dataclasses.replace(PULSES["grid_random"], update_bl_management=False, sto_round=False)
    pulses = count(3.0, config, 4000)
    expected = 3.0 * torch.outer(torch.tensor(D), torch.tensor(X)).abs().double()
    assert bool(((pulses.mean(0) - SIGN * expected).abs() > 5 * pulses.std(0) / math.sqrt(4000)).any())


COUNTED = [name for name, p in PULSES.items() if p.pulse_type in DETERMINISTIC and not p.sto_round]


@pytest.mark.parametrize("kappa", [3.2, 20.0, 80.0])
@pytest.mark.parametrize("case", COUNTED)
def test_counted_pulses_are_the_formula(case, kappa):
    """Every train gives the same count, that of the formula in float64; the operands keep away from halves but for exact
    ones, which go to the even number.
    """
    config = PULSES[case]
    bl, p_x, p_d = scaled(kappa, config)
    q_x, q_d = (
        ((p / res).round() * res if res else p).clamp(max=1.0) for p, res in ((p_x, config.x_res), (p_d, config.d_res))
    )
    if config.pulse_type == "mean_count":
        counts = torch.outer((bl * q_d).round(), (bl * q_x).round())
        expected = torch.tensor([[round(float(n) / bl) for n in row] for row in counts], dtype=torch.float64)
    else:
        expected = (bl * torch.outer(q_d, q_x)).round()
    pulses = count(kappa, config, 3)
    assert torch.equal(pulses, (SIGN * expected).expand_as(pulses))


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize(("kappa", "expected"), [(80, {1: 0.388, 2: 0.775, 8: 1.0}), (8, {1: 1.0, 2: 1.0, 8: 1.0})])
def test_published_saturation_of_counted_trains(kappa, expected, kind):
    """lr .1, g_w .001, BL 31: mean/ideal at d_max, d_max/2, d_max/8. A count is within one pulse of BL p_x p_d (half a
    pulse for the product, and for mean_count less than half for each factor), so the ratio is within 1 / kappa's share.
    """
    d = torch.tensor([float(kappa) / share for share in expected])
    w = torch.zeros(len(d), 1)
    pulse(w, torch.ones(1, 1), d[None], 1.0, pack(visible_device=WIDE, pulse=PulseConfig(pulse_type=kind)))
    for ratio, (share, ideal) in zip((-w[:, 0] / d).tolist(), expected.items(), strict=True):
        assert abs(ratio - ideal) <= 1.0 / (kappa / share) + 1e-3


def test_halves_go_to_the_even_number():
    """BL 2, p = 1/2 on both sides: round(2 * 1/2 * 1/2) = round(1/2) = 0 and, three times as much, round(3/2) = 2."""
    config = PulseConfig(
        pulse_type="deterministic_implicit", desired_bl=2, update_bl_management=False, update_management=False
    )
    w = torch.zeros(1, 2)
    pulse(w, torch.tensor([[0.5, 1.5]]), torch.tensor([[0.5]]), 2.0, pack(visible_device=WIDE, pulse=config))
    assert w.tolist() == [[0.0, -1.0]]  # p = 1.5 acts as 1: round(2 * 1 * 1/2) = 1
    config = dataclasses.replace(config, desired_bl=6)
    w = torch.zeros(1, 1)
    pulse(w, torch.full((1, 1), 0.5), torch.full((1, 1), 0.5), 6.0, pack(visible_device=WIDE, pulse=config))
    assert w.item() == -2.0


def test_counted_pulses_have_noise_of_their_own():
    """20 pulses in one train on a noisy device without bounds: variance 20 s^2 sigma^2, not that of one pulse lumped.

    6400 cells: the standard error of the variance is sqrt(2 / 6400) = 1.8% of it; five of them are allowed.
    """
    s = 2.0**-7  # so that kappa is 20 in float32
    model = devices.ConstantStep(dw_min=s, dw_min_std=0.5, w_max=1e3, w_min=-1e3, dw_min_dtod=0.0, up_down_dtod=0.0)
    w = torch.zeros(80, 80)
    pulse(
        w,
        torch.ones(1, 80),
        -torch.ones(1, 80),
        20 * s,
        pack(visible_device=model, pulse=PulseConfig(pulse_type="mean_count")),
    )
    assert float(w.mean()) == pytest.approx(20 * s, rel=5 * 0.5 / math.sqrt(20 * 6400))
    assert float(w.var()) == pytest.approx(20 * s**2 * 0.5**2, rel=0.09)


@pytest.mark.parametrize("lr", [500.0, 2000.0])
def test_capped_train_keeps_the_mean(lr):
    """fixed_bl=False beyond max_bl: S grows, so that BL p_x p_d is still lr |x d| where no p exceeds 1."""
    config = PulseConfig(fixed_bl=False, update_bl_management=False, update_management=False, max_bl=100)
    w = torch.zeros(1, 50)
    n = 400
    pulse(w, torch.full((n, 50), 0.15), torch.full((n, 1), 0.15), lr, pack(visible_device=WIDE, pulse=config))
    expected, q = lr * 0.15**2, lr / 100 * 0.15**2
    # Columns share d's bits: the error of the mean over columns is at most that of one column, sqrt(q (1 - q) 100 / n)
    assert -float(w.mean()) / n == pytest.approx(expected, abs=5 * math.sqrt(100 * q * (1 - q) / n))


# ------------------------------------------------------------------ floating point


def train(config, lr=0.05, steps=3):
    """Steps of one layer of 6 inputs and 5 outputs; returns it and A, B after each step."""
    torch.manual_seed(0)
    layer = LRTTLinear(6, 5, config=config, tile=0)
    optimizer = LRTT(layer.parameters(), lr=lr)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        layer(randn(step, 8, 6)).square().mean().backward()
        optimizer.step()
        history.append((layer.A.detach().clone(), layer.B.detach().clone()))
    return layer, history


def test_none_is_the_digital_update():
    plain, none = (
        train(LRTTConfig(rank=2, transfer_every=9, pulse=p)) for p in (PulseConfig(), PulseConfig(pulse_type="none"))
    )
    assert all(
        same_bits(a, b) for left, right in zip(plain[1], none[1], strict=True) for a, b in zip(left, right, strict=True)
    )


def test_none_with_device_is_the_digital_update_inside_the_bounds():
    """Each step is the digital one, clipped: replayed by hand from the gradients and the drawn bounds."""
    bounded = devices.SoftBounds(w_max=0.1, w_min=-0.1)
    config = LRTTConfig(
        rank=2, transfer_every=9, reinit_gain=1.0, fast_device=bounded, pulse=PulseConfig(pulse_type="none_with_device")
    )
    layer = LRTTLinear(6, 5, config=config, tile=0)
    optimizer = LRTT(layer.parameters(), lr=0.7)
    clipped = 0
    for step in range(4):
        optimizer.zero_grad()
        layer(randn(step, 8, 6)).square().mean().backward()
        expected = []
        for array, w in enumerate((layer.A, layer.B)):
            top, low = OPS.draw_cells(layer.tile_state, layer.hyper, array, *w.shape)[:2]
            free = w.detach() - torch.tensor(0.7) * w.grad
            expected.append(free.clamp(low, top))
            clipped += int((free != expected[-1]).sum())
        optimizer.step()
        assert same_bits(layer.A.detach(), expected[0])
        assert same_bits(layer.B.detach(), expected[1])
    assert clipped > 0, "nothing reached a bound: the test would show nothing"
    assert layer.counts()["pulses_a"] == 0
    assert not config.is_pulsed


def test_floating_point_types_take_no_pulses():
    hyper = pack(visible_device=DEVICES["soft"], pulse=PulseConfig(pulse_type="none"))
    with pytest.raises(ValueError, match="pulse_type must be a pulsed one"):
        pulse(torch.zeros(2, 3), torch.ones(1, 3), torch.ones(1, 2), 1.0, hyper)


# ------------------------------------------------------------------ refusals

REFUSED = {
    "type": ({"pulse_type": "Stochastic"}, "pulse_type must be one of 'stochastic_compressed'"),
    "bl": ({"desired_bl": 15873}, "desired_bl must be between 1 and 15872, got 15873"),
    "fixed_with_ublm": ({"fixed_bl": False}, "fixed_bl must be True with update_bl_management=True"),
    "max_fixed": ({"max_bl": 90}, "max_bl must be None with fixed_bl=True, got 90"),
    "max_below": (
        {"max_bl": 9, "fixed_bl": False, "update_bl_management": False},
        "max_bl must be between 31 and 15872",
    ),
    "steps": ({"x_res": 15}, "x_res must be finite and >= 0 and <= 1, got 15; write 1/n"),
    "fine": ({"d_res": 1e-9}, r"d_res must be 0 or at least 2\*\*-20"),
    "negative": ({"x_res": -1.0}, "x_res must be finite and >= 0"),
    "no_grid": ({"sto_round": True}, "sto_round must be False without x_res and d_res"),
    "grad_scale": ({"um_grad_scale": 0.0}, "um_grad_scale must be finite and > 0"),
    "grad_scale_alone": (
        {"um_grad_scale": 2.0, "update_management": False, "update_bl_management": False},
        "um_grad_scale must be 1 without",
    ),
    "none_with_train": (
        {"pulse_type": "none", "desired_bl": 5},
        "desired_bl must be left at 31 with pulse_type='none'",
    ),
    "device_with_grid": ({"pulse_type": "none_with_device", "x_res": 0.1}, "x_res must be left at 0.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_refuses(case):
    numbers, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"PulseConfig: {message}"):
        PulseConfig(**numbers)


REFUSED_TOGETHER = {
    "none": ({"fast_device": WIDE, "pulse": PulseConfig(pulse_type="none")}, "fast_device must be None"),
    "no_bounds": ({"pulse": PulseConfig(pulse_type="none_with_device")}, "pulse.pulse_type must be 'none' without"),
    "held": (
        {"fast_device": devices.SoftBounds(write_noise_std=1.0), "pulse": PulseConfig(pulse_type="none_with_device")},
        "fast_device must be one that holds nothing but the weight",
    ),
    "transfer_none": (
        {"visible_device": WIDE, "transfer_pulse": PulseConfig(pulse_type="none_with_device")},
        "transfer_pulse.pulse_type must be a pulsed one.*transfer_mode='digital'",
    ),
    "transfer_unfixed": (
        {"visible_device": WIDE, "transfer_pulse": PULSES["unfixed"]},
        "transfer_pulse.fixed_bl must be True",
    ),
    "transfer_cut": (
        {"visible_device": WIDE, "transfer_pulse": PULSES["early_cut"]},
        "transfer_pulse.um_grad_scale must be 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED_TOGETHER)
def test_tile_config_refuses(case):
    numbers, message = REFUSED_TOGETHER[case]
    with pytest.raises(ValueError, match=f"LRTTConfig: {message}"):
        LRTTConfig(rank=1, reinit_gain=1.0, **numbers)
