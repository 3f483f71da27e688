"""The random numbers of csrc/math.h in plain PyTorch: Philox words, normals and Bernoulli slots.

Slow and readable. 32-bit words are int64 tensors with values in ``[0, 2^32)``; floating point is float32 in the order of
the header, whose explicit fma is emulated exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER = 0xADB4A92D  # of the noise of pulses
DRAW, REINIT, BIT_X, BIT_D, NOISE, DIFFUSION, WRITE_NOISE, RESET, ROUND = range(1, 10)  # purposes
DIRECT_SLOTS = 5  # up to here a slot takes one uniform, longer trains are sampled bit-sliced

# csrc/math.h: log2 on [-0.25, 0.5), z/x by w - 3.5, z/x by sqrt(w) - 4; highest power first.
_LOG2 = (-0.0961651281, 0.204129755, -0.250653386, 0.290073574, -0.360335201, 0.480847508, -0.72135067, 1.44269526)
_CENTRE = (
    2.16665996e-09,
    3.62964947e-08,
    -5.79798211e-07,
    -6.4612658e-07,
    7.17791045e-05,
    -0.000620948733,
    -0.00264456123,
    0.242356926,
    2.09747577,
)
_TAIL = (
    -6.67963614e-05,
    0.000357993646,
    -0.000817806518,
    0.00131835067,
    -0.00243593566,
    0.00445158454,
    1.18452847,
    4.47536278,
)
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def f32(value: float | Tensor) -> Tensor:
    """A float32 tensor."""
    return torch.as_tensor(value, dtype=torch.float32)


def bits_of(value: Tensor) -> Tensor:
    """The bit pattern of float32, in ``[0, 2^32)``."""
    return value.view(torch.int32).long() & _MASK


def from_bits(word: Tensor) -> Tensor:
    """float32 with this bit pattern."""
    return torch.where(word > 0x7FFFFFFF, word - 2**32, word).to(torch.int32).view(torch.float32)


def less(a: Tensor, b: Tensor) -> Tensor:
    """``min_`` of the header: ``a < b ? a : b``."""
    return torch.where(a < b, a, b)


def more(a: Tensor, b: Tensor) -> Tensor:
    """``max_`` of the header: ``a > b ? a : b``."""
    return torch.where(a > b, a, b)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 ``a b + c`` with one rounding.

    The product is exact in float64. The sum is rounded to odd there (TwoSum gives the sign of what is missing), which keeps
    enough for the rounding to float32 to be that of the exact value.
    """
    product, c = torch.broadcast_tensors(f32(a).double() * f32(b).double(), f32(c).double())
    total = product + c
    other = total - product
    missing = (product - (total - other)) + (c - other)
    bits = total.view(torch.int64)
    step = torch.where((missing > 0) == (total > 0), 1, -1)
    inexact_even = (missing.abs() > 0) & (bits & 1 == 0)
    return torch.where(inexact_even, bits + step, bits).view(torch.float64).float()


def _horner(coefficients: tuple[float, ...], v: Tensor) -> Tensor:
    total = f32(coefficients[0])
    for c in coefficients[1:]:
        total = fma(total, v, f32(c))
    return total


