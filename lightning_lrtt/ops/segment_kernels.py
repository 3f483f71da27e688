"""Sums of segments along a tree."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt import _C
from lightning_lrtt.ops import schema
from lightning_lrtt.ops.kernels import _contiguous, _require_cuda, _run, _same_device


def segment_sum_(
    out: list[Tensor],
    slots: list[Tensor],
    weights: Tensor,
    scale: Tensor,
    stats: Tensor,
    program: list[int],
    redo: bool,
) -> None:
    op, steps = "segment_sum_", len(program)
    nodes = _check_program(op, program)
    if len(out) % nodes or len(slots) * nodes != len(out) * steps:
        raise ValueError(
            f"lrtt::{op}: out must hold {nodes} nodes and slots {steps} segments of each parameter, got {len(out)} "
            f"and {len(slots)}"
        )
    if not out:
        return
    _same_device(op, out[0], weights=weights, scale=scale, stats=stats)
    jobs = []
    index = out[0].get_device()  # -1: the CPU
    for p in range(len(out) // nodes):
        first = out[p * nodes]
        size, dtype = first.numel(), first.dtype
        _contiguous(op, "out", first, torch.float32, torch.float64)
        pointers: tuple[list[int], list[int]] = ([], [])
        for tensors, to in (
            (slots[p * steps : (p + 1) * steps], pointers[0]),
            (out[p * nodes : (p + 1) * nodes], pointers[1]),
        ):
            for t in tensors:  # hundreds a step: one look each at what is right
                if t.numel() == size and t.dtype is dtype and t.is_contiguous() and t.get_device() == index:
                    to.append(t.data_ptr())
                elif t.numel() or to is pointers[1]:
                    name = "slots" if to is pointers[0] else "out"
                    _same_device(op, out[0], **{name: t})
                    to.append(_contiguous(op, name, t, dtype, size=size))
                else:
                    to.append(0)
        jobs.append((*pointers, size, dtype == torch.float64))
    arguments = (
        jobs,
        [(step >> 1, step & 1) for step in program],
        _contiguous(op, "weights", weights, torch.float64, size=steps),
        _contiguous(op, "scale", scale, torch.float64, size=1),
        _contiguous(op, "stats", stats, torch.float64, size=2 * steps) if stats.numel() else 0,
        redo,
    )
    owner = out[0]
    if owner.is_cuda:
        _require_cuda(owner)
    bytes_ = 0
    if owner.is_cuda or stats.numel():
        bytes_ = getattr(_C, f"segment_sum_{'cuda' if owner.is_cuda else 'cpu'}_bytes")(*arguments)
    scratch = torch.empty(bytes_, dtype=torch.uint8, device=owner.device)
    _run(owner, "segment_sum", *arguments, scratch.data_ptr())


def _check_program(op: str, program: list[int]) -> int:
    """The number of nodes that a program hands out, once it is known to be one."""
    depth = nodes = 0
    for step in program:
        depth += 1
        if depth > schema.SEGMENT_DEPTH:
            break
        depth -= step >> 1
        if step < 0 or depth < 1:
            break
        if step & 1:
            depth, nodes = depth - 1, nodes + 1
            if depth:
                break
    else:
        if nodes and not depth:
            return nodes
    raise ValueError(
        f"lrtt::{op}: program must push each segment, add at most what is there and hand out every node (see "
        f"strategies/tree.py), got {program}"
    )


for _key in ("CPU", "CUDA"):
    schema.library.impl("segment_sum_", segment_sum_, _key)
