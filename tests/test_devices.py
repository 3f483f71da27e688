"""Device models in closed form: one pulse, many pulses, noise, bounds, the spread from cell to cell, bad arguments."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from helpers import fresh_state, pack, pulse, quiet, same_bits

from lightning_lrtt import devices
from lightning_lrtt.ops import COUNTS, FIXED_POINT

UP, DOWN = 1, -1


def cells(device, rows=300, columns=400, array=2, seed=0):
    """b_max, b_min, s_up, s_dn, e0, e1 of every cell."""
    return torch.ops.lrtt.draw_cells(
        fresh_state(seed), pack(visible_device=device, fast_device=device), array, rows, columns
    )


def send(w, device, direction, n=1, seed=0, step=0):
    """Exactly ``n`` pulses on every cell: kappa = 1 makes one slot with p_x = p_d = 1 of each of n samples."""
    rows, columns = w.shape
    lr = float(torch.tensor(device.granularity))  # float32, as the kernel divides by it
    return pulse(
        w,
        torch.ones(n, columns),
        torch.full((n, rows), -float(direction)),
        lr,
        pack(visible_device=device),
        seed=seed,
        step=step,
    )


# ------------------------------------------------------------------ one pulse without noise

# device -> (w, direction, s_up, s_dn, b_max, b_min) -> dw, as written in the models' documentation
STEPS = {
    "constant": (
        quiet(devices.ConstantStep, dw_min=0.01, dw_min_dtod=0.3, up_down=0.1, up_down_dtod=0.1),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(up, s_up, -s_dn),
    ),
    "linear": (
        quiet(devices.LinearStep, dw_min=0.01, dw_min_dtod=0.3, gamma_up=0.4, gamma_down=0.7),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(
            up, s_up * (1 - 0.4 * w / 0.6), -s_dn * (1 - 0.7 * w / -0.6)
        ),
    ),
    "linear_own_bounds": (
        quiet(
            devices.LinearStep, gamma_up=0.4, gamma_down=0.7, w_max_dtod=0.2, w_min_dtod=0.2, mean_bound_reference=False
        ),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(
            up, s_up * (1 - 0.4 * w / b_max), -s_dn * (1 - 0.7 * w / b_min)
        ),
    ),
    "soft": (
        quiet(devices.SoftBounds, dw_min=0.01, dw_min_dtod=0.3, up_down=-0.2, w_max_dtod=0.2, w_min_dtod=0.2),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(up, s_up * (1 - w / b_max), -s_dn * (1 - w / b_min)),
    ),
    "soft_additive": (
        quiet(devices.SoftBounds, dw_min=0.01, mult_noise=False, w_max_dtod=0.2),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(up, s_up * (1 - w / b_max), -s_dn * (1 - w / b_min)),
    ),
    # drawn bounds are those of w; v = w + 0.05 and its bounds are 0.05 higher
    "soft_reference": (
        quiet(devices.SoftBoundsReference, dw_min=0.01, dw_min_dtod=0.3, w_max_dtod=0.2, reference_mean=0.05),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(
            up, s_up * (1 - (w + 0.05) / (b_max + 0.05)), -s_dn * (1 - (w + 0.05) / (b_min + 0.05))
        ),
    ),
    "exp": (
        quiet(devices.ExpStep, dw_min=0.01, dw_min_dtod=0.3, w_max_dtod=0.2),
        lambda w, up, s_up, s_dn, b_max, b_min: exp_step(w, up, s_up, s_dn, b_max - b_min, devices.ExpStep()),
    ),
    "exp_convex": (
        quiet(devices.ExpStep, dw_min=0.01, A_up=-1.2, A_down=-0.08, gamma_up=5.0, gamma_down=4.0, a=-0.5, b=-0.5),
        lambda w, up, s_up, s_dn, b_max, b_min: exp_step(
            w,
            up,
            s_up,
            s_dn,
            b_max - b_min,
            devices.ExpStep(A_up=-1.2, A_down=-0.08, gamma_up=5.0, gamma_down=4.0, a=-0.5, b=-0.5),
        ),
    ),
    "pow": (
        quiet(devices.PowStep, dw_min=0.01, dw_min_dtod=0.3, w_max_dtod=0.2, pow_gamma=1.7, pow_up_down=0.2),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(
            up, s_up * ((b_max - w) / (b_max - b_min)) ** 1.7, -s_dn * ((w - b_min) / (b_max - b_min)) ** (1.7 * 0.8)
        ),
    ),
    # a shift moves the weight and both bounds, so the step reads as PowStep's
    "pow_reference": (
        quiet(devices.PowStepReference, dw_min=0.01, pow_gamma=0.6, reference_mean=-0.1),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(
            up, s_up * ((b_max - w) / (b_max - b_min)) ** 0.6, -s_dn * ((w - b_min) / (b_max - b_min)) ** 0.6
        ),
    ),
    "piecewise": (
        quiet(
            devices.PiecewiseStep,
            dw_min=0.01,
            w_max_dtod=0.2,
            piecewise_up=(1.0, 0.4, 0.0),
            piecewise_down=(0.1, 0.5, 1.2),
        ),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(
            up,
            s_up * hat((w - b_min) / (b_max - b_min), 1.0, 0.4, 0.0),
            -s_dn * hat((w - b_min) / (b_max - b_min), 0.1, 0.5, 1.2),
        ),
    ),
    "piecewise_one": (
        quiet(devices.PiecewiseStep, dw_min=0.01, piecewise_up=(0.5,), piecewise_down=(1.5,)),
        lambda w, up, s_up, s_dn, b_max, b_min: torch.where(up, 0.5 * s_up, -1.5 * s_dn),
    ),
}


def exp_step(w, up, s_up, s_dn, spread, p):
    """ExpStep as documented."""
    z = 2 * p.a * w / spread + p.b
    rise = (1 - p.A_up * (p.gamma_up * z).exp()).clamp(min=0)
    fall = (1 - p.A_down * (-p.gamma_down * z).exp()).clamp(min=0)
    return torch.where(up, s_up * rise, -s_dn * fall)


def hat(t, left, middle, right):
    """The polyline through (0, left), (1/2, middle), (1, right)."""
    return torch.where(t < 0.5, left + 2 * t * (middle - left), middle + (2 * t - 1) * (right - middle))


@pytest.mark.parametrize("direction", [UP, DOWN], ids=["up", "down"])
@pytest.mark.parametrize("name", STEPS)
def test_one_pulse_in_closed_form(name, direction):
    """Tolerance: five float32 operations on numbers below 1, 5 * 2^-24 absolute.

    exp and pow err by 1e-6 of a step of 0.02.
    """
    device, formula = STEPS[name]
    drawn = cells(device, 30, 40).double()
    w = torch.linspace(-0.3, 0.3, 1200).view(30, 40)
    before = w.double()
    counts = send(w, device, direction)
    change = formula(before, torch.tensor(direction == UP), drawn[2], drawn[3], drawn[0], drawn[1])
    expected = (before + change).clamp(min=drawn[1], max=drawn[0])
    assert float((w.double() - expected).abs().max()) <= 5 * 2.0**-24
    assert counts[COUNTS["pulses_c"]] == 1200


# ------------------------------------------------------------------ noise

NOISY = {
    # standard deviation of one step at w = 0.3, with s = 0.01 and sigma = 0.5
    "constant": (quiet(devices.ConstantStep, dw_min=0.01, dw_min_std=0.5), 0.01, 0.01 * 0.5),
    "soft_multiplicative": (quiet(devices.SoftBounds, dw_min=0.01, dw_min_std=0.5), 0.005, 0.005 * 0.5),
    "soft_additive": (quiet(devices.SoftBounds, dw_min=0.01, dw_min_std=0.5, mult_noise=False), 0.005, 0.01 * 0.5),
    "linear_multiplicative": (quiet(devices.LinearStep, dw_min=0.01, dw_min_std=0.5, gamma_up=1.0), 0.005, 0.005 * 0.5),
    "linear_additive": (
        quiet(devices.LinearStep, dw_min=0.01, dw_min_std=0.5, gamma_up=1.0, mult_noise=False),
        0.005,
        0.01 * 0.5,
    ),
}


@pytest.mark.parametrize("name", NOISY)
def test_mean_and_spread_of_one_noisy_pulse(name):
    """40000 equal cells: mean within 5 std / sqrt(n), std within 5 / sqrt(2 n) relative."""
    device, mean, std = NOISY[name]
    w = torch.full((200, 200), 0.3)
    send(w, device, UP)
    step = w.double() - float(torch.tensor(0.3))
    assert step.mean() == pytest.approx(mean, abs=5 * std / 200)
    assert step.std() == pytest.approx(std, rel=5 / math.sqrt(2 * 200**2))


def test_noise_is_fresh_for_every_pulse_cell_and_step():
    """7 pulses spread as sqrt(7) independent ones (lumped noise would give 7); another step draws other noise."""
    device = quiet(devices.ConstantStep, dw_min=0.001, dw_min_std=0.5)
    w = torch.zeros(200, 200)
    send(w, device, UP, n=7)
    assert w.double().std() == pytest.approx(0.001 * 0.5 * math.sqrt(7), rel=5 / math.sqrt(2 * 200**2))
    other = torch.zeros(200, 200)
    send(other, device, UP, n=7, step=1)
    correlation = torch.corrcoef(torch.stack([w.flatten(), other.flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / 200


# ------------------------------------------------------------------ many pulses and bounds


@pytest.mark.parametrize("direction", [UP, DOWN], ids=["up", "down"])
def test_soft_bounds_converge_geometrically(direction):
    """b - w shrinks by 1 - s/b a pulse. Rounding: 3 * 2^-24 a pulse relative to b, damped by the same factor: s/b =
    1/60 lets at most 60 of them pile up.
    """
    device, n = quiet(devices.SoftBounds, dw_min=0.01), 500
    w = torch.full((2, 3), 0.1)
    send(w, device, direction, n=n)
    bound = 0.6 * direction
    expected = bound - (bound - 0.1) * (1 - 0.01 / 0.6) ** n
    assert w.double().sub(expected).abs().max() <= 60 * 3 * 2.0**-24 * 0.6


def test_soft_bounds_hold_their_symmetry_point():
    """Alternating up and down pulses of a symmetric cell pull its weight to 0: (1 - s/b)^2 a pair, + O(s^2)."""
    device = quiet(devices.SoftBounds, dw_min=0.01)
    w = torch.full((1, 1), 0.5)
    for _ in range(300):
        send(w, device, UP)
        send(w, device, DOWN)
    assert abs(float(w)) < 0.01


def test_reference_at_the_symmetry_point():
    """Up and down steps are equal at w = 0, cell by cell. Five roundings of v < 1 move w + s by 5 * 2^-24."""
    device = quiet(
        devices.SoftBoundsReference,
        dw_min=0.01,
        dw_min_dtod=0.2,
        up_down=0.2,
        up_down_dtod=0.1,
        w_max_dtod=0.1,
        w_min_dtod=0.2,
        slope_up_dtod=0.1,
        slope_down_dtod=0.1,
        subtract_symmetry_point=True,
    )
    up, down = torch.zeros(30, 40), torch.zeros(30, 40)
    send(up, device, UP)
    send(down, device, DOWN)
    assert float((up.double() + down.double()).abs().max()) <= 2 * 5 * 2.0**-24
    assert float(up.median()) > 0.001


@pytest.mark.parametrize("direction", [UP, DOWN], ids=["up", "down"])
def test_pow_step_of_exponent_one_converges_geometrically(direction):
    """The room to the bound shrinks by 1 - s/R a pulse, R = 1.2. Rounding as for SoftBounds; pow errs by 1e-6 of s."""
    device, n = quiet(devices.PowStep, dw_min=0.02, pow_gamma=1.0), 500
    w = torch.full((2, 3), 0.1)
    send(w, device, direction, n=n)
    bound = 0.6 * direction
    expected = bound - (bound - 0.1) * (1 - 0.02 / 1.2) ** n
    assert w.double().sub(expected).abs().max() <= 60 * (3 * 2.0**-24 * 0.6 + 0.02 * 1e-6)


@pytest.mark.parametrize("direction", [UP, DOWN], ids=["up", "down"])
def test_exp_step_ends_where_it_saturates(direction):
    """The step is 0 from z = -ln(A_up) / gamma_up on (down: ln(A_down) / gamma_down); no weight goes beyond."""
    device = quiet(devices.ExpStep, dw_min=0.002, w_max=2.0, w_min=-2.0, a=0.5)
    z = -math.log(device.A_up) / device.gamma_up if direction == UP else math.log(device.A_down) / device.gamma_down
    end = (z - device.b) * 4.0 / (2 * device.a)
    w = torch.zeros(2, 3)
    send(w, device, direction, n=3000)
    assert -0.1 < direction * float(w[0, 0] - end) <= 0.002


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (devices.ConstantStep(dw_min=0.01), 0.01),
        (devices.SoftBoundsPmax(p_max=100, alpha=0.01, range_min=-1.0, range_max=1.0), 0.02 / (1 - math.exp(-1.0))),
        (
            devices.ExpStep(dw_min=0.01, up_down=0.2, A_down=0.3, gamma_down=2.0, b=0.1),
            0.01 * 0.8 * (1 - 0.3 * math.exp(-0.2)),
        ),
        (devices.ExpStep(dw_min=0.01, A_down=3.0, gamma_down=0.0), 0.01),  # no down step at 0: dw_min
        (devices.PowStep(dw_min=0.01, pow_gamma=2.0), 0.0025),
        (devices.PiecewiseStep(dw_min=0.01, piecewise_up=(1.0, 0.7, 0.4), piecewise_down=(1.0, 1.0, 1.0)), 0.007),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, devices.Device) else "",
)
def test_granularity(device, expected):
    assert device.granularity == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("direction", [UP, DOWN], ids=["up", "down"])
def test_clip_to_the_cells_own_bounds(direction):
    """Constant steps end exactly on the drawn bound, and what the bound cut from C is counted in fixed point."""
    device = quiet(devices.ConstantStep, dw_min=0.125, w_max=0.5, w_min=-0.5, w_max_dtod=0.1, w_min_dtod=0.1)
    bound = cells(device, 5, 7)[0 if direction == UP else 1]
    w = torch.zeros(5, 7)
    counts = send(w, device, direction, n=8)
    assert same_bits(w, bound)
    expected = 35 * 8 * 0.125 - float(bound.double().abs().sum())
    # every cell's sum of 8 cuts rounds to float32 (8 * 2^-24) and then to a fixed-point unit
    assert int(counts[COUNTS["lost"]]) / FIXED_POINT == pytest.approx(expected, abs=35 * 9 * 2.0**-24)


def test_clip_reports_cells_at_a_bound():
    device = quiet(devices.Ideal, w_max=0.5, w_min=-0.5)
    w = torch.tensor([[0.5, 0.4, -0.7], [0.0, 2.0, -0.5]])
    before = w.clone()
    arguments = fresh_state(), pack(visible_device=device), 2
    assert torch.ops.lrtt.clip_(w, *arguments, False) == 4
    assert torch.equal(w, before)
    assert torch.ops.lrtt.clip_(w, *arguments, True) == 4
    assert torch.equal(w, before.clamp(-0.5, 0.5))


# ------------------------------------------------------------------ from cell to cell


def assert_moments(values, mean, std):
    """Mean within 5 standard errors, standard deviation within 5 / sqrt(2 n) relative."""
    n = values.numel()
    assert values.double().mean() == pytest.approx(mean, abs=5 * std / math.sqrt(n) + 1e-7)
    assert values.double().std() == pytest.approx(std, rel=5 / math.sqrt(2 * n), abs=1e-7)


def test_spread_of_bounds_and_steps():
    """Spreads of 15%: a fold at 6.7 sigma does not show in 120000 cells."""
    drawn = cells(
        devices.ConstantStep(
            dw_min=0.02, dw_min_dtod=0.15, up_down_dtod=0.05, w_max=0.8, w_max_dtod=0.15, w_min=-0.4, w_min_dtod=0.1
        )
    )
    assert_moments(drawn[0], 0.8, 0.8 * 0.15)
    assert_moments(drawn[1], -0.4, 0.4 * 0.1)
    assert_moments((drawn[2] + drawn[3]) / 2, 0.02, 0.02 * 0.15)
    assert_moments((drawn[2] - drawn[3]) / 2, 0.0, 0.02 * 0.05)


@pytest.mark.parametrize(("up_down", "s_up", "s_dn"), [(0.3, 1.0, 0.7), (-0.3, 0.7, 1.0)])
def test_asymmetry_weakens_one_side(up_down, s_up, s_dn):
    drawn = cells(quiet(devices.ConstantStep, dw_min=0.01, up_down=up_down))
    assert_moments(drawn[2], 0.01 * s_up, 0.0)
    assert_moments(drawn[3], 0.01 * s_dn, 0.0)


def test_log_normal_steps():
    drawn = cells(quiet(devices.ConstantStep, dw_min=0.01, dw_min_dtod=0.8, dw_min_dtod_log_normal=True))
    assert_moments((drawn[2] / 0.01).log(), 0.0, 0.8)


def test_spread_of_slopes():
    """e0 = gamma_up / w_max, e1 = gamma_down / w_min."""
    drawn = cells(
        devices.LinearStep(gamma_up=0.5, gamma_down=0.8, gamma_up_dtod=0.05, gamma_down_dtod=0.1, w_max=0.5, w_min=-0.4)
    )
    assert_moments(drawn[4] * 0.5, 0.5, 0.05)
    assert_moments(drawn[5] * -0.4, 0.8, 0.1)


def test_enforced_consistency():
    """Whatever is drawn: b_min <= 0 <= b_max and no step goes the wrong way. Without it both happen."""
    wild = {"w_max_dtod": 2.0, "w_min_dtod": 2.0, "dw_min_dtod": 2.0}
    drawn = cells(devices.ConstantStep(**wild))
    assert bool((drawn[1] <= 0).all() and (drawn[0] >= 0).all() and (drawn[2:4] >= 0).all())
    free = cells(devices.ConstantStep(enforce_consistency=False, **wild))
    assert bool((free[0] >= free[1]).all())  # an empty range is held at its middle
    assert bool((free[2] < 0).any() and (free[0] < 0).any())


def test_spread_of_exponents():
    drawn = cells(devices.PowStep(pow_gamma=1.5, pow_gamma_dtod=0.1, pow_up_down=-0.2, pow_up_down_dtod=0.05))
    assert_moments((drawn[4] + drawn[5]) / 2, 1.5 * 0.9, 1.5 * 0.1)
    assert_moments((drawn[4] - drawn[5]) / 2, 1.5 * -0.1, 1.5 * 0.05)


@pytest.mark.parametrize("kind", [devices.SoftBoundsReference, devices.PowStepReference])
def test_spread_of_references(kind):
    """The reference moves both bounds of the weight and nothing else."""
    drawn = cells(kind(reference_mean=0.1, reference_std=0.05, w_max_dtod=0.0, w_min_dtod=0.0))
    assert_moments(drawn[6], 0.1, 0.05)
    assert_moments(drawn[0], 0.6 - 0.1, 0.05)
    assert torch.allclose(drawn[0] - drawn[1], torch.tensor(1.2), atol=2 * 2.0**-24)


def test_slopes_stay_positive_unless_allowed():
    wild = {"gamma_up_dtod": 1.0, "gamma_down_dtod": 1.0}
    assert bool((cells(devices.LinearStep(**wild))[4] >= 0).all())
    assert bool((cells(devices.LinearStep(**wild, allow_increasing_slope=True))[4] < 0).any())


@pytest.mark.parametrize("kind", [devices.ConstantStep, devices.LinearStep, devices.SoftBounds])
def test_corrupt_cells_are_stuck(kind):
    """The wanted share (5 standard errors) holds one value within the range, whatever pulses say."""
    device = kind(corrupt_devices_prob=0.1, corrupt_devices_range=0.2)
    drawn = cells(device)
    stuck = (drawn[2] == 0) & (drawn[3] == 0)
    assert stuck.double().mean() == pytest.approx(0.1, abs=5 * math.sqrt(0.1 * 0.9 / stuck.numel()))
    assert torch.equal(drawn[0][stuck], drawn[1][stuck])
    assert float(drawn[0][stuck].abs().max()) <= 0.2
    w = torch.zeros(300, 400)
    send(w, device, UP, n=3)
    assert same_bits(w[stuck], drawn[0][stuck])


def test_cells_depend_on_key_and_array_only():
    device = devices.SoftBounds()
    assert same_bits(cells(device, seed=4), cells(device, seed=4))
    for other in (cells(device, seed=5), cells(device, seed=4, array=1)):
        pair = torch.stack([cells(device, seed=4)[0].flatten(), other[0].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(pair.shape[1])


def test_clipped_power_agrees_with_drawn_cells():
    """E[clip(z)^2] of the unit gain against Monte Carlo over drawn bounds: 120000 draws of a value below b_max^2."""
    device = devices.SoftBounds()
    drawn = cells(device).double()
    z = torch.randn(drawn[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clipped = (0.5 * z).clamp(min=drawn[1], max=drawn[0]).square()
    assert device.clipped_power(0.5) == pytest.approx(
        float(clipped.mean()), abs=5 * float(clipped.std()) / math.sqrt(z.numel())
    )


# ------------------------------------------------------------------ arguments

BAD = [
    (devices.SoftBounds, {"dw_min": 0.0}, "SoftBounds: dw_min must be finite and > 0, got 0.0"),
    (devices.SoftBounds, {"dw_min": -0.1}, "SoftBounds: dw_min must be finite and > 0, got -0.1"),
    (devices.ConstantStep, {"dw_min": float("nan")}, "ConstantStep: dw_min must be finite and > 0, got nan"),
    (
        devices.ConstantStep,
        {"w_max": -0.1},
        "ConstantStep: w_max must be finite and >= 0, got -0.1; the bounds must enclose 0",
    ),
    (
        devices.ConstantStep,
        {"w_min": 0.1},
        "ConstantStep: w_min must be finite and <= 0, got 0.1; the bounds must enclose 0",
    ),
    (devices.ConstantStep, {"w_max": 0.0, "w_min": 0.0}, "ConstantStep: w_max must be > w_min, got 0.0"),
    (devices.ConstantStep, {"dw_min_std": -1.0}, "ConstantStep: dw_min_std must be finite and >= 0, got -1.0"),
    (devices.ConstantStep, {"up_down": float("inf")}, "ConstantStep: up_down must be finite, got inf"),
    (
        devices.Ideal,
        {"corrupt_devices_prob": 1.5},
        "Ideal: corrupt_devices_prob must be finite and >= 0 and <= 1, got 1.5",
    ),
    (devices.LinearStep, {"gamma_up": -0.5}, "LinearStep: gamma_up must be finite and >= 0, got -0.5"),
    (devices.LinearStep, {"gamma_down_dtod": -0.5}, "LinearStep: gamma_down_dtod must be finite and >= 0, got -0.5"),
    (
        devices.SoftBoundsReference,
        {"reference_std": -0.1},
        "SoftBoundsReference: reference_std must be finite and >= 0, got -0.1",
    ),
    (devices.ExpStep, {"A_up": float("nan")}, "ExpStep: A_up must be finite, got nan"),
    (devices.PowStep, {"pow_gamma": -1.0}, "PowStep: pow_gamma must be finite and >= 0, got -1.0"),
    (
        devices.PiecewiseStep,
        {"piecewise_up": (1.0, 0.0), "piecewise_down": (1.0, 1.0)},
        "PiecewiseStep: piecewise_up[1] must be finite and > 0, got 0.0; pulses are counted in the middle node's step",
    ),
]


@pytest.mark.parametrize(("kind", "kwargs", "message"), BAD, ids=[f"{k.__name__}-{'-'.join(a)}" for k, a, _ in BAD])
def test_argument_errors(kind, kwargs, message):
    with pytest.raises(ValueError) as error:
        kind(**kwargs)
    assert str(error.value) == message


def test_types_are_checked():
    with pytest.raises(TypeError, match=r"SoftBounds: dw_min must be a number, got '0\.1'"):
        devices.SoftBounds(dw_min="0.1")
    with pytest.raises(TypeError, match="use one of its subclasses"):
        devices.PulsedDevice()
    with pytest.raises(AttributeError):
        devices.SoftBounds().dw_min = 2.0


def test_nodes_may_be_lists():
    """Regression: YAML hands lists over, and the frozen device had no hash."""
    given = devices.PiecewiseStep(piecewise_up=[1.0, 0.5], piecewise_down=[0.5, 1.0])
    assert given == devices.PiecewiseStep(piecewise_up=(1.0, 0.5), piecewise_down=(0.5, 1.0))
    assert hash(given) == hash(devices.PiecewiseStep(piecewise_up=(1.0, 0.5), piecewise_down=(0.5, 1.0)))
    with pytest.raises(ValueError, match=r"piecewise_down must be as long as piecewise_up \(2\), got \[1\.0\]"):
        devices.PiecewiseStep(piecewise_up=[1.0, 0.5], piecewise_down=[1.0])


def test_worked_example_is_the_code():
    """Every block of docs/adding_a_device.md stands in the sources that the page names."""
    root = Path(__file__).parents[1]
    page = (root / "docs" / "adding_a_device.md").read_text()
    names = [
        "csrc/devices.h",
        "lightning_lrtt/devices/pow_step.py",
        "lightning_lrtt/ops/reference_devices.py",
        "tests/test_devices.py",
        "tests/helpers.py",
        "tests/peers/aihwkit_statistics.py",
    ]
    sources = [(root / name).read_text() for name in names]
    blocks = re.findall(r"```(?:cpp|python)\n(.*?)\n```", page, flags=re.DOTALL)
    assert len(blocks) == 10
    assert not [block for block in blocks if not any(block in source for source in sources)]
