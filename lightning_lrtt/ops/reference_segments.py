"""Sums of segments in plain PyTorch: the oracle of ``segment_sum_``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt._compiled import LAYOUT

BLOCK: int = LAYOUT["segment_block"]
LANES, FINAL_LANES = LAYOUT["segment_lanes"]


def segment_sum_(
    out: list[Tensor],
    slots: list[Tensor],
    weights: Tensor,
    scale: Tensor,
    stats: Tensor,
    program: list[int],
    redo: bool,
) -> None:
    """Arguments as ``torch.ops.lrtt.segment_sum_``."""
    if redo and bool((weights == 1).all()):
        return
    steps, nodes = len(program), sum(step & 1 for step in program)
    parameters = len(out) // nodes
    for p in range(parameters):
        like = out[p * nodes]
        values = [slot if slot.numel() else torch.zeros_like(like) for slot in slots[p * steps : (p + 1) * steps]]
        stack: list[Tensor] = []
        done = 0
        for value, weight, step in zip(values, weights.tolist(), program, strict=True):
            stack.append(value * torch.tensor(weight, dtype=value.dtype) if weight else torch.zeros_like(value))
            for _ in range(step >> 1):
                last = stack.pop()
                stack[-1] = stack[-1] + last
            if step & 1:
                out[p * nodes + done].copy_(stack.pop() * scale.to(like.dtype))
                done += 1
    if stats.numel():
        for s in range(steps):
            own = [slots[p * steps + s] for p in range(parameters)]
            stats[s, 0] = _square([out[p * nodes].numel() for p in range(parameters)], own)
            stats[s, 1] = float(any(not torch.isfinite(t).all() for t in own))


def _square(sizes: list[int], slots: list[Tensor]) -> Tensor:
    partials = []
    for size, slot in zip(sizes, slots, strict=True):
        padded = torch.zeros(-(-size // BLOCK) * BLOCK, dtype=torch.float64)
        if slot.numel():
            padded[:size] = slot.reshape(-1).double().square()
        partials += [_lanes(block, LANES) for block in padded.view(-1, BLOCK)]
    return _lanes(torch.stack(partials) if partials else torch.zeros(0, dtype=torch.float64), FINAL_LANES)


def _lanes(values: Tensor, lanes: int) -> Tensor:
    """Lane l adds the elements l, l + lanes, ... in order; then the lanes are added along a tree."""
    padded = torch.zeros(max(-(-len(values) // lanes), 1) * lanes, dtype=torch.float64)
    padded[: len(values)] = values
    total = torch.zeros(lanes, dtype=torch.float64)
    for row in padded.view(-1, lanes):
        total = total + row
    while len(total) > 1:
        half = len(total) // 2
        total = total[:half] + total[half:]
    return total[0]