def philox(key: int, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int) -> Tensor:
    """Philox-4x32-7 words ``[4, ...]`` of counters that broadcast against each other."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    x0, x1, x2, x3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) & _MASK for c in (c0, c1, c2, c3)))
    for _ in range(7):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # modulo 2^64
        x0, x1, x2, x3 = (p1 >> 32) & _MASK ^ x1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([x0, x1, x2, x3])


def counter3(purpose: int, array: int, piece: int = 0) -> int:
    """The fourth counter word."""
    return purpose << 24 | array << 16 | piece


def element_words(key: int, elements: Tensor, c1: int, c2: int, c3: int) -> Tensor:
    """One word per element: word ``e % 4`` of the Philox call of ``e // 4``."""
    return philox(key, elements // 4, c1, c2, c3).gather(0, (elements % 4)[None])[0]


def log2(t: Tensor) -> Tensor:
    """float32 logarithm of positive normal numbers."""
    shifted = bits_of(t) - 0x3F400000
    v = from_bits((shifted & 0x007FFFFF) + 0x3F400000) - 1.0
    return fma(_horner(_LOG2, v), v, (shifted >> 23).float())


def power(x: Tensor, g: Tensor) -> Tensor:
    """float32 ``x^g`` for ``x >= 0``, with ``0^g = 0``."""
    z = f32(0.693147181) * (g * log2(more(x, f32(1e-30))))
    return torch.where(x > 0.0, exp(less(more(z, f32(-80.0)), f32(80.0))), f32(0.0))


def normal(word: Tensor) -> Tensor:
    """float32 standard normals of 32-bit words: the sign bit and the two-sided tail probability."""
    q = ((word & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    x = 1.0 - q
    t = q * (2.0 - q)
    w = more(-log2(t), f32(0.0))
    root = w.double().sqrt().float()  # torch's own float32 sqrt may be one ulp off
    z = torch.where(w < 7.0, _horner(_CENTRE, w - 3.5), _horner(_TAIL, root - 4.0)) * x
    return from_bits(bits_of(z) ^ word & 0x80000000)


def noise(start: Tensor, increment: Tensor, pulse: Tensor) -> Tensor:
    """float32 cycle-to-cycle noise of pulse number ``pulse`` of a cell and block (`PulseNoise` in csrc/math.h).

    The state is reached by a jump, ``s_n = M^(n+1) s_0 + (M^n + ... + 1) (increment | 1)``; its top bit is a sign, the next
    12 choose one of 4096 equally likely magnitudes, scaled to unit variance.
    """
    powers, sums = [1], [0]
    for _ in range(int(pulse.max()) + 1 if pulse.numel() else 0):
        sums.append((sums[-1] * _MULTIPLIER + 1) & _MASK)
        powers.append(powers[-1] * _MULTIPLIER & _MASK)
    jump = (torch.tensor(powers)[pulse + 1], torch.tensor(sums)[pulse + 1])
    state = (_low(jump[0], start) + _low(jump[1], increment | 1)) & _MASK
    level = f32(1.0000805) * normal((state >> 19 & 4095) << 19 | 1 << 18)
    return torch.where(state >> 31 != 0, -level, level)


def _low(a: Tensor, b: Tensor) -> Tensor:
    """The low 32 bits of products of 32-bit numbers, without passing 2^63."""
    return (a * (b & 0xFFFF) + ((a * (b >> 16) & _MASK) << 16)) & _MASK


def uniform(word: Tensor) -> Tensor:
    """float32 uniforms in [0, 1) with 24 bits."""
    return (word >> 8).float() * 2.0**-24


def exp(z: Tensor) -> Tensor:
    """float32 exponential for ``|z| <= 87``."""
    n = fma(z, f32(1.44269504), torch.where(z < 0, f32(-0.5), f32(0.5))).trunc()
    f = fma(n, f32(2.12194440e-4), fma(n, f32(-0.693359375), z))
    p = fma(_horner(_EXP, f), f * f, f) + 1.0
    return p * from_bits((n.long() + 127) << 23)


def on_grid(p: Tensor, res: float, words: Tensor | None) -> Tensor:
    """float32 p as a multiple of ``res`` (0: as it is): the nearest, halves to even, or with ``words`` a random neighbour."""
    if res == 0:
        return p
    steps = less(p, f32(2.0)) / f32(res)
    level = steps.round() if words is None else steps.trunc() + (uniform(words) < steps - steps.trunc())
    return level * f32(res)


def bernoulli(key: int, p: Tensor, slots: int, sample: int, step: int, purpose: int, array: int) -> Tensor:
    """``[slots, elements]`` booleans: slot t of element j fires with probability p[j], at most 1 - 2^-32."""
    pieces = [
        _bernoulli(key, p, min(slots - begin, 32), sample, step, counter3(purpose, array, begin // 32))
        for begin in range(0, slots, 32)
    ]
    return torch.cat(pieces)


def _bernoulli(key: int, p: Tensor, slots: int, sample: int, step: int, c3: int) -> Tensor:
    """At most 32 slots, one word of each element."""
    threshold = torch.where(p < 1.0, (p * 2.0**32).double(), _MASK).long()
    elements = torch.arange(len(p))
    lane = torch.arange(slots)[:, None]
    fired = torch.zeros(slots, len(p), dtype=torch.bool)
    if slots <= DIRECT_SLOTS:
        for slot in range(slots):
            fired[slot] = element_words(key, elements, sample * 64 + slot, step, c3) < threshold
        return fired
    undecided = torch.ones_like(fired)
    for plane in range(32):  # most significant bit of the uniform first
        random = (element_words(key, elements, sample * 64 + plane, step, c3) >> lane & 1).bool()
        bit = (threshold >> (31 - plane) & 1).bool()
        fired |= undecided & bit & ~random
        undecided &= bit == random
        if not undecided.any():
            break
    return fired
