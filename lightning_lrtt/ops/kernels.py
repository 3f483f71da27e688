"""Hands tensors to the compiled core: pointers, sizes and a thread count or a CUDA stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lrtt import _C
from lightning_lrtt._compiled import build_info
from lightning_lrtt.ops import schema

_ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # ElementType of csrc/jobs.h
MAX_SAMPLES = 2**26  # the random counter holds 26 bits of sample index (csrc/math.h)


def _contiguous(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype, size: int | None = None) -> int:
    """Pointer of a tensor that a kernel writes or reads as it lies in memory."""
    if size is not None and tensor.numel() != size:
        raise ValueError(f"lrtt::{op}: {name} must have {size} elements, got {tensor.numel()}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(t).removeprefix("torch.") for t in dtypes)
        raise TypeError(f"lrtt::{op}: {name} must be {allowed}, got {tensor.dtype}; cast it, or keep this tile digital")
    if not tensor.is_contiguous():
        raise ValueError(f"lrtt::{op}: {name} must be contiguous, got strides {tensor.stride()}; call .contiguous()")
    return tensor.data_ptr()


def _state(op: str, tensor: Tensor) -> int:
    return _contiguous(op, "state", tensor, torch.int64, size=schema.STATE_SIZE)


def _counts(op: str, tensor: Tensor) -> int:
    return _contiguous(op, "counts", tensor, torch.int64, size=len(schema.COUNTS))


def _hyper(op: str, tensor: Tensor) -> int:
    if not tensor.is_cpu:  # it is read while the call is parsed
        raise ValueError(f"lrtt::{op}: hyper must be on the CPU, got {tensor.device}; use config.pack(k) as it is")
    return _contiguous(op, "hyper", tensor, torch.float64, size=schema.HYPER_SIZE)


def _operand(tensor: Tensor) -> Tensor:
    """As the kernels read it; widening bf16 and fp16 to float32 is exact, so where it happens does not change a bit."""
    return tensor if tensor.is_cuda and tensor.dtype in _ELEMENT_TYPES else tensor.float()


def _same_device(op: str, owner: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != owner.device:
            raise ValueError(
                f"lrtt::{op}: {name} must be on the tile's device {owner.device}, got {tensor.device}; "
                "move the module with .to(device)"
            )


def _require_cuda(tensor: Tensor) -> None:
    if not build_info()["with_cuda"]:
        raise RuntimeError(
            f"lightning_lrtt: got a tensor on {tensor.device}, but this build has CPU kernels only; reinstall with nvcc on "
            "PATH and LRTT_CUDA=ON (LRTT_CUDA=ON pip install --force-reinstall --no-deps .)"
        )


def _run(owner: Tensor, op: str, *args: Any) -> None:
    """Call a kernel where ``owner`` lives: on up to ``torch.get_num_threads()`` threads, or on the current stream.

    A CUDA launch allocates nothing of its own and never synchronises, so it can be captured.
    """
    if not owner.is_cuda:
        getattr(_C, f"{op}_cpu")(*args, torch.get_num_threads())
        return
    _require_cuda(owner)
    with torch.cuda.device(owner.device):
        getattr(_C, f"{op}_cuda")(*args, torch.cuda.current_stream(owner.device).cuda_stream)


def _run_jobs(owner: Tensor, op: str, jobs: list[tuple[Any, ...]], *args: Any) -> None:
    """Call a kernel on a list of jobs with scratch memory from torch's allocator."""
    if not jobs:
        return
    if owner.is_cuda:
        _require_cuda(owner)
    size = getattr(_C, f"{op}_{'cuda' if owner.is_cuda else 'cpu'}_bytes")(jobs)
    scratch = torch.empty(size, dtype=torch.uint8, device=owner.device)
    _run(owner, op, jobs, *args, scratch.data_ptr())


