"""Decoding of GGML blocks: hands tensors to the compiled core, as `kernels` does."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt import _C
from lightning_lrtt.ops import schema
from lightning_lrtt.ops.kernels import _contiguous, _run, _same_device

DECODERS: dict[int, tuple[int, int]] = _C.decoders()  # GGML type -> (elements, bytes) of a block


def dequantize_(out: Tensor, blocks: Tensor, type: int, rows: Tensor | None) -> None:
    op = "dequantize_"
    if type not in DECODERS:
        raise ValueError(f"lrtt::{op}: type must be one of {sorted(DECODERS)} (GGML's numbers), got {type}")
    if out.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"lrtt::{op}: out must be float32 or bfloat16, got {out.dtype}")
    if out.dim() != 2 or out.stride(1) != 1:
        raise ValueError(
            f"lrtt::{op}: out must be [rows, columns] with whole rows in memory, got shape {list(out.shape)} and "
            f"strides {out.stride()}"
        )
    size, width = DECODERS[type]
    count, rest = divmod(out.shape[1], size)
    if rest:
        raise ValueError(f"lrtt::{op}: out must have rows of whole blocks of {size}, got {out.shape[1]} columns")
    _same_device(op, out, blocks=blocks, **({} if rows is None else {"rows": rows}))
    n = out.shape[0] if rows is None else rows.numel()
    pointer = 0 if rows is None else _contiguous(op, "rows", rows, torch.int64)
    if rows is not None and not rows.is_cuda and n and not (int(rows.min()) >= 0 and int(rows.max()) < out.shape[0]):
        raise ValueError(
            f"lrtt::{op}: rows must be rows of out, 0 to {out.shape[0] - 1}, got {int(rows.min())} to {int(rows.max())}"
        )
    job = (
        type,
        out.dtype == torch.bfloat16,
        n,
        count,
        _contiguous(op, "blocks", blocks, torch.uint8, size=n * count * width),
        out.data_ptr(),
        out.stride(0),
        pointer,
    )
    if out.is_cuda and size == 1:  # no blocks: torch's own conversion
        plain = {4: torch.float32, 2: torch.float16 if type == 1 else torch.bfloat16}[width]
        values = blocks.view(plain).view(n, out.shape[1])
        if rows is None:
            out.copy_(values)
        else:
            out.index_copy_(0, rows, values.to(out.dtype))
        return
    _run(out, "dequantize", job)


for _key in ("CPU", "CUDA"):
    schema.library.impl("dequantize_", dequantize_, _key)
