"""What a bad checkpoint raises."""

from __future__ import annotations

import os


class CheckpointFormatError(ValueError):
    """A checkpoint file breaks its format's rules; nothing was allocated from what it claims.

    Args:
        path: The file.
        tensor: The tensor, metadata key or part of the header at fault.
        position: Byte of the file at which the offending field starts.
        problem: The rule and what was found.
    """

    def __init__(self, path: str | os.PathLike[str], tensor: str, position: int, problem: str) -> None:
        super().__init__(f"{os.fspath(path)}: {tensor}, byte {position}: {problem}")
        self.path, self.tensor, self.position, self.problem = os.fspath(path), tensor, position, problem

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.tensor, self.position, self.problem)


class CheckpointChangedError(RuntimeError):
    """A checkpoint file is not the one that was opened: it was replaced, written to, truncated or removed."""


class CheckpointMismatchError(ValueError):
    """Names or shapes of a checkpoint and a module do not agree; the message lists all of them."""
