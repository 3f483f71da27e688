"""Passes between float32 and half precision around the matrix products of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt.ops import schema
from lightning_lrtt.ops.kernels import _run, _same_device


def add_product(g: Tensor, z: Tensor, b: Tensor, alpha: float) -> Tensor:
    _same_device("add_product", g, z=z, b=b)
    (n, k), r = g.shape, z.shape[1]
    halves = g.dtype in (torch.bfloat16, torch.float16) and g.dtype == z.dtype == b.dtype
    whole = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (g, b)) and k % 4 == 0
    if not (g.is_cuda and halves and whole and z.is_contiguous() and r <= 32):  # the same sum in three passes
        return torch.addmm(g.float(), z.float(), b.float(), alpha=alpha)
    out = torch.empty((n, k), dtype=torch.float32, device=g.device)
    pointers = (t.data_ptr() for t in (g, z, b, out))
    _run(g, "add_product", *pointers, n, k, r, alpha, g.dtype == torch.bfloat16)
    return out


def narrow_rows_(out: Tensor, x: Tensor) -> None:
    _same_device("narrow_rows_", out, x=x)
    (n, k), stride = x.shape, out.stride(0)
    halves = x.dtype == torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
    whole = x.is_contiguous() and out.stride(1) == 1 and k % 8 == 0 and stride % 8 == 0
    if not (out.is_cuda and halves and whole and x.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0):
        out.copy_(x)
        return
    _run(out, "narrow_rows", x.data_ptr(), out.data_ptr(), n, stride, k, out.dtype == torch.bfloat16)


def projects(x: Tensor, r: int) -> bool:
    """Whether one kernel serves `project_` of x ``[n, k]`` and a factor of rank r in half precision."""
    return x.is_cuda and x.shape[1] % 32 == 0 and r <= 16


def project_(z: Tensor, x: Tensor, w: Tensor, narrow: Tensor | None) -> Tensor:
    _same_device("project_", z, x=x, w=w)
    (n, k), r, wide = x.shape, w.shape[0], narrow is not None
    halves = z.dtype == w.dtype in (torch.bfloat16, torch.float16) and x.dtype == (torch.float32 if wide else w.dtype)
    rows = [x, w] if narrow is None else [x, w, narrow]
    whole = all(t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in rows)
    if not (projects(x, r) and halves and whole and w.is_contiguous() and z.stride(1) == 1):
        own = x if narrow is None else narrow.copy_(x)
        torch.mm(own, w.t(), out=z)
        return own.abs().amax(1).float().view(torch.int32)
    top = torch.empty(n, dtype=torch.int32, device=x.device)
    into = (0, 0) if narrow is None else (narrow.data_ptr(), narrow.stride(0))
    numbers = (n, x.stride(0), into[1], z.stride(0), k, r, wide, w.dtype == torch.bfloat16)
    _run(z, "project", x.data_ptr(), w.data_ptr(), into[0], z.data_ptr(), top.data_ptr(), *numbers)
    return top


for _key in ("CPU", "CUDA"):
    schema.library.impl("project_", project_, _key)
    schema.library.impl("add_product", add_product, _key)
    schema.library.impl("narrow_rows_", narrow_rows_, _key)
