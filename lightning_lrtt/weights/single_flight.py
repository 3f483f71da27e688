"""One load for each key, however many threads ask."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from lightning_lrtt import _check

log = logging.getLogger(__name__)
T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs a loader once for each key; whoever asks meanwhile waits for that result.

    The lock guards the tables, never a load, so loads of different keys run side by side. A failure reaches all who
    wait and is forgotten: the next call tries again. A value stays known as long as somebody holds it (weakly
    referenced); beyond that the least recently used values are kept up to a budget of bytes.

    Args:
        budget: Bytes to keep for values that nobody holds. Only for clean, shared sources: what is handed out must not
            be written to.

    Attributes:
        counts: How many calls were ``loads``, ``hits`` (known value), ``joined`` (waited for another's load),
            ``failures``, and how many values were ``evicted``.

    Raises:
        ValueError: If ``budget`` is negative.

    Example:
        >>> flight = SingleFlight()
        >>> flight.do("a", lambda: 1)
        1
        >>> flight.counts["loads"]
        1
    """

    def __init__(self, budget: int = 0) -> None:
        _check.integer("SingleFlight", "budget", budget, low=0)
        self.budget = budget
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._flights: dict[Hashable, tuple[int, Future[T]]] = {}  # thread that loads, its result
        self._alive: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._bytes = 0

    def do(self, key: Hashable, load: Callable[[], T]) -> T:
        """The value of ``key``: a known one, that of a load in flight, or what ``load()`` returns.

        Raises:
            RuntimeError: If ``load`` of this key asks for the key again.
        """
        me = threading.get_ident()
        with self._lock:
            value = self._find(key)
            if value is not None:
                self.counts["hits"] += 1
                log.debug("hit %s", key)
                return value
            flight = self._flights.get(key)
            if flight is None:
                future: Future[T] = Future()
                self._flights[key] = (me, future)
                self.counts["loads"] += 1
            else:
                self.counts["joined"] += 1
        if flight is not None:
            if flight[0] == me:
                raise RuntimeError(f"SingleFlight: a load must not ask for its own key, got {key!r} again")
            log.debug("joined %s", key)
            return flight[1].result()
        log.debug("miss %s", key)
        try:
            value = load()
        except BaseException as error:
            with self._lock:
                del self._flights[key]
                self.counts["failures"] += 1
            future.set_exception(error)
            raise
        with self._lock:
            self._keep(key, value)
            del self._flights[key]
        future.set_result(value)
        return value

    def _find(self, key: Hashable) -> T | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return self._alive.get(key)

    def _keep(self, key: Hashable, value: T) -> None:
        try:
            self._alive[key] = value
        except TypeError:  # None, numbers: not known beyond the flight
            return
        size = int(getattr(value, "nbytes", 0))
        if not 0 < size <= self.budget:
            return
        self._kept[key] = value
        self._bytes += size
        while self._bytes > self.budget:
            old, dropped = self._kept.popitem(last=False)
            self._bytes -= int(getattr(dropped, "nbytes", 0))
            self.counts["evicted"] += 1
            log.debug("evicted %s", old)
