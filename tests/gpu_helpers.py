"""The same operands on the CPU and on the GPU."""

from __future__ import annotations

import pytest
import torch

from lightning_lrtt import build_info
from lightning_lrtt.ops import COUNTS, KEY, STATE_SIZE, STEP

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one"),
    pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only"),
]


def state_and_counts(key: int = 12345, step: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """A tile's state at some step, and fresh counters."""
    state = torch.zeros(STATE_SIZE, dtype=torch.int64)
    state[KEY], state[STEP] = key, step
    counts = torch.zeros(len(COUNTS), dtype=torch.int64)
    counts[COUNTS["first_bad_step"]] = -1
    return state, counts


def on_both(function, *tensors):
    """Run ``function`` on copies of the tensors on the CPU and on the GPU; return both sets of copies."""
    results = []
    for target in ("cpu", "cuda"):
        copies = [t.clone().to(target) for t in tensors]
        function(*copies)
        results.append([t.cpu() for t in copies])
    return results


def assert_same(results, names):
    """Bit equality; NaN never passes."""
    for name, cpu, gpu in zip(names, *results, strict=True):
        assert torch.equal(cpu, gpu), f"{name} differs: {(cpu != gpu).sum()} of {cpu.numel()}"
