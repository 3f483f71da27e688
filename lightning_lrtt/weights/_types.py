"""Storage types of checkpoints: sizes of their blocks and how they are decoded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from lightning_lrtt.ops.weight_kernels import DECODERS

# Byte offsets of the half-precision scales in a block, for verify="values".
_HALF_SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "F16": (0,),
}
_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorType:
    """How a tensor is stored.

    Attributes:
        name: As GGML or safetensors calls it.
        block: Elements of a block; 1 for plain numbers.
        width: Bytes of a block.
        ggml: GGML's number, or -1.
    """

    name: str
    block: int
    width: int
    ggml: int = -1

    @property
    def plain(self) -> torch.dtype | None:
        """The torch dtype with the same bytes; None for blocks."""
        return _PLAIN.get(self.name)

    @property
    def compiled(self) -> bool:
        """Whether the core decodes it."""
        return self.ggml in DECODERS

    @property
    def half_scales(self) -> tuple[int, ...]:
        """Offsets in a block of scales in half precision."""
        return _HALF_SCALES.get(self.name, ())

    def __str__(self) -> str:
        return self.name


def gguf_library() -> Any:
    """The ``gguf`` package.

    Raises:
        ImportError: If it is not installed; the message says how.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "LazyCheckpoint: the package gguf must be installed for GGUF files, but it is not; "
            'pip install "lightning-lrtt[weights]"'
        ) from None
    return gguf


@functools.cache
def ggml_type(number: int) -> TensorType | None:
    """The type with GGML's number; None if the ``gguf`` library does not know it."""
    gguf = gguf_library()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        return None
    block, width = gguf.GGML_QUANT_SIZES[kind]
    return TensorType(kind.name, block, width, number)


@functools.cache
def safetensors_type(name: str) -> TensorType | None:
    """The type with safetensors' name; None if torch has no counterpart."""
    if name not in _PLAIN:
        return None
    numbers = {"F32": 0, "F16": 1, "BF16": 30}
    return TensorType(name, 1, _PLAIN[name].itemsize, numbers.get(name, -1))


@functools.cache
def type_of(kind: TensorType | str | int) -> TensorType:
    """The type of a name (``"Q4_0"``) or number.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(kind, TensorType):
        return kind
    if isinstance(kind, str):
        plain = safetensors_type(kind)
        if plain is not None:
            return plain
        members = gguf_library().GGMLQuantizationType.__members__
        found = ggml_type(int(members[kind])) if kind in members else None
    else:
        found = ggml_type(int(kind))
    if found is None:
        raise ValueError(f"dequantize_into: type must be one of GGML's types, got {kind!r}")
    return found


def ggml_values(raw: Any, kind: TensorType) -> Any:
    """What ``gguf.quants`` makes of raw bytes ``[rows, bytes]``."""
    gguf = gguf_library()
    return gguf.dequantize(raw, gguf.GGMLQuantizationType(kind.ggml))


@functools.cache
def can_decode(kind: TensorType) -> bool:
    """Whether the core, torch or ``gguf.quants`` turns it into numbers."""
    if kind.compiled or kind.plain is not None:
        return True
    import numpy as np

    try:
        ggml_values(np.zeros((1, kind.width), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
