"""Rows of device numbers on their way to the host, which waits for none of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("lightning_lrtt")


@dataclass
class _Row:
    """One copy under way: where it lands, the event that says it has, and what it is."""

    host: Tensor
    size: int
    event: Any
    note: Any


class MetricRing:
    """Take vectors from the device without waiting, and hand them over, in order, once they have arrived.

    On CUDA a row is one asynchronous copy into pinned memory and one event. `drain` asks the events and returns at once;
    only a full ring waits, for its oldest row. On the CPU there is nothing to wait for: a row is handed over by `push`.

    Args:
        device: Where the rows come from.
        sink: Gets each row's note and its numbers.
        rows: Most rows under way, at least 1.

    Example:
        >>> seen = []
        >>> ring = MetricRing(torch.device("cpu"), lambda note, values: seen.append((note, values)))
        >>> ring.push(torch.tensor([1.0, 2.0], dtype=torch.float64), "first")
        >>> seen
        [('first', [1.0, 2.0])]
    """

    def __init__(self, device: torch.device, sink: Callable[[Any, list[float]], None], rows: int = 8) -> None:
        self._asynchronous, self._sink, self._most = device.type == "cuda", sink, rows
        self._waiting: deque[_Row] = deque()
        self._free: list[tuple[Tensor, Any]] = []

    def __len__(self) -> int:
        """Rows under way."""
        return len(self._waiting)

    def push(self, values: Tensor, note: Any) -> None:
        """Send a float64 vector ``[n]``; n may differ from row to row."""
        if not self._asynchronous:
            host = torch.empty(values.shape, dtype=torch.float64)
            self._sink(note, host.copy_(values).tolist())
            return
        if len(self._waiting) >= self._most:
            self._hand_over(self._waiting.popleft(), wait=True)
        host, event = self._slot(values.numel())
        host[: values.numel()].copy_(values, non_blocking=True)
        event.record()
        self._waiting.append(_Row(host, values.numel(), event, note))

    def drain(self, wait: bool = False) -> None:
        """Hand over what has arrived; with ``wait`` everything."""
        while self._waiting and (wait or self._waiting[0].event.query()):
            self._hand_over(self._waiting.popleft(), wait)

    def abandon(self) -> None:
        """After an exception: hand over what can still be had, and raise nothing."""
        try:
            self.drain(wait=True)
        except RuntimeError as error:  # the device may be gone; the first exception is the one to be seen
            log.warning("TileMonitor: %d rows of figures were lost: %s", len(self._waiting) + 1, error)
            self._waiting.clear()

    def _slot(self, size: int) -> tuple[Tensor, Any]:
        for index, (host, _) in enumerate(self._free):
            if host.numel() >= size:
                return self._free.pop(index)
        self._free = self._free[-self._most :]
        return torch.empty(size, dtype=torch.float64, pin_memory=True), torch.cuda.Event()

    def _hand_over(self, row: _Row, wait: bool) -> None:
        if wait:
            row.event.synchronize()
        values = row.host[: row.size].tolist()
        self._free.append((row.host, row.event))
        self._sink(row.note, values)
