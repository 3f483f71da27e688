"""The recordings of a run: which there are, which may go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Entry", "GraphCache"]


Held = TypeVar("Held")


@dataclass
class Entry(Generic[Held]):
    """One kind of step, or of batch.

    Args:
        seen: How often it ran eagerly.
        recording: Its graph (or the buffers of a batch), once there is one.
        refused: Why there will be none.
        last: Number of the step that used it last.
        checked: Parity checks that it has passed.
        extra: What the caller keeps beside the graph.
    """

    seen: int = 0
    recording: Held | None = None
    refused: str = ""
    last: int = 0
    checked: int = 0
    extra: Any = None


class GraphCache(Generic[Held]):
    """At most ``size`` recordings, the least recently used of which makes room, if it has rested long enough.

    Keys are tuples. A recording that continues others (a later micro-batch of an accumulation window) has a key that
    begins with theirs, and goes when they go: it reads their static tensors.

    Args:
        size: Recordings at most, >= 1.
        patience: Steps that a recording must have rested before another takes its place. Otherwise shapes that take
            turns would throw each other out all the time, and a capture costs more than many eager steps.

    Example:
        >>> cache = GraphCache(1, patience=0)
        >>> cache.room(("a",)), cache.room(("b",))
        (True, True)
    """

    _most_entries = 256

    def __init__(self, size: int, patience: int = 100) -> None:
        self.size, self.patience = size, patience
        self._entries: OrderedDict[tuple[Hashable, ...], Entry[Held]] = OrderedDict()
        self.step = 0

    def __len__(self) -> int:
        """Recordings."""
        return sum(entry.recording is not None for entry in self._entries.values())

    def entry(self, key: tuple[Hashable, ...]) -> Entry[Held]:
        """The entry of ``key``, made if there is none, now the most recently used."""
        self.step += 1
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= self._most_entries:
                self._forget()
            entry = self._entries[key] = Entry()
        self._entries.move_to_end(key)
        entry.last = self.step
        return entry

    def room(self, key: tuple[Hashable, ...]) -> bool:
        """Whether ``key`` may be recorded now; makes room for it."""
        while len(self) >= self.size:
            oldest = next((k for k, e in self._entries.items() if e.recording is not None), key)
            if key[: len(oldest)] == oldest or self.step - self._entries[oldest].last < self.patience:
                return False
            self.drop(oldest)
        return True

    def drop(self, key: tuple[Hashable, ...]) -> None:
        """Let go of a recording and of all that continue it; they may be recorded anew."""
        for other in [k for k in self._entries if k[: len(key)] == key]:
            del self._entries[other]

    def clear_recordings(self) -> None:
        """Let go of all recordings; what was refused stays refused."""
        for entry in self._entries.values():
            entry.recording = None

    def clear(self) -> None:
        """Let go of everything."""
        self._entries.clear()

    def _forget(self) -> None:
        # Batches with names or other values in them have a new key every time.
        for key in [k for k, e in self._entries.items() if e.recording is None][: self._most_entries // 2]:
            del self._entries[key]
