"""Windows of Hopfield networks: hands tensors to the compiled core, as `kernels` does."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_lrtt import _C
from lightning_lrtt._compiled import build_info
from lightning_lrtt.ops import schema
from lightning_lrtt.ops.kernels import _contiguous, _require_cuda, _run, _same_device

# Rho and Nudge of csrc/hopfield.h
RHO = {"tanh": 0, "sigmoid": 1, "hard_sigmoid": 2, "linear": 3}
NUDGE = {"free": 0, "solve": 1, "mse": 2, "cross_entropy": 3, "hold": 4}


@lru_cache(maxsize=64)
def _fits(odd: int, even: int, index: int) -> bool:
    with torch.cuda.device(index):
        return bool(_C.hopfield_fits_cuda(odd, even))


def hopfield_fits(matrix: Tensor) -> bool:
    """Whether `hopfield_window` is the fast way for couplings of this size ``[odd, even]`` where they are: a GPU must
    hold their weights in shared memory, a CPU must have fused multiply-add.
    """
    info = build_info()
    if matrix.is_cuda:
        return bool(info["with_cuda"]) and _fits(*matrix.shape, matrix.get_device())
    return matrix.is_cpu and info["cpu_instructions"] != "base"


def hopfield_window(
    matrix: Tensor,
    odd_drive: Tensor,
    even_drive: Tensor,
    odd: Tensor,
    even: Tensor,
    target: Tensor | None,
    beta: Tensor | None,
    steps: int,
    in_turn: bool,
    outputs: int,
    outputs_are_odd: bool,
    rho: int,
    output_rho: int,
    nudge: int,
) -> tuple[Tensor, Tensor]:
    op = "hopfield_window"
    _same_device(op, matrix, odd_drive=odd_drive, even_drive=even_drive, odd=odd, even=even)
    if matrix.dim() != 2:
        raise ValueError(f"lrtt::{op}: matrix must be [odd, even], got {list(matrix.shape)}")
    (width_odd, width_even), n = matrix.shape, odd.shape[0]
    for name, tensor, shape in (
        ("odd", odd, (n, width_odd)),
        ("odd_drive", odd_drive, (n, width_odd)),
        ("even", even, (n, width_even)),
        ("even_drive", even_drive, (width_even,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"lrtt::{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if steps < 0:
        raise ValueError(f"lrtt::{op}: steps must be at least 0, got {steps}")
    if not 1 <= outputs <= (width_odd if outputs_are_odd else width_even):
        raise ValueError(f"lrtt::{op}: outputs must be some of their group's states, got {outputs}")
    if rho not in RHO.values() or output_rho not in RHO.values() or nudge not in NUDGE.values():
        raise ValueError(
            f"lrtt::{op}: rho, output_rho and nudge must be of RHO and NUDGE, got {rho, output_rho, nudge}"
        )
    if (target is None) != (nudge == NUDGE["free"]) or (beta is None) != (nudge in (NUDGE["free"], NUDGE["hold"])):
        raise ValueError(f"lrtt::{op}: target and beta must be given as nudge {nudge} needs them")
    pointers = [_contiguous(op, "matrix", matrix, torch.float32)]
    pointers += [
        _contiguous(op, name, t, torch.float32) for name, t in (("odd_drive", odd_drive), ("even_drive", even_drive))
    ]
    pointers += [_contiguous(op, name, t, torch.float32) for name, t in (("odd", odd), ("even", even))]
    new, spare = (torch.empty_like(odd), torch.empty_like(even)), (torch.empty_like(odd), torch.empty_like(even))
    stride = 0
    if target is not None:
        _same_device(op, matrix, target=target)
    if beta is not None:
        _same_device(op, matrix, beta=beta)
        stride = 0 if beta.numel() == 1 else 1
        _contiguous(op, "beta", beta, torch.float32, size=n if stride else 1)
    if steps == 0:
        return odd.clone(), even.clone()
    job = (
        *pointers,
        *(t.data_ptr() for t in (*new, *spare)),
        0 if target is None else _contiguous(op, "target", target, torch.float32, size=n * outputs),
        0 if beta is None else beta.data_ptr(),
        stride,
        n,
        width_odd,
        width_even,
        steps,
        in_turn,
        outputs,
        outputs_are_odd,
        rho,
        output_rho,
        nudge,
    )
    if matrix.is_cuda:
        _require_cuda(matrix)
    size = getattr(_C, f"{op}_{'cuda' if matrix.is_cuda else 'cpu'}_bytes")(job)
    scratch = torch.empty(size, dtype=torch.uint8, device=matrix.device)
    _run(matrix, op, job, scratch.data_ptr())
    return new


for _key in ("CPU", "CUDA"):
    schema.library.impl("hopfield_window", hopfield_window, _key)
