"""Decoding raw blocks into existing memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lrtt.weights._types import TensorType, can_decode, ggml_values, type_of


def dequantize_into(
    out: Tensor, blocks: Tensor | Any, type: TensorType | str | int, rows: Tensor | None = None
) -> Tensor:
    """Decode GGML blocks into ``out``, without a copy of the decoded values where ``out`` is float32 or bfloat16.

    The values are those of ``gguf.quants`` to the bit, in bfloat16 rounded to nearest. F32, F16, BF16, Q4_0, Q4_1,
    Q5_0, Q5_1, Q8_0, Q2_K to Q6_K and MXFP4 are decoded by the compiled core on up to ``torch.get_num_threads()``
    threads, or on the device: then the raw blocks are uploaded, which is 2 to 14 times less than the values. Other
    types go through ``gguf.quants``.

    Args:
        out: ``[rows, columns]``, or any contiguous tensor, which counts as one row; any floating dtype, any device.
        blocks: The raw bytes in row order: uint8 tensor (on the CPU or on ``out``'s device), or any buffer.
        type: GGML's name or number, or a `TensorType`.
        rows: Decode row i to row ``rows[i]`` of ``out`` (int64, each row at most once). None: in order.

    Returns:
        ``out``.

    Raises:
        ValueError: If sizes do not fit, ``out`` has no memory, or nothing decodes the type.

    Example:
        >>> import torch
        >>> block = torch.tensor([0x00, 0x3C] + [0x98] * 16, dtype=torch.uint8)  # d = 1, low nibbles 8, high nibbles 9
        >>> dequantize_into(torch.empty(1, 32), block, "Q4_0").unique()
        tensor([0., 1.])
    """
    kind = type_of(type)
    if out.is_meta:
        raise ValueError("dequantize_into: out must have memory, got a tensor on the meta device")
    if not isinstance(blocks, Tensor):
        view = np.frombuffer(blocks, np.uint8)
        blocks = torch.from_numpy(view if view.flags.writeable else view.copy())
    matrix = out if out.dim() == 2 else out.view(1, -1) if rows is None else out.view(out.shape[0], -1)
    count = matrix.shape[0] if rows is None else rows.numel()
    if matrix.shape[1] % kind.block or blocks.numel() != count * (matrix.shape[1] // kind.block) * kind.width:
        raise ValueError(
            f"dequantize_into: blocks must be the {kind} blocks of {count} rows of {matrix.shape[1]}, got "
            f"{blocks.numel()} bytes"
        )
    if not can_decode(kind):
        raise ValueError(
            f"dequantize_into: type must be one that can be decoded, got {kind}, for which gguf.quants has no decoder"
        )
    if rows is not None:
        rows = rows.to(out.device)
    if kind.compiled and matrix.dtype in (torch.float32, torch.bfloat16) and matrix.stride(1) == 1:
        torch.ops.lrtt.dequantize_(matrix, _upload(blocks, out.device), kind.ggml, rows)
        return out
    values = _values(kind, blocks, count, matrix.shape[1], out.device)
    if rows is None:
        matrix.copy_(values)
    else:
        matrix.index_copy_(0, rows, values.to(matrix))
    return out


def _upload(blocks: Tensor, device: torch.device) -> Tensor:
    return blocks.to(device, non_blocking=blocks.is_cpu and blocks.is_pinned()) if device.type != "cpu" else blocks


def _values(kind: TensorType, blocks: Tensor, count: int, columns: int, device: torch.device) -> Tensor:
    """Decoded values in memory of their own, on ``device`` or the CPU."""
    if kind.compiled:
        values = torch.empty(count, columns, device=device)
        torch.ops.lrtt.dequantize_(values, _upload(blocks, device), kind.ggml, None)
        return values
    if kind.plain is not None:
        return blocks.contiguous().view(kind.plain).view(count, columns)
    decoded = ggml_values(blocks.cpu().numpy().reshape(count, -1), kind)
    return torch.from_numpy(np.ascontiguousarray(decoded, dtype=np.float32))
