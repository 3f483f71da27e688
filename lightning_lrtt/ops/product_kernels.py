"""The sum that an input gradient takes on from its factors while it is widened."""

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


for _key in ("CPU", "CUDA"):
    schema.library.impl("add_product", add_product, _key)
