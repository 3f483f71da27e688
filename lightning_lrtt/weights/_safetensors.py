"""Safetensors files: the library checks the header, the bytes are read with ``pread`` like those of GGUF files."""

from __future__ import annotations

import json
from typing import Any

from lightning_lrtt.weights._file import CheckpointFile
from lightning_lrtt.weights._gguf import Span
from lightning_lrtt.weights._types import safetensors_type
from lightning_lrtt.weights.errors import CheckpointFormatError

_LONGEST_HEADER = 100_000_000  # the library's own limit


def parse(file: CheckpointFile) -> tuple[dict[str, Any], list[Span]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        CheckpointFormatError: If the library refuses the header, a length does not fit or a dtype is unknown to torch.
        ImportError: If safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(
            "LazyCheckpoint: safetensors must be installed for *.safetensors, but it is not; "
            'pip install "lightning-lrtt[weights]"'
        ) from None

    def error(what: str, position: int, problem: str) -> CheckpointFormatError:
        return CheckpointFormatError(file.path, what, position, problem)

    if file.size < 8:
        raise error("header", 0, f"the file must have at least 8 bytes, got {file.size}")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, _LONGEST_HEADER):
        raise error(
            "header", 0, f"the header must lie inside the file and have at most {_LONGEST_HEADER} bytes, got {length}"
        )
    try:
        with safe_open(file.path, framework="pt"):  # maps the file, looks at the header and lets go
            pass
    except (SafetensorError, OSError) as cause:
        raise error("header", 8, f"safetensors refuses it: {cause}") from None
    try:
        header = json.loads(file.read(8, length))
    except (ValueError, RecursionError) as cause:
        raise error("header", 8, f"the header must be JSON, but {cause}") from None
    metadata = header.pop("__metadata__", {})
    spans = []
    for name, entry in header.items():
        kind = safetensors_type(entry["dtype"])
        if kind is None:
            raise error(f"tensor {name!r}", 8, f"the dtype must be one that torch has, got {entry['dtype']}")
        start, end = entry["data_offsets"]
        spans.append(Span(name, tuple(entry["shape"]), kind, 8 + length + start, end - start, file))
    file.check()  # the header was read twice
    return metadata, spans
