"""The random key of a tile."""

from __future__ import annotations

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def tile_key(seed: int, tile: int) -> int:
    """The 64-bit random key of tile number ``tile`` under ``seed``, as a signed int64 (splitmix64's finaliser)."""
    z = (seed + (tile + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