class _CellsList:
    """Deals out the optional ``cells`` of an operator to the arrays that need them."""

    def __init__(self, op: str, cells: list[Tensor] | None) -> None:
        self.op, self.left, self.given = op, iter(cells or ()), len(cells or ())
        self.taken = 0

    def pointer(self, hyper: Tensor, array: int, w: Tensor) -> int:
        """Of the cells of ``array``; 0 where w is all that they hold."""
        planes = schema.planes(hyper, array)
        if not planes:
            return 0
        self.taken += 1
        cells = next(self.left, None)
        if cells is None:
            raise ValueError(
                f"lrtt::{self.op}: cells must have a tensor {[planes, *w.shape]} for array {array}, whose device "
                f"has {'pairs' if planes == 2 else 'write noise'}, got {self.given} tensors; pass TileModule.cells"
            )
        _same_device(self.op, w, cells=cells)
        if tuple(cells.shape) != (planes, *w.shape):
            raise ValueError(f"lrtt::{self.op}: cells must be {[planes, *w.shape]}, got {list(cells.shape)}")
        return _contiguous(self.op, "cells", cells, torch.float32)

    def finish(self) -> None:
        """Refuse what no array has asked for."""
        if self.given > self.taken:
            raise ValueError(
                f"lrtt::{self.op}: cells must be as many as arrays that need them, {self.taken}, got {self.given}"
            )


def pulsed_update_(
    w: list[Tensor],
    x: list[Tensor],
    d: list[Tensor],
    eta: list[Tensor],
    state: list[Tensor],
    counts: list[Tensor],
    hyper: list[Tensor],
    array: list[int],
    first_sample: list[int],
    cells: list[Tensor] | None = None,
    x_top: list[Tensor] | None = None,
    d_top: list[Tensor] | None = None,
) -> None:
    op = "pulsed_update_"
    jobs, keep, held = [], [], _CellsList("pulsed_update_", cells)
    tops = [given or [schema.ABSENT] * len(w) for given in (x_top, d_top)]
    for w_, x_, d_, eta_, state_, counts_, hyper_, array_, first, *top in zip(
        w, x, d, eta, state, counts, hyper, array, first_sample, *tops, strict=True
    ):
        _same_device(op, w[0], w=w_, x=x_, d=d_, eta=eta_, state=state_, counts=counts_)
        rows, columns = w_.shape
        if x_.dim() != 2 or d_.dim() != 2 or x_.shape != (d_.shape[0], columns) or d_.shape[1] != rows:
            raise ValueError(
                f"lrtt::{op}: x must be [N, {columns}] and d [N, {rows}] for w {list(w_.shape)}, got x "
                f"{list(x_.shape)}, d {list(d_.shape)}"
            )
        if first < 0 or first % schema.BLOCK_SAMPLES or first + x_.shape[0] > MAX_SAMPLES:
            raise ValueError(
                f"lrtt::{op}: first_sample must be a multiple of {schema.BLOCK_SAMPLES} and a step at most "
                f"{MAX_SAMPLES} samples, got first_sample {first} and {x_.shape[0]} samples"
            )
        x_, d_ = _operand(x_), _operand(d_)
        keep += [x_, d_]
        jobs.append(
            (
                _contiguous(op, "w", w_, torch.float32),
                rows,
                columns,
                x_.data_ptr(),
                *x_.stride(),
                _ELEMENT_TYPES[x_.dtype],
                d_.data_ptr(),
                *d_.stride(),
                _ELEMENT_TYPES[d_.dtype],
                x_.shape[0],
                first,
                _contiguous(op, "eta", eta_, torch.float32),
                _state(op, state_),
                _counts(op, counts_),
                _hyper(op, hyper_),
                array_,
                held.pointer(hyper_, array_, w_),
                *(_top(op, t, x_) for t in top),
            )
        )
    held.finish()
    if jobs:
        _run_jobs(w[0], "pulsed_update", jobs)


def _top(op: str, top: Tensor, x: Tensor) -> int:
    if top.numel() == 0:
        return 0
    if top.shape != (x.shape[0],) or top.dtype != torch.int32 or top.device != x.device or not top.is_contiguous():
        raise ValueError(
            f"lrtt::{op}: x_top and d_top must be int32 [{x.shape[0]}] on {x.device}, got {top.dtype} {list(top.shape)} on "
            f"{top.device}; leave them out, or take what project_ returns"
        )
    return top.data_ptr()


