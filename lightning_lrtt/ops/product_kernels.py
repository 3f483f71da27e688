"""A layer's operands under autocast, each in one pass: the weight that it reads, and x with its product by B."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt.ops import schema
from lightning_lrtt.ops.kernels import _ELEMENT_TYPES, _run, _same_device


def merge(c: Tensor, a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    _same_device("merge", c, a=a, b=b)
    (d, k), r = c.shape, a.shape[1]
    floats = all(t.dtype == torch.float32 and t.is_contiguous() for t in (c, a, b)) and c.numel() > 0
    whole = k % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in (c, b))
    if not (c.is_cuda and floats and whole and dtype in _ELEMENT_TYPES and r <= 32):
        a_t = a.t().to(dtype, copy=True, memory_format=torch.contiguous_format)
        return torch.addmm(c, a, b, alpha=alpha).to(dtype), a_t, b.to(dtype, copy=True)
    w, a_t, b_out = (torch.empty(shape, dtype=dtype, device=c.device) for shape in ((d, k), (r, d), (r, k)))
    pointers = (t.data_ptr() for t in (c, a, b, w, a_t, b_out))
    _run(c, "merge", *pointers, d, k, r, alpha, _ELEMENT_TYPES[dtype])
    return w, a_t, b_out


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
    schema.library.impl("merge", merge, _key)
    schema.library.impl("project_", project_, _key)
