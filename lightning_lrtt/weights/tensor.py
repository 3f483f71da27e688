"""A tensor that stays in its file until it is asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lightning_lrtt.weights._file import CheckpointFile
from lightning_lrtt.weights._types import TensorType, can_decode
from lightning_lrtt.weights.dequantize import dequantize_into
from lightning_lrtt.weights.errors import CheckpointFormatError
from lightning_lrtt.weights.single_flight import SingleFlight

log = logging.getLogger(__name__)
_PIECE = 4 << 20  # bytes read at once: what is between file and parameter, whatever the tensor's size


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of a checkpoint; nothing is read before `into` or `load`. `LazyCheckpoint` makes it (example there).

    Args:
        name: Its name in the file.
        shape: In torch's order.
        type: How it is stored.
        nbytes: Bytes in the file.
        position: Where they begin.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    nbytes: int
    position: int
    _file: CheckpointFile = field(repr=False)
    _flight: SingleFlight[Tensor] = field(repr=False)
    _verify_values: bool = field(default=False, repr=False)

    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes // self.type.width * self.type.block

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __getitem__(self, rows: slice) -> LazyTensor:
        """A range of rows (of the first dimension), as lazy as the whole.

        Raises:
            TypeError: If it is no slice of step 1.
            ValueError: If it is empty, or cuts a block.
        """
        if not isinstance(rows, slice) or rows.step not in (None, 1) or not self.shape:
            raise TypeError(f"LazyTensor: {self.name!r} takes slices of step 1 of its first dimension, got {rows!r}")
        first, last, _ = rows.indices(self.shape[0])
        each = self.numel() // max(1, self.shape[0])
        if last <= first or first * each % self.type.block or last * each % self.type.block:
            raise ValueError(
                f"LazyTensor: rows of {self.name!r} {list(self.shape)} must be a range that begins and ends with a "
                f"block of {self.type.block}, got {first}:{last}"
            )
        width = each * self.type.width / self.type.block
        return replace(
            self,
            shape=(last - first, *self.shape[1:]),
            nbytes=int((last - first) * width),
            position=self.position + int(first * width),
        )

    # -------------------------------------------------------------- reading

    def into(self, out: Tensor, rows: Tensor | None = None) -> Tensor:
        """Decode into existing memory.

        Args:
            out: A tensor of this shape; any floating dtype (or the stored one), device and strides.
            rows: Put row i of the file (all dimensions but the last make rows) at row ``rows[i]``; int64.

        Returns:
            ``out``.

        Raises:
            ValueError: If the shape differs, ``out`` has no memory, or nothing decodes the type.
            CheckpointChangedError: If the file is not the one that was opened.
            CheckpointFormatError: With ``verify="values"``, if a scale is not finite; then ``out`` is untouched.
        """
        if tuple(out.shape) != self.shape:
            raise ValueError(
                f"LazyTensor: out must have the shape {list(self.shape)} of {self.name!r}, got {list(out.shape)}"
            )
        if out.is_meta:
            raise ValueError(f"LazyTensor: out must have memory to take {self.name!r}, got one on the meta device")
        if not can_decode(self.type):
            raise ValueError(f"LazyTensor: {self.name!r} must have a type that can be decoded, got {self.type}")
        start = time.perf_counter()
        if self._verify_values:
            self.verify_values()
        with torch.no_grad():
            self._fill(out.detach(), rows)
        log.debug(
            "loaded %s %s %s: %d bytes in %.2f ms to %s %s",
            self.name,
            list(self.shape),
            self.type,
            self.nbytes,
            1e3 * (time.perf_counter() - start),
            out.device,
            str(out.dtype).removeprefix("torch."),
        )
        return out

    def load(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded tensor, shared: who asks while it is held or being loaded gets the same object.

        Args:
            device: Where to; None: the CPU.
            dtype: None: float32 for blocks, otherwise the stored one.

        Returns:
            A tensor that must not be written to; clone it, or use `into`.
        """
        target = torch.device("cpu" if device is None else device)
        if target.type == "cuda" and target.index is None:  # one name for one device
            target = torch.device("cuda", torch.cuda.current_device())
        kind = dtype or self.type.plain or torch.float32
        key = (self._file.identity, self.name, self.position, self.nbytes, kind, str(target))
        return self._flight.do(key, lambda: self.into(torch.empty(self.shape, dtype=kind, device=target)))

    def verify_values(self) -> None:
        """Look at every block's scales, or at the numbers of a type without blocks.

        Raises:
            CheckpointFormatError: At the first that is not finite, with its byte position.
        """
        if not self.nbytes:
            return
        unit = self.type.width
        for first, raw in self._pieces(unit):
            blocks = raw.numpy().reshape(-1, unit)
            bad = np.zeros(len(blocks), bool)
            for at in self.type.half_scales:
                bad |= blocks[:, at : at + 2].copy().view("<u2")[:, 0] & 0x7C00 == 0x7C00
            if self.type.name == "MXFP4":
                bad |= blocks[:, 0] == 255
            elif self.type.plain is not None and self.type.plain.is_floating_point and not self.type.half_scales:
                bad |= ~torch.isfinite(raw.view(self.type.plain).float()).numpy()
            elif not self.type.half_scales:
                values = torch.empty(len(blocks), self.type.block)
                bad |= ~torch.isfinite(dequantize_into(values, raw, self.type)).all(1).numpy()
            if bad.any():
                position = self.position + (first + int(bad.argmax())) * unit
                raise CheckpointFormatError(
                    self._file.path,
                    f"tensor {self.name!r}",
                    position,
                    f"the scale of a {self.type} block must be finite, but is not",
                )

    def same_bytes(self, other: LazyTensor) -> bool:
        """Whether another tensor has this shape and type, and the same bytes in its file; reads both."""
        if (self.shape, self.type, self.nbytes) != (other.shape, other.type, other.nbytes):
            return False
        if not self.nbytes:
            return True
        unit = self.type.width
        both = zip(self._pieces(unit), other._pieces(unit), strict=True)
        return all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in both)

    def _pieces(self, unit: int) -> Iterator[tuple[int, Tensor]]:
        """(index of the first unit, raw bytes) of pieces of whole units, in one buffer that is used again."""
        buffer = torch.empty(self._piece(unit), dtype=torch.uint8)
        for first, size in self._spans(unit):
            piece = buffer[:size]
            self._file.read_into(piece.numpy(), self.position + first * unit)
            yield first, piece

    def _uploads(self, unit: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """As `_pieces`, on the device: while one piece is read into pinned memory, another is on its way and one decoded.

        The caller decodes a piece on its current stream before it asks for the next.
        """
        size = self._piece(unit)
        current, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        copying.wait_stream(current)  # the device buffers may be memory that work on this stream still reads
        slots = [
            (
                torch.empty(size, dtype=torch.uint8, pin_memory=True),
                torch.empty(size, dtype=torch.uint8, device=device),
                torch.cuda.Event(),  # the pinned buffer has been copied
                torch.cuda.Event(),  # the device buffer has been decoded
            )
            for _ in range(2)
        ]
        try:
            for i, (first, used) in enumerate(self._spans(unit)):
                pinned, uploaded, copied, decoded = slots[i % 2]
                copied.synchronize()
                self._file.read_into(pinned[:used].numpy(), self.position + first * unit)
                with torch.cuda.stream(copying):
                    copying.wait_event(decoded)
                    uploaded[:used].copy_(pinned[:used], non_blocking=True)
                    copied.record(copying)
                current.wait_event(copied)
                yield first, uploaded[:used]
                decoded.record(current)
        finally:
            current.wait_stream(copying)  # what is freed now is used again by work on the current stream
            copying.synchronize()

    def _piece(self, unit: int) -> int:
        return min(max(1, _PIECE // unit), self.nbytes // unit) * unit

    def _spans(self, unit: int) -> Iterator[tuple[int, int]]:
        """(index of the first unit, bytes) of the pieces."""
        size = self._piece(unit)
        for at in range(0, self.nbytes, size):
            yield at // unit, min(size, self.nbytes - at)

    def _fill(self, out: Tensor, rows: Tensor | None) -> None:
        if not self.nbytes:
            return
        direct = rows is None and out.is_contiguous()
        if direct and out.is_cpu and out.dtype == self.type.plain:
            self._file.read_into(out.view(-1).view(torch.uint8).numpy(), self.position)
            return
        # Whole blocks of a flat out, or whole rows where rows move or out is strided.
        columns = self.shape[-1] if self.shape else 1
        unit = self.type.width if direct else columns // self.type.block * self.type.width
        size = self.type.block if direct else columns
        matrix = out.view(-1, size) if direct else out.reshape(-1, columns) if out.dim() != 2 else out
        if not direct and out.dim() != 2 and matrix.data_ptr() != out.data_ptr():
            raise ValueError(
                f"LazyTensor: out of {self.name!r} must be contiguous where it has other than two dimensions, got "
                f"strides {out.stride()}"
            )
        decoded_there = out.is_cuda and (self.type.compiled or self.type.plain is not None)
        pieces = self._uploads(unit, out.device) if decoded_there else self._pieces(unit)
        for first, raw in pieces:
            count = raw.numel() // unit
            if rows is not None:
                dequantize_into(matrix, raw, self.type, rows[first : first + count])
            elif direct:
                dequantize_into(matrix[first : first + count].view(1, -1), raw, self.type)
            else:
                dequantize_into(matrix[first : first + count], raw, self.type)