def _tile_jobs(
    op: str,
    a: list[Tensor],
    b: list[Tensor],
    c: Sequence[Tensor | None],
    state: list[Tensor],
    counts: Sequence[Tensor | None],
    hyper: list[Tensor],
    samples: Sequence[int],
    cells: list[Tensor] | None,
) -> list[tuple[Any, ...]]:
    jobs, held = [], _CellsList(op, cells)
    for a_, b_, c_, state_, counts_, hyper_, n in zip(a, b, c, state, counts, hyper, samples, strict=True):
        dtypes = (torch.float32, torch.float64)
        (d, r), k = a_.shape, b_.shape[1]
        _same_device(op, a[0], A=a_, B=b_, state=state_)
        hyper_pointer = _hyper(op, hyper_)
        if a_.dtype == torch.float64 and any(hyper_[i] for i in schema.DEVICE_KINDS):
            raise TypeError(
                f"lrtt::{op}: A must be float32 on devices, got {a_.dtype}; cast the tile, or keep it digital"
            )
        if counts_ is not None:
            _same_device(op, a_, counts=counts_)
        if c_ is not None:
            _same_device(op, a_, C=c_)
            if c_.dtype != a_.dtype or c_.shape != (d, k):
                raise ValueError(f"lrtt::{op}: C must be {[d, k]} {a_.dtype}, got {list(c_.shape)} {c_.dtype}")
        if b_.dtype != a_.dtype or b_.shape[0] != r:
            raise ValueError(f"lrtt::{op}: B must be [{r}, k] {a_.dtype}, got {list(b_.shape)} {b_.dtype}")
        jobs.append(
            (
                _contiguous(op, "A", a_, *dtypes),
                _contiguous(op, "B", b_, *dtypes),
                0 if c_ is None else _contiguous(op, "C", c_, *dtypes),
                d,
                k,
                r,
                a_.dtype == torch.float64,
                n,
                _state(op, state_),
                0 if counts_ is None else _counts(op, counts_),
                hyper_pointer,
                held.pointer(hyper_, schema.A, a_),
                held.pointer(hyper_, schema.B, b_),
                0 if c_ is None else held.pointer(hyper_, schema.C, c_),
            )
        )
    held.finish()
    return jobs


def transfer_(
    a: list[Tensor],
    b: list[Tensor],
    c: list[Tensor],
    state: list[Tensor],
    counts: list[Tensor],
    hyper: list[Tensor],
    samples: list[int],
    force: bool,
    cells: list[Tensor] | None = None,
) -> None:
    jobs = _tile_jobs("transfer_", a, b, c, state, counts, hyper, samples, cells)
    if jobs:
        _run_jobs(a[0], "transfer", jobs, force)


def reinit_(
    a: list[Tensor], b: list[Tensor], state: list[Tensor], hyper: list[Tensor], cells: list[Tensor] | None = None
) -> None:
    nothing: list[Tensor | None] = [None] * len(a)
    jobs = _tile_jobs("reinit_", a, b, nothing, state, nothing, hyper, [0] * len(a), cells)
    if jobs:
        _run_jobs(a[0], "reinit", jobs)


def digital_update_(
    w: list[Tensor], grad: list[Tensor], lr: list[Tensor], state: list[Tensor], counts: list[Tensor], scale: list[float]
) -> None:
    op = "digital_update_"
    jobs, keep = [], []
    for w_, g, lr_, state_, counts_, s in zip(w, grad, lr, state, counts, scale, strict=True):
        _same_device(op, w[0], w=w_, grad=g, lr=lr_, state=state_, counts=counts_)
        if g.shape != w_.shape or g.dtype != w_.dtype:
            raise ValueError(f"lrtt::{op}: grad must be {list(w_.shape)} {w_.dtype}, got {list(g.shape)} {g.dtype}")
        g = g.contiguous()
        keep.append(g)
        jobs.append(
            (
                _contiguous(op, "w", w_, torch.float32, torch.float64),
                g.data_ptr(),
                w_.numel(),
                w_.dtype == torch.float64,
                s,
                _contiguous(op, "lr", lr_, torch.float64),
                _state(op, state_),
                _counts(op, counts_),
            )
        )
    if jobs:
        _run_jobs(w[0], "digital_update", jobs)


