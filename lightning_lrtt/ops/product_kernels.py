"""What a layer on a tile computes around its matrix product: the weight that it reads, and products with its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt.ops import schema
from lightning_lrtt.ops.kernels import _ELEMENT_TYPES, _contiguous, _run, _same_device

HALVES = (torch.bfloat16, torch.float16)


def merge(c: Tensor, a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    _same_device("merge", c, a=a, b=b)
    (d, k), r = c.shape, a.shape[1]
    floats = all(t.dtype == torch.float32 and t.is_contiguous() for t in (c, a, b)) and c.numel() > 0
    whole = k % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in (c, b))
    served = whole and r <= 32 and d <= 2**20 and dtype in _ELEMENT_TYPES
    if not (c.is_cuda and floats and served):
        a_t = a.t().to(dtype, copy=True, memory_format=torch.contiguous_format)
        return torch.addmm(c, a, b, alpha=alpha).to(dtype), a_t, b.to(dtype, copy=True)
    w, a_t, b_out = (torch.empty(shape, dtype=dtype, device=c.device) for shape in ((d, k), (r, d), (r, k)))
    pointers = (t.data_ptr() for t in (c, a, b, w, a_t, b_out))
    _run(c, "merge", *pointers, d, k, r, alpha, _ELEMENT_TYPES[dtype])
    return w, a_t, b_out


def projects(x: Tensor, r: int, dtype: torch.dtype) -> bool:
    """Whether one kernel serves `project_` of x ``[n, k]`` and a factor of rank r in ``dtype``."""
    return x.is_cuda and r <= 16 and dtype in HALVES and x.dtype in (torch.float32, dtype) and x.shape[1] % 32 == 0


def project_(z: Tensor, x: Tensor, w: Tensor, narrow: Tensor | None) -> Tensor:
    _same_device("project_", z, x=x, w=w)
    schema.check_project(z, x, w)
    (n, k), r, dtype = x.shape, w.shape[0], w.dtype
    served = projects(x, r, dtype) and z.dtype == dtype and w.is_contiguous() and z.stride(1) == x.stride(1) == 1
    rows = [x, w] if narrow is None else [x, w, narrow]
    whole = all(t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in rows)
    if not (served and whole and (x.dtype != dtype) == (narrow is not None)):
        own = x if narrow is None else narrow.copy_(x)
        torch.mm(own, w.t(), out=z)
        return own.abs().amax(1).float().view(torch.int32)
    top = torch.empty(n, dtype=torch.int32, device=x.device)
    into = (0, 0) if narrow is None else (narrow.data_ptr(), narrow.stride(0))
    numbers = (n, x.stride(0), into[1], z.stride(0), k, r, narrow is not None, dtype == torch.bfloat16)
    _run(z, "project", x.data_ptr(), w.data_ptr(), into[0], z.data_ptr(), top.data_ptr(), *numbers)
    return top


_WIDEST, _MOST_ROWS, _HIGHEST_RANK, _MOST_WORK = 2**10, 2**8, 16, 2**29  # the first three: kernels.h


def is_small(x: Tensor, c: Tensor, r: int) -> bool:
    """Whether a pass of x, an input ``[..., k]`` or an output gradient ``[..., d]``, through a layer is one launch.

    Where it is, the pass takes less time than the several launches that it replaces (docs/performance.md).

    Args:
        x: The activation; whether its width is that of C is for the operators to say.
        c: C ``[d, k]``.
        r: Rank.
    """
    if not (x.is_cuda and x.dtype == c.dtype == torch.float32 and x.dim() > 0):
        return False
    n, widest = x.numel() // max(x.shape[-1], 1), max(c.shape)
    return 0 < n <= _MOST_ROWS and widest <= _WIDEST and r <= _HIGHEST_RANK and n * c.numel() * max(r, 8) <= _MOST_WORK


def _layer(op: str, c: Tensor, a: Tensor, b: Tensor, alpha: float) -> tuple[float, ...]:
    pointers = (_contiguous(op, name, t, torch.float32) for name, t in (("c", c), ("a", a), ("b", b)))
    return (*pointers, *c.shape, a.shape[1], alpha)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def small_forward(
    x: Tensor, c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device("small_forward", c, x=x, a=a, b=b, **({} if bias is None else {"bias": bias}))
    schema.check_small_forward(x, c, a, b, bias)
    rows, r = _rows(x), a.shape[1]
    if not is_small(x, c, r):
        z = x @ b.t()
        y = x @ c.t() + alpha * (z @ a.t())
        return y if bias is None else y + bias, z, rows.abs().amax(1).float().view(torch.int32)
    y, z = (x.new_empty((*x.shape[:-1], width)) for width in a.shape)
    top = torch.empty(rows.shape[0], dtype=torch.int32, device=x.device)
    own = 0 if bias is None else _contiguous("small_forward", "bias", bias, torch.float32)
    pointers = (rows.data_ptr(), own, y.data_ptr(), z.data_ptr(), top.data_ptr())
    _run(c, "small_forward", _layer("small_forward", c, a, b, alpha), *pointers, rows.stride(0), rows.shape[0])
    return y, z, top


def small_backward(
    grad: Tensor, x: Tensor, z: Tensor, c: Tensor, a: Tensor, b: Tensor, alpha: float, input_gradient: bool
) -> tuple[Tensor, ...]:
    _same_device("small_backward", c, grad=grad, x=x, z=z, a=a, b=b)
    schema.check_small_backward(grad, x, z, c, a, b)
    d_rows, x_rows = _rows(grad), _rows(x)
    if not (is_small(grad, c, a.shape[1]) and x.dtype == torch.float32):
        dz = grad @ a
        by_a, by_b = alpha * (d_rows.t() @ _rows(z)), alpha * (_rows(dz).t() @ x_rows)
        by_x = grad @ c + alpha * (dz @ b) if input_gradient else grad.new_empty(0)
        top = d_rows.abs().amax(1).float().view(torch.int32)
        return dz, by_a, by_b, by_a.clone(), by_b.clone(), d_rows.sum(0), by_x, top
    found = [grad.new_empty(shape) for shape in (z.shape, a.shape, b.shape, a.shape, b.shape, a.shape[:1])]
    found.append(grad.new_empty(x.shape if input_gradient else 0))
    top = torch.empty(d_rows.shape[0], dtype=torch.int32, device=grad.device)
    given = (d_rows.data_ptr(), x_rows.data_ptr(), _contiguous("small_backward", "z", z, torch.float32))
    pointers = (*given, *(t.data_ptr() for t in found))
    layer = _layer("small_backward", c, a, b, alpha)
    _run(c, "small_backward", layer, pointers, top.data_ptr(), d_rows.stride(0), x_rows.stride(0), d_rows.shape[0])
    return *found, top


for _key in ("CPU", "CUDA"):
    schema.library.impl("merge", merge, _key)
    schema.library.impl("project_", project_, _key)
    schema.library.impl("small_forward", small_forward, _key)
    schema.library.impl("small_backward", small_backward, _key)
