"""What a layer on a tile computes around its matrix product: the weight that it reads, and products with its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt.ops import schema
from lightning_lrtt.ops.kernels import _ELEMENT_TYPES, _run, _same_device

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
    n, k = x.shape
    if not x.is_cuda or r > 16:
        return False
    if dtype == torch.float32:  # where the sums take less time than launches
        return x.dtype == dtype and n * k <= 2**16 and k <= 2**11
    return dtype in HALVES and x.dtype in (torch.float32, dtype) and k % 32 == 0


def project_(z: Tensor, x: Tensor, w: Tensor, narrow: Tensor | None) -> Tensor:
    _same_device("project_", z, x=x, w=w)
    (n, k), r, dtype = x.shape, w.shape[0], w.dtype
    served = projects(x, r, dtype) and z.dtype == dtype and w.is_contiguous() and z.stride(1) == x.stride(1) == 1
    if served and dtype == torch.float32 and narrow is None and z.is_contiguous():
        top = torch.empty(n, dtype=torch.int32, device=x.device)
        pointers = (t.data_ptr() for t in (x, w, z, top))
        _run(z, "small_project", *pointers, x.stride(0), n, k, r)
        return top
    rows = [x, w] if narrow is None else [x, w, narrow]
    whole = all(t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in rows)
    if not (served and whole and (x.dtype != dtype) == (narrow is not None)) or dtype == torch.float32:
        own = x if narrow is None else narrow.copy_(x)
        torch.mm(own, w.t(), out=z)
        return own.abs().amax(1).float().view(torch.int32)
    top = torch.empty(n, dtype=torch.int32, device=x.device)
    into = (0, 0) if narrow is None else (narrow.data_ptr(), narrow.stride(0))
    numbers = (n, x.stride(0), into[1], z.stride(0), k, r, narrow is not None, dtype == torch.bfloat16)
    _run(z, "project", x.data_ptr(), w.data_ptr(), into[0], z.data_ptr(), top.data_ptr(), *numbers)
    return top


def gathers(grad: Tensor, x: Tensor, z: Tensor, a: Tensor) -> bool:
    """Whether one kernel serves `factor_gradients` of these operands."""
    n, d = grad.shape
    floats = all(t.dtype == torch.float32 and t.is_cuda for t in (grad, x, z, a))
    small = 0 < n <= 256 and n * d <= 2**16 and max(d, x.shape[1]) <= 2**11 and z.shape[1] <= 16
    return floats and small and grad.stride(1) == x.stride(1) == 1 and z.is_contiguous() and a.t().is_contiguous()


def factor_gradients(grad: Tensor, x: Tensor, z: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _same_device("factor_gradients", grad, x=x, z=z, a=a)
    if not gathers(grad, x, z, a):
        dz = grad @ a
        top = grad.abs().amax(1).float().view(torch.int32)
        return dz, grad.t() @ z, dz.t() @ x, grad.sum(0), top
    (n, d), k, r = grad.shape, x.shape[1], z.shape[1]
    found = [grad.new_empty(shape) for shape in ((n, r), (d, r), (r, k), (d,))]
    top = torch.empty(n, dtype=torch.int32, device=grad.device)
    pointers = (t.data_ptr() for t in (grad, x, z, a, *found, top))
    _run(grad, "factor_gradients", *pointers, grad.stride(0), x.stride(0), n, d, k, r)
    return found[0], found[1], found[2], found[3], top


for _key in ("CPU", "CUDA"):
    schema.library.impl("merge", merge, _key)
    schema.library.impl("project_", project_, _key)
    schema.library.impl("factor_gradients", factor_gradients, _key)
