"""Random numbers of a segment: a function of (seed, purpose, step, segment), whoever computes it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

TRAIN, DATA, ORDER, TEST = 1, 2, 3, 4  # purposes

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def key(*words: int) -> int:
    """63 bits from integers of up to 64 bits (splitmix64's finaliser, chained).

    Example:
        >>> key(0, TRAIN, 5, 3) != key(0, TRAIN, 3, 5)
        True
    """
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seed_all(value: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of ``device``, NumPy's and Python's."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """What is drawn or seeded inside leaves the global generators as they were."""
    saved = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.default_generators[_index(device)] if device.type == "cuda" else None
    saved_cuda = cuda.get_state() if cuda is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        np.random.set_state(saved[1])
        random.setstate(saved[2])
        if cuda is not None and saved_cuda is not None:
            cuda.set_state(saved_cuda)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
