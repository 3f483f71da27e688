"""An open checkpoint file that notices when it changes.

Read with ``pread``: a mapped file that somebody truncates kills the process with SIGBUS.
"""

from __future__ import annotations

import os
import stat
import weakref
from typing import Any

from lightning_lrtt.weights.errors import CheckpointChangedError

Identity = tuple[int, int, int, int]  # device, inode, size, mtime in ns


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class CheckpointFile:
    """Positional reads of one file, each preceded and followed by a look at its identity.

    Safe to share among threads; pickles as a path and opens again, if the file is still the same.

    Args:
        path: A regular file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ValueError(f"LazyCheckpoint: path must be a regular file, got {self.path!r}")
        self.identity = _identity(status)

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self.identity[2]

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        self._finalizer()

    def check(self) -> None:
        """Compare with what was opened.

        Raises:
            CheckpointChangedError: If the path leads to another file, or size or modification time differ.
        """
        try:
            now = _identity(os.stat(self.path))
        except FileNotFoundError:
            raise self._changed("was removed") from None
        if now != self.identity:
            named = zip(("device", "inode", "size", "mtime"), self.identity, now, strict=True)
            raise self._changed(", ".join(f"{n} was {a} and is {b}" for n, a, b in named if a != b))

    def read_into(self, target: Any, position: int) -> None:
        """Fill a writable buffer from ``position``.

        Raises:
            CheckpointChangedError: If the file changed, or ends before the buffer is full.
        """
        if not self._finalizer.alive:
            raise ValueError(f"LazyCheckpoint: the checkpoint must be open to be read, got a closed one: {self.path}")
        self.check()
        view = memoryview(target).cast("B")
        while len(view):
            count = os.preadv(self._fd, [view], position)
            if count == 0:
                raise self._changed(f"ends at byte {position}")
            view, position = view[count:], position + count
        self.check()

    def read(self, position: int, count: int) -> bytes:
        """``count`` bytes from ``position``; the caller has compared both with `size`."""
        data = bytearray(count)
        self.read_into(data, position)
        return bytes(data)

    def _changed(self, how: str) -> CheckpointChangedError:
        return CheckpointChangedError(
            f"{self.path}: the file must stay as it was when it was opened, but it {how}; open it again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.identity)


def _reopen(path: str, identity: Identity) -> CheckpointFile:
    file = CheckpointFile(path)
    opened, file.identity = file.identity, identity
    if opened != identity:
        file.check()
    return file
