"""A checkpoint file as a mapping of lazy tensors."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Self

from lightning_lrtt import _check
from lightning_lrtt.weights import _gguf, _safetensors
from lightning_lrtt.weights._file import CheckpointFile
from lightning_lrtt.weights.errors import CheckpointFormatError
from lightning_lrtt.weights.single_flight import SingleFlight
from lightning_lrtt.weights.tensor import LazyTensor

log = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_LARGEST_INDEX = 64 << 20


class LazyCheckpoint(Mapping[str, LazyTensor]):
    """The tensors of a GGUF or safetensors checkpoint; only headers have been read.

    Made by `open`. A read-only mapping from names in the file to `LazyTensor`; a context manager.

    Args:
        files: Open files.
        metadata: See below.
        spans: Where the tensors lie.
        format: See below.
        verify_values: Whether a read checks that block scales are finite.
        cache_bytes: See `open`.

    Attributes:
        metadata: Key/values of GGUF (long ones are read when asked for), or safetensors' ``__metadata__``.
        format: ``gguf`` or ``safetensors``.
        flight: The `SingleFlight` behind `LazyTensor.load`; ``flight.counts`` says what was loaded and shared.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> path = tempfile.mkdtemp() + "/two.safetensors"
        >>> save_file({"a": torch.ones(3, 2), "b": torch.zeros(3)}, path)
        >>> with LazyCheckpoint.open(path) as checkpoint:
        ...     list(checkpoint), checkpoint["a"].shape, checkpoint["a"][1:].load().sum().item()
        (['a', 'b'], (3, 2), 4.0)
    """

    def __init__(
        self,
        files: list[CheckpointFile],
        metadata: Mapping[str, Any],
        spans: list[_gguf.Span],
        format: str,
        verify_values: bool,
        cache_bytes: int,
    ) -> None:
        self.metadata, self.format, self._files = metadata, format, files
        self.flight: SingleFlight[Tensor] = SingleFlight(cache_bytes)
        self._tensors = {
            s.name: LazyTensor(s.name, s.shape, s.type, s.nbytes, s.position, s.file, self.flight, verify_values)
            for s in spans
        }

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: Literal["structure", "values"] = "structure",
        sha256: str | None = None,
        cache_bytes: int = 0,
    ) -> Self:
        """Read the header of a checkpoint; its kind is recognised by its first bytes.

        Args:
            path: A .gguf file (of a split checkpoint the first one), a .safetensors file, the .index.json of several,
                or a folder with ``model.safetensors`` or its index.
            verify: ``structure``: every rule about the header, before anything else is read. ``values``: also, whenever
                a tensor is read, that its block scales are finite.
            sha256: Hexadecimal digest of the whole file (one file only), compared now.
            cache_bytes: Budget for decoded tensors that several parameters share (see `SingleFlight`).

        Raises:
            FileNotFoundError: If there is nothing at ``path``.
            CheckpointFormatError: If a rule is broken; it names the tensor and the byte.
            ImportError: If the format's library is not installed.
            ValueError: If an argument is none of its choices or ``sha256`` differs.
        """
        _check.choice("LazyCheckpoint", "verify", verify, ("structure", "values"))
        start, where = time.perf_counter(), Path(path)
        if where.is_dir():
            names = [name for name in (_INDEX, "model.safetensors") if (where / name).is_file()]
            if not names:
                raise FileNotFoundError(
                    f"LazyCheckpoint: the folder {str(where)!r} must hold {_INDEX} or model.safetensors; give a file"
                )
            where = where / names[0]
        files: list[CheckpointFile] = []
        try:
            files.append(CheckpointFile(where))
            metadata, spans, format = _read(files)
            if sha256 is not None:
                _compare_digest(files, sha256)
        except BaseException:
            for file in files:
                file.close()
            raise
        log.debug(
            "opened %s: %s, %d tensors, %d bytes in %.2f ms",
            where,
            format,
            len(spans),
            sum(s.nbytes for s in spans),
            1e3 * (time.perf_counter() - start),
        )
        return cls(files, metadata, spans, format, verify == "values", cache_bytes)

    @property
    def path(self) -> str:
        """The (first) file."""
        return self._files[0].path

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self._files)

    @property
    def architecture(self) -> str | None:
        """``general.architecture`` of a GGUF file."""
        value = self.metadata.get("general.architecture") if self.format == "gguf" else None
        return value if isinstance(value, str) else None

    def check(self) -> None:
        """Raise `CheckpointChangedError` if a file is not the one that was opened."""
        for file in self._files:
            file.check()

    def close(self) -> None:
        """Close the files; tensors cannot be read afterwards."""
        for file in self._files:
            file.close()

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LazyCheckpoint({self.path!r}, {self.format}, {len(self)} tensors)"


def _read(files: list[CheckpointFile]) -> tuple[Mapping[str, Any], list[_gguf.Span], str]:
    """Headers of all files of the checkpoint that the first one belongs to; adds the others to ``files``."""
    first = files[0]
    magic = first.read(0, min(9, first.size))
    if magic[:4] == _gguf.MAGIC:
        metadata, spans = _gguf.parse(first)
        return metadata, _with_splits(files, metadata, spans), "gguf"
    if magic[8:9] == b"{" and not magic.lstrip().startswith(b"{"):
        found, spans = _safetensors.parse(first)
        return found, spans, "safetensors"
    if magic.lstrip()[:1] == b"{":
        return (*_from_index(files), "safetensors")
    raise CheckpointFormatError(
        first.path,
        "header",
        0,
        "the file must be GGUF (b'GGUF'), safetensors (a length and '{') or an "
        f"index of safetensors ('{{'), got {magic!r}",
    )


def _with_splits(files: list[CheckpointFile], metadata: Mapping[str, Any], spans: list[_gguf.Span]) -> list[_gguf.Span]:
    first, count = files[0], metadata.get("split.count", 1)

    def error(problem: str) -> CheckpointFormatError:
        return CheckpointFormatError(first.path, "metadata 'split.count'", 0, problem)

    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise error(f"the number of files must be a whole number, got {count!r}")
    if count < 2:
        return spans
    match = _SPLIT.fullmatch(os.path.basename(first.path))
    if match is None or int(match[3]) != count or int(match[2]) != 1:
        raise error(
            f"a checkpoint split into {count} must be opened at its first file, named NAME-00001-of-{count:05d}.gguf"
        )
    for i in range(2, count + 1):
        path = os.path.join(os.path.dirname(first.path), f"{match[1]}-{i:05d}-of-{count:05d}.gguf")
        if not os.path.isfile(path):
            raise error(f"part {i} of {count} must lie beside the first, but there is no {path}")
        files.append(CheckpointFile(path))
        other, more = _gguf.parse(files[-1])
        if other.get("split.no") != i - 1 or other.get("split.count") != count:
            raise CheckpointFormatError(
                path,
                "metadata 'split.no'",
                0,
                f"the part must be {i - 1} of {count}, got {other.get('split.no')} of {other.get('split.count')}",
            )
        spans = spans + more
    expected = metadata.get("split.tensors.count", len(spans))
    if expected != len(spans):
        raise error(f"the parts must hold {expected} tensors, got {len(spans)}")
    _unique(spans)
    return spans


def _from_index(files: list[CheckpointFile]) -> tuple[Mapping[str, Any], list[_gguf.Span]]:
    index = files[0]

    def error(what: str, problem: str) -> CheckpointFormatError:
        return CheckpointFormatError(index.path, what, 0, problem)

    if index.size > _LARGEST_INDEX:
        raise error("index", f"the index must have at most {_LARGEST_INDEX} bytes, got {index.size}")
    try:
        content = json.loads(index.read(0, index.size))
        places: dict[str, Any] = dict(content["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise error("index", f"the index must be JSON with a weight_map, but {type(cause).__name__}: {cause}") from None
    metadata = content.get("metadata", {})
    if not isinstance(metadata, dict):
        raise error("index", f"its metadata must be an object, got {metadata!r:.40}")
    for name in places.values():
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise error("weight_map", f"files must lie beside the index, got {name!r:.80}")
    spans = []
    for name in dict.fromkeys(places.values()):
        path = os.path.join(os.path.dirname(index.path), name)
        if not os.path.isfile(path):
            raise error("weight_map", f"files must lie beside the index, but there is no {path}")
        files.append(CheckpointFile(path))
        spans += _safetensors.parse(files[-1])[1]
    _unique(spans)
    missing = sorted(set(places) - {s.name for s in spans})
    if missing:
        raise error(
            f"tensor {missing[0]!r}", "tensors of the index must be in their files, but are not: " + ", ".join(missing)
        )
    return metadata, spans


def _unique(spans: list[_gguf.Span]) -> None:
    seen: set[str] = set()
    for span in spans:
        if span.name in seen:
            raise CheckpointFormatError(
                span.file.path,
                f"tensor {span.name!r}",
                span.position,
                "the name must be unique among all files of the checkpoint",
            )
        seen.add(span.name)


def _compare_digest(files: list[CheckpointFile], expected: str) -> None:
    if len(files) > 1:
        raise _check.fail("LazyCheckpoint", "sha256", "left out for a checkpoint of several files", expected)
    file, digest, at = files[0], hashlib.sha256(), 0
    while at < file.size:
        piece = file.read(at, min(1 << 22, file.size - at))
        digest.update(piece)
        at += len(piece)
    if digest.hexdigest() != expected.lower():
        raise ValueError(
            f"LazyCheckpoint: sha256 must be that of {file.path}, {digest.hexdigest()}, got {expected}; the file "
            "is not the one that was meant"
        )
