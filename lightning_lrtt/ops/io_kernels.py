"""Converters of analog reads: hands tensors to the compiled core, as `kernels` does."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt.ops import schema
from lightning_lrtt.ops.kernels import _ELEMENT_TYPES, MAX_SAMPLES, _contiguous, _run, _same_device, _state

_MAX_ROUND = 30  # the scale is multiplied by 2^round


def _numbers(op: str, io: Tensor) -> int:
    if not io.is_cpu:  # read while the call is parsed
        raise ValueError(f"lrtt::{op}: io must be on the CPU, got {io.device}; use IOConfig.pack() as it is")
    return _contiguous(op, "io", io, torch.float64, size=schema.IO_SIZE)


def _where(op: str, rows: int, array: int, round: int, first_sample: int) -> None:
    if array not in (schema.A, schema.B, schema.C):
        raise ValueError(f"lrtt::{op}: array must be 0 (A), 1 (B) or 2 (C), got {array}")
    if not 0 <= round <= _MAX_ROUND:
        raise ValueError(f"lrtt::{op}: round must be between 0 and {_MAX_ROUND}, got {round}")
    if first_sample < 0 or first_sample + rows > MAX_SAMPLES:
        raise ValueError(
            f"lrtt::{op}: first_sample must be at least 0 and a read at most {MAX_SAMPLES} samples, got "
            f"first_sample {first_sample} and {rows} samples"
        )


def _flags(op: str, pending: Tensor | None, owner: Tensor, rows: int) -> int:
    if pending is None:
        return 0
    _same_device(op, owner, pending=pending)
    return _contiguous(op, "pending", pending, torch.int32, size=rows)


def io_ticket_(reads: Tensor, evaluation: bool) -> Tensor:
    ticket = torch.empty((), dtype=torch.int64, device=reads.device)
    _run(
        reads,
        "io_ticket",
        _contiguous("io_ticket_", "reads", reads, torch.int64, size=2),
        int(evaluation),
        ticket.data_ptr(),
    )
    return ticket


def io_input(
    x: Tensor,
    ticket: Tensor,
    state: Tensor,
    io: Tensor,
    array: int,
    round: int,
    first_sample: int,
    pending: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    op = "io_input"
    _same_device(op, x, ticket=ticket, state=state)
    if x.dim() != 2:
        raise ValueError(f"lrtt::{op}: x must be [N, k], got {list(x.shape)}")
    if dtype not in (_ELEMENT_TYPES if x.is_cuda else (torch.float32,)):
        raise TypeError(
            f"lrtt::{op}: dtype must be float32{', bfloat16 or float16' if x.is_cuda else ' on the CPU'}, got {dtype}"
        )
    (rows, k), n_state = x.shape, _state(op, state)
    _where(op, rows, array, round, first_sample)
    if not x.is_cuda or x.dtype not in _ELEMENT_TYPES:
        x = x.float()
    if x.stride(1) != 1 and k > 1:
        x = x.contiguous()
    u = torch.empty((rows, k), dtype=dtype, device=x.device)
    per = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    _run(
        x,
        op,
        (
            x.data_ptr(),
            x.stride(0),
            _ELEMENT_TYPES[x.dtype],
            _ELEMENT_TYPES[dtype],
            rows,
            first_sample,
            k,
            array,
            round,
            _contiguous(op, "ticket", ticket, torch.int64, size=1),
            n_state,
            _flags(op, pending, x, rows),
            u.data_ptr(),
            per.data_ptr(),
            _numbers(op, io),
        ),
    )
    return u, per


def io_product(u: Tensor, w: Tensor, pending: Tensor) -> Tensor:
    op = "io_product"
    _same_device(op, u, w=w, pending=pending)
    if u.dim() != 2 or w.dim() != 2 or u.shape[1] != w.shape[1]:
        raise ValueError(f"lrtt::{op}: u [N, k] and w [d, k] must agree, got {list(u.shape)} and {list(w.shape)}")
    (rows, k), d = u.shape, w.shape[0]
    flags = _flags(op, pending, u, rows)
    acc = torch.zeros((rows, d), dtype=torch.float32, device=u.device)
    if u.is_cuda:  # reads nothing back: blocks of samples that are all fine return at once
        pointers = _contiguous(op, "u", u, *_ELEMENT_TYPES), _contiguous(op, "w", w, torch.float32)
        _run(u, op, (pointers[0], _ELEMENT_TYPES[u.dtype], pointers[1], flags, acc.data_ptr(), rows, k, d))
        return acc
    clipped = pending.nonzero().squeeze(1)
    return acc.index_copy_(0, clipped, u[clipped] @ w.t())


def io_output_(
    y: Tensor,
    acc: Tensor,
    per: Tensor,
    ticket: Tensor,
    state: Tensor,
    io: Tensor,
    array: int,
    round: int,
    first_sample: int,
    pending: Tensor | None,
) -> Tensor:
    op = "io_output_"
    _same_device(op, y, acc=acc, per=per, ticket=ticket, state=state)
    if y.dim() != 2 or y.shape != acc.shape:
        raise ValueError(f"lrtt::{op}: y and acc must be [N, d], got {list(y.shape)} and {list(acc.shape)}")
    rows, d = y.shape
    _where(op, rows, array, round, first_sample)
    clipped = torch.empty(rows, dtype=torch.int32, device=y.device)
    _run(
        y,
        "io_output",
        (
            _contiguous(op, "y", y, torch.float32),
            _contiguous(op, "acc", acc, torch.float32),
            _contiguous(op, "per", per, torch.float32, size=2 * rows),
            rows,
            first_sample,
            d,
            array,
            round,
            _contiguous(op, "ticket", ticket, torch.int64, size=1),
            _state(op, state),
            _flags(op, pending, y, rows),
            clipped.data_ptr(),
            _numbers(op, io),
        ),
    )
    return clipped


for _kernel in (io_ticket_, io_input, io_product, io_output_):
    for _key in ("CPU", "CUDA"):
        schema.library.impl(_kernel.__name__, _kernel, _key)
