"""Random numbers: Philox against published vectors, normals against Phi^-1 and by goodness of fit, exp."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import fresh_state, pack
from scipy import stats

from lightning_lrtt import _C, devices
from lightning_lrtt.ops import reference_random as rng

# Random123, tests/kat_vectors, philox4x32 7: (counter, key, output)
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
}


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_philox_known_answers(case):
    counter, (low, high), expected = KNOWN_ANSWERS[case]
    key = high << 32 | low
    assert _C.philox(key, *counter) == expected
    assert tuple(rng.philox(key, *counter).tolist()) == expected


def exact_normal(word):
    """Phi^-1 of the two-sided construction in float64: sign bit, then q = (m + 1/2) / 2^31."""
    q = ((word & 0x7FFFFFFF) + 0.5) * 2.0**-31
    return stats.norm.isf(q / 2) * (-1.0 if word >> 31 else 1.0)


def test_normal_equals_the_inverse_cdf_on_a_grid():
    """z = x p(w): the fits are 2.2e-6 (tail) and 1.5e-7 + 2.8e-7 (centre) relative to z; rounding q and x = 1 - q to
    float32 moves x by 2^-24, so z by sqrt(pi/2) 2^-24 where z is small; Horner adds a few 2^-24.
    """
    words = [*range(0, 2**32, 2**32 // 20_011), *range(200), *range(2**31 - 200, 2**31 + 200)]
    for word in words:
        z = exact_normal(word)
        assert abs(_C.normal(word) - z) <= 3e-6 * abs(z) + 1e-7, hex(word)


def test_normal_at_the_extremes():
    """The largest value belongs to q = 2^-32, the smallest is 0, and the sign bit mirrors exactly."""
    assert _C.normal(0) == pytest.approx(stats.norm.isf(2.0**-33), rel=3e-6)
    assert _C.normal(0x7FFFFFFF) == 0.0
    assert all(_C.normal(w | 1 << 31) == -_C.normal(w) for w in (0, 1, 77, 2**30, 2**31 - 1))


def compiled_normals(dtod=1.0):
    """A million normals of the compiled core: step sizes of cells with 100% spread are 1 + xi."""
    device = devices.ConstantStep(dw_min=1.0, dw_min_dtod=dtod, up_down_dtod=0.0, enforce_consistency=False)
    s_up = torch.ops.lrtt.draw_cells(fresh_state(1), pack(visible_device=device), 2, 1000, 1000)[2]
    return (s_up.double() - 1.0).flatten().numpy()


def test_normals_pass_kolmogorov_smirnov():
    """10^6 fixed draws; a correct generator fails one seed in a thousand."""
    assert stats.kstest(compiled_normals(), "norm").pvalue > 1e-3


def test_normals_pass_chi_square():
    """1000 bins of equal probability, plus the tails beyond 4.5 sigma against their binomial."""
    z = compiled_normals()
    observed, _ = np.histogram(stats.norm.cdf(z), bins=1000, range=(0.0, 1.0))
    assert stats.chisquare(observed).pvalue > 1e-3
    tail = 2 * stats.norm.sf(4.5)  # 6.8 expected
    assert stats.binomtest(int((np.abs(z) > 4.5).sum()), len(z), tail).pvalue > 1e-3


def test_normals_of_neighbours_are_uncorrelated():
    """Neighbouring cells, words of one call, and their squares: |correlation| < 5 / sqrt(n)."""
    words = rng.philox(1234, torch.arange(100_000), 0, 0, 0)
    z = rng.normal(words.t().flatten()).double()
    for lag in (1, 2, 4):
        for values in (z, z.square() - 1.0):
            correlation = (values[lag:] * values[:-lag]).mean() / values.square().mean()
            assert abs(correlation) < 5 / math.sqrt(len(z))


def test_uniform_has_24_bits_and_never_reaches_one():
    words = torch.tensor([0, 255, 256, 2**32 - 1])
    assert rng.uniform(words).tolist() == [0.0, 0.0, 2.0**-24, 1.0 - 2.0**-24]


def test_exp_is_accurate_to_a_few_roundings():
    """1e-7 relative as the header says: one rounding of the polynomial, one of the sum; exact at 0."""
    assert _C.exp(0.0) == 1.0
    for z in np.linspace(-87.0, 87.0, 20_001, dtype=np.float32):
        expected = math.exp(float(z))
        assert abs(_C.exp(float(z)) - expected) <= 1e-7 * expected
    grid = torch.linspace(-87.0, 87.0, 5001)
    assert rng.exp(grid).tolist() == [_C.exp(v) for v in grid.tolist()]
