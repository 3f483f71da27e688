"""Phase times from marks that are read when the device has passed them, never earlier."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lightning_lrtt.graphs.recorder import Mark

__all__ = ["PhaseTimer"]


class PhaseTimer:
    """Mean device milliseconds of named phases.

    Args:
        mark: Makes a mark at the device's current moment (`Recorder.mark`).
        keep: Unread phases at most; beyond, the oldest are left out rather than waited for.

    Example::

        timer = PhaseTimer(recorder.mark)
        timer.begin("step"); step(); timer.end()
        timer.means()   # {"step": 1.3}, later
    """

    def __init__(self, mark: Callable[[], Mark], keep: int = 1024) -> None:
        self._mark = mark
        self._open: tuple[str, Mark] | None = None
        self._pending: deque[tuple[str, Mark, Mark]] = deque(maxlen=keep)
        self._sums: dict[str, tuple[float, int]] = {}

    def begin(self, phase: str) -> None:
        """A phase starts; one that is open ends."""
        now = self._mark()
        self._close(now)
        self._open = (phase, now)

    def end(self) -> None:
        """The open phase ends."""
        if self._open is not None:
            self._close(self._mark())

    def means(self) -> dict[str, float]:
        """Means of the phases that the device has finished since the last call, and forget them."""
        while self._pending and self._pending[0][2].ready():
            phase, start, stop = self._pending.popleft()
            total, count = self._sums.get(phase, (0.0, 0))
            self._sums[phase] = (total + stop.milliseconds_since(start), count + 1)
        means = {phase: total / count for phase, (total, count) in self._sums.items()}
        self._sums.clear()
        return means

    def _close(self, now: Mark) -> None:
        if self._open is not None:
            phase, start = self._open
            self._pending.append((phase, start, now))
            self._open = None