def pulse_scale_(
    eta: list[Tensor], grad: list[Tensor], first: list[Tensor], lr: list[Tensor], scale: list[float]
) -> None:
    op = "pulse_scale_"
    jobs, keep = [], []
    for eta_, g, f, lr_, s in zip(eta, grad, first, lr, scale, strict=True):
        _same_device(op, eta[0], eta=eta_, grad=g, first=f, lr=lr_)
        if g.shape != f.shape:
            raise ValueError(f"lrtt::{op}: grad and first must have one shape, got {list(g.shape)} and {list(f.shape)}")
        g, f = g.contiguous(), f.contiguous()
        keep += [g, f]
        jobs.append(
            (
                _contiguous(op, "eta", eta_, torch.float32),
                _contiguous(op, "grad", g, torch.float32),
                _contiguous(op, "first", f, torch.float32),
                g.numel(),
                s,
                _contiguous(op, "lr", lr_, torch.float64),
            )
        )
    if jobs:
        _run_jobs(eta[0], "pulse_scale", jobs)


def _cells_job(op: str, state: Tensor, hyper: Tensor, array: int, rows: int, columns: int) -> tuple[int, ...]:
    pointers = _state(op, state), _hyper(op, hyper)
    if not hyper[schema.DEVICE_KINDS[array & ~schema.MINUS == schema.C]]:
        raise ValueError(f"lrtt::{op}: array {array} has no device, so it has no cells; give the config one")
    return *pointers, array, rows, columns


def _held_job(op: str, w: Tensor, state: Tensor, hyper: Tensor, array: int, held: _CellsList) -> tuple[int, ...]:
    _same_device(op, w, state=state)
    job = _cells_job(op, state, hyper, array, *w.shape)
    return *job, _contiguous(op, "w", w, torch.float32), held.pointer(hyper, array, w)


def relax_(
    w: list[Tensor], state: list[Tensor], hyper: list[Tensor], array: list[int], cells: list[Tensor] | None = None
) -> None:
    op = "relax_"
    jobs, held = [], _CellsList("relax_", cells)
    for w_, state_, hyper_, array_ in zip(w, state, hyper, array, strict=True):
        _same_device(op, w[0], w=w_)
        jobs.append(_held_job(op, w_, state_, hyper_, array_, held))
    held.finish()
    if jobs:
        _run_jobs(w[0], "relax", jobs)


def draw_cells(state: Tensor, hyper: Tensor, array: int, rows: int, columns: int) -> Tensor:
    job = _cells_job("draw_cells", state, hyper, array, rows, columns)
    out = torch.empty((schema.CELL_NUMBERS, rows, columns), dtype=torch.float32, device=state.device)
    _run(state, "draw_cells", (*job, 0, 0), out.data_ptr())
    return out


def clip_(
    w: Tensor, state: Tensor, hyper: Tensor, array: int, write: bool, cells: list[Tensor] | None = None
) -> Tensor:
    held = _CellsList("clip_", cells)
    job = _held_job("clip_", w, state, hyper, array, held)
    held.finish()
    count = torch.zeros((), dtype=torch.int64, device=w.device)
    _run(w, "clip", job, write, count.data_ptr())
    return count


def reset_cells_(
    w: Tensor,
    state: Tensor,
    hyper: Tensor,
    array: int,
    first: int,
    last: int,
    share: float,
    number: int,
    cells: list[Tensor] | None = None,
) -> None:
    op = "reset_cells_"
    held = _CellsList(op, cells)
    job = _held_job(op, w, state, hyper, array, held)
    held.finish()
    if not 0 <= first <= last <= w.shape[1]:
        raise ValueError(f"lrtt::{op}: first and last must be columns of w {list(w.shape)}, got {first} and {last}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"lrtt::{op}: share must be >= 0 and <= 1, got {share}")
    if not 0 <= number < 2**32:
        raise ValueError(f"lrtt::{op}: number must be >= 0 and < 2**32, got {number}")
    _run(w, "reset_cells", job, (first, last, share, number))


_KERNELS: tuple[Callable[..., Any], ...] = (
    pulsed_update_,
    transfer_,
    reinit_,
    digital_update_,
    pulse_scale_,
    relax_,
    draw_cells,
    clip_,
    reset_cells_,
)
for _kernel in _KERNELS:
    for _key in ("CPU", "CUDA"):
        schema.library.impl(_kernel.__name__, _kernel, _key)
