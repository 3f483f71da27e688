"""A strict parser of GGUF headers (versions 2 and 3, little-endian): nothing is allocated from a length in the file.

Layout: magic, version, tensor count, metadata count; metadata (key, type, value); tensor infos (name, dimensions
innermost first, type, offset); padding to ``general.alignment``; data. Source: the GGUF specification of ggml.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lrtt import _C
from lightning_lrtt.weights._file import CheckpointFile
from lightning_lrtt.weights._types import TensorType, ggml_type
from lightning_lrtt.weights.errors import CheckpointFormatError

MAGIC = b"GGUF"
_LONGEST_NAME = 65535
_MAX_DIMS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SHORT = 4096  # longer strings are read when they are asked for


@functools.cache
def _struct(code: str) -> struct.Struct:
    return struct.Struct("<" + code)


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes are."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    position: int
    nbytes: int
    file: CheckpointFile


class Metadata(Mapping[str, Any]):
    """The metadata of a GGUF file; arrays and long strings are read when they are asked for."""

    def __init__(self, file: CheckpointFile) -> None:
        self._file = file
        self._values: dict[str, Any] = {}
        self._later: dict[str, tuple[int, int, int, int]] = {}  # element type, start, end, count

    def __getitem__(self, key: str) -> Any:
        if key not in self._later:
            return self._values[key]
        kind, start, end, count = self._later[key]
        data = self._file.read(start, end - start)
        if kind in _SCALARS:
            return np.frombuffer(data, "<" + _SCALARS[kind]).tolist()
        if count < 0:
            return _text(data)
        found, at = [], 0
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(_text(data[at + 8 : at + 8 + length]))
            at += 8 + length
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self._values
        yield from self._later

    def __len__(self) -> int:
        return len(self._values) + len(self._later)

    def __contains__(self, key: object) -> bool:
        return key in self._values or key in self._later

    def describe(self, key: str) -> str:
        """The value in few characters, without reading a long one."""
        if key in self._later:
            _, start, end, count = self._later[key]
            return f"string of {end - start} bytes" if count < 0 else f"array of {count}"
        return repr(self._values[key])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # a vocabulary may hold single bytes


class _Cursor:
    """Reads forward through a window of the file; every length is compared with what is left before it is used."""

    def __init__(self, file: CheckpointFile) -> None:
        self.file, self.at, self.what = file, 0, "header"
        self._base, self._window, self._next = 0, b"", 1 << 16

    def error(self, problem: str, position: int | None = None) -> CheckpointFormatError:
        return CheckpointFormatError(self.file.path, self.what, self.at if position is None else position, problem)

    @property
    def left(self) -> int:
        return self.file.size - self.at

    def need(self, count: int, name: str) -> int:
        """Make ``count`` bytes available; their index in the window."""
        if count > self.left:
            raise self.error(
                f"{name} must lie inside the file, but needs {count} bytes where {max(self.left, 0)} are left"
            )
        if self.at < self._base or self.at + count > self._base + len(self._window):
            self._window = self.file.read(self.at, min(self.left, max(count, self._next)))
            self._base, self._next = self.at, 1 << 20
        return self.at - self._base

    def take(self, code: str, name: str) -> Any:
        return self.take_all(_struct(code), name)[0]

    def take_all(self, form: struct.Struct, name: str) -> tuple[Any, ...]:
        index = self.need(form.size, name)
        values = form.unpack_from(self._window, index)
        self.at += form.size
        return values

    def name(self, what: str) -> str:
        start = self.at
        length = self.take("Q", f"the length of {what}")
        if not 0 < length <= _LONGEST_NAME:
            raise self.error(f"{what} must have 1 to {_LONGEST_NAME} bytes, got {length}", start)
        index = self.need(length, what)
        data = self._window[index : index + length]
        try:
            value = data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} must be UTF-8, got {data[:40]!r}") from None
        self.at += length
        return value

    def skip(self, count: int, name: str) -> None:
        if count > self.left:
            raise self.error(f"{name} must lie inside the file, but needs {count} bytes where {self.left} are left")
        self.at += count

    def skip_strings(self, count: int) -> None:
        while count:
            index = self.need(8, "the length of a string")
            walked, end = _C.skip_strings(self._window, index, count)
            self.at, count = self._base + end, count - walked
            if count and not walked:  # longer than the window
                self.skip(self.take("Q", "the length of a string"), "a string")
                count -= 1


def parse(file: CheckpointFile) -> tuple[Metadata, list[Span]]:
    """Metadata and tensors of a GGUF file.

    Raises:
        CheckpointFormatError: If a rule is broken.
    """
    cursor = _Cursor(file)
    if file.read(0, min(4, file.size)) != MAGIC:
        raise cursor.error(f"the file must begin with {MAGIC!r}")
    cursor.at = 4
    version = cursor.take("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = "; this is a big-endian file, convert it with gguf-convert-endian" if swapped in (2, 3) else ""
        raise cursor.error(f"the version must be 2 or 3, got {version}{hint}", 4)
    tensor_count, metadata_count = cursor.take("Q", "the tensor count"), cursor.take("Q", "the metadata count")
    # The least record: an empty-named tensor of one dimension has 8 + 4 + 8 + 4 + 8 bytes, a metadata entry 8 + 4 + 1.
    for count, least, what, position in ((tensor_count, 32, "tensor", 8), (metadata_count, 13, "metadata", 16)):
        if count > file.size // least:
            raise cursor.error(
                f"the {what} count must be at most file size / {least} = {file.size // least}, got {count}", position
            )
    metadata = _metadata(cursor, metadata_count)
    alignment = _alignment(cursor, metadata)
    return metadata, _tensors(cursor, tensor_count, alignment)


def _metadata(cursor: _Cursor, count: int) -> Metadata:
    found = Metadata(cursor.file)
    for i in range(count):
        cursor.what = f"metadata entry {i}"
        key = cursor.name("the key")
        cursor.what = f"metadata {key!r}"
        if key in found:
            raise cursor.error("the key must be unique, but stands there twice")
        position = cursor.at
        kind = cursor.take("I", "the type")
        if kind in _SCALARS:
            found._values[key] = _scalar(cursor, kind)
        elif kind == _STRING:
            length = cursor.take("Q", "the length of the string")
            if length <= _SHORT:
                index = cursor.need(length, "the string")
                found._values[key] = _text(cursor._window[index : index + length])
                cursor.at += length
            else:
                found._later[key] = (_STRING, cursor.at, cursor.at + length, -1)
                cursor.skip(length, "the string")
        elif kind == _ARRAY:
            found._later[key] = _array(cursor)
        else:
            raise cursor.error(f"the type must be 0 to 12, got {kind}", position)
    return found


def _scalar(cursor: _Cursor, kind: int) -> Any:
    if kind != _BOOL:
        return cursor.take(_SCALARS[kind], "the value")
    value = cursor.take("B", "the value")
    if value > 1:
        raise cursor.error(f"a bool must be 0 or 1, got {value}", cursor.at - 1)
    return bool(value)


def _array(cursor: _Cursor) -> tuple[int, int, int, int]:
    kind, position = cursor.take("I", "the element type"), cursor.at
    if kind == _ARRAY:
        raise cursor.error("an array must not hold arrays", position - 4)
    if kind != _STRING and kind not in _SCALARS:
        raise cursor.error(f"the element type must be 0 to 12 without 9, got {kind}", position - 4)
    count = cursor.take("Q", "the length of the array")
    least = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind])
    if count > cursor.left // least:
        raise cursor.error(
            f"the array must lie inside the file, but its {count} elements of at least {least} bytes do not fit "
            f"into the {cursor.left} that are left",
            position,
        )
    start = cursor.at
    if kind == _STRING:
        cursor.skip_strings(count)
    else:
        cursor.skip(count * least, "the array")
    return kind, start, cursor.at, count


def _alignment(cursor: _Cursor, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", 32)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value & (value - 1) or value > 1 << 31:
        cursor.what = "metadata 'general.alignment'"
        raise cursor.error(f"the alignment must be a power of two, got {value!r}")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> list[Span]:
    infos: dict[str, tuple[tuple[int, ...], TensorType, int, int, int]] = {}
    for i in range(count):
        cursor.what = f"tensor {i}"
        name = cursor.name("the name")
        cursor.what = f"tensor {name!r}"
        if name in infos:
            raise cursor.error("the name must be unique, but stands there twice")
        infos[name] = _info(cursor, alignment)
    data = -(-cursor.at // alignment) * alignment
    file, spans, ends = cursor.file, [], []
    for name, (shape, kind, nbytes, offset, position) in infos.items():
        start = data + offset
        if start + nbytes > file.size:
            cursor.what = f"tensor {name!r}"
            raise cursor.error(
                f"the data must lie inside the file of {file.size} bytes, but are at {start} to {start + nbytes}",
                position,
            )
        spans.append(Span(name, shape, kind, start, nbytes, file))
        ends.append((start, start + nbytes, name, position))
    ends.sort()
    for (_, end, name, _), (start, _, other, position) in itertools.pairwise(ends):
        if start < end:
            cursor.what = f"tensor {other!r}"
            raise cursor.error(
                f"the data must be the tensor's own, but overlap those of {name!r}, which end at byte {end}", position
            )
    return spans


def _info(cursor: _Cursor, alignment: int) -> tuple[tuple[int, ...], TensorType, int, int, int]:
    position = cursor.at
    n_dims = cursor.take("I", "the number of dimensions")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.error(f"the number of dimensions must be 1 to {_MAX_DIMS}, got {n_dims}", position)
    position = cursor.at
    *dims, number, offset = cursor.take_all(_struct(f"{n_dims}QIQ"), "dimensions, type and offset")
    type_position, offset_position = cursor.at - 12, cursor.at - 8
    if 0 in dims:
        raise cursor.error(f"dimensions must be > 0, got {dims}", position)
    kind = ggml_type(number)
    if kind is None:
        raise cursor.error(f"the type must be one that the gguf library knows, got {number}", type_position)
    if dims[0] % kind.block:
        raise cursor.error(f"a row must be whole {kind} blocks of {kind.block}, got {dims[0]} elements", position)
    elements = 1
    for dim in dims:
        elements *= dim
    nbytes = elements // kind.block * kind.width
    if nbytes > cursor.file.size:
        raise cursor.error(
            f"the data must be smaller than the file of {cursor.file.size} bytes, got {dims} {kind}, which "
            f"are {nbytes}",
            position,
        )
    if offset % alignment:
        raise cursor.error(f"the offset must be a multiple of the alignment {alignment}, got {offset}", offset_position)
    return tuple(dims[::-1]), kind, nbytes, offset, offset_position
