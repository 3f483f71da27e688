"""The update of the tiles alone as a graph, for steps the rest of which cannot be recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from lightning_lrtt.graphs.cache import Entry, GraphCache
from lightning_lrtt.graphs.recorder import GraphCaptureError, Recorder, Recording
from lightning_lrtt.nn.latch import Operands
from lightning_lrtt.nn.tile import TileModule

__all__ = ["TileGraphs"]


class _Nothing:
    """A tile's update returns nothing: it changes the tile in place."""

    def tensors(self) -> list[Tensor]:
        return []


class TileGraphs:
    """Runs the tiles' part of ``LRTT.step`` as a graph: ``optimizer.runner = TileGraphs(recorder)``.

    Gradients and latched operands are copied into static tensors first, so whatever produced them may go on producing
    them anywhere. Works in plain PyTorch loops too.

    Args:
        recorder: What records.
        warmup: Eager steps of every shape before its graph.
        size: Graphs at most.
        eager_now: Asked before every step; True keeps this one eager (somebody wants to watch it).
        report: Told of every ``capture``, ``replay`` and ``eager`` step, and of a ``refused`` one with its reason.
        on_failure: ``eager`` goes on without a graph, ``raise`` raises.

    Attributes:
        capture_ms: Host milliseconds of the last capture.

    Raises:
        GraphCaptureError: In a step, with ``on_failure='raise'``.

    Example::

        optimizer.runner = TileGraphs(CudaRecorder(torch.device("cuda:0")))
        ...                     # any training loop that calls optimizer.step()
        optimizer.runner = None  # plain calls again
    """

    def __init__(
        self,
        recorder: Recorder,
        warmup: int = 3,
        size: int = 4,
        eager_now: Callable[[], bool] = lambda: False,
        report: Callable[[str, str], None] = lambda event, reason: None,
        on_failure: str = "eager",
    ) -> None:
        self._recorder, self._warmup, self._cache = recorder, warmup, GraphCache[Recording](size)
        self._eager_now, self._report, self._on_failure = eager_now, report, on_failure
        self.capture_ms = 0.0

    def __call__(self, tiles: list[TileModule], issue: Callable[[], None]) -> None:
        """Run ``issue``, which updates ``tiles`` from their gradients and latches."""
        for tile in tiles:
            if tile.latch.calls:
                tile.latch.merged()
        live = [t for tile in tiles for t in _inputs(tile)]
        entry = self._cache.entry((self._key(tiles, live),))
        if self._eager_now() or entry.refused or (entry.recording is None and entry.seen < self._warmup):
            entry.seen += 1
            self._report("eager", "")
            self._recorder.eager(issue)
        elif entry.recording is not None:
            torch._foreach_copy_(entry.extra, live)
            entry.recording.replay()
            self._report("replay", "")
        elif not self._cache.room((self._key(tiles, live),)):
            why = f"shape cache full ({self._cache.size} graphs of the tiles' update)"
            self._report("refused", why)
            if self._on_failure == "raise":
                raise GraphCaptureError(f"{why}: pad batches to fewer shapes, or allow more graphs")
            self._recorder.eager(issue)
        else:
            self._record(entry, tiles, live, issue)

    def _record(
        self, entry: Entry[Recording], tiles: list[TileModule], live: list[Tensor], issue: Callable[[], None]
    ) -> None:
        static = [torch.empty_like(t).copy_(t) for t in live]
        # Views without a shared version counter: the latch checks that operands were not modified since backward.
        entry.extra = [t.data for t in static]

        def update() -> _Nothing:
            before = [_swap(tile, static) for tile in tiles]
            rest = list(static)
            for tile in tiles:
                rest = _put(tile, rest)
            try:
                issue()
            finally:
                for tile, old in zip(tiles, before, strict=True):
                    _put_back(tile, old)
            return _Nothing()

        start = time.perf_counter()
        try:
            entry.recording = self._recorder.record(update)
        except Exception as error:
            entry.refused = f"capture of the tiles' update failed: {error}"
            self._report("refused", entry.refused)
            if self._on_failure == "raise":
                raise GraphCaptureError(entry.refused) from error
            self._recorder.eager(issue)
            return
        self.capture_ms = 1e3 * (time.perf_counter() - start)
        self._report("capture", "")

    def _key(self, tiles: list[TileModule], live: list[Tensor]) -> Hashable:
        shapes = tuple((tuple(t.shape), t.stride(), t.dtype) for t in live)
        pointers = tuple(
            (
                tile.weight.data_ptr(),
                tile.A.data_ptr(),
                tile.B.data_ptr(),
                tile.tile_state.data_ptr(),
                tile.latch.samples if tile.config.transfer_unit == "samples" else 0,  # else nobody reads it
                len(tile.latch.calls),
            )
            for tile in tiles
        )
        return shapes, pointers

    def clear(self) -> None:
        """Let go of all graphs."""
        self._cache.clear()


def _inputs(tile: TileModule) -> list[Tensor]:
    assert tile.A.grad is not None and tile.B.grad is not None
    inputs = [tile.A.grad, tile.B.grad]
    if tile.latch.grad_a is not None and tile.latch.grad_b is not None:
        inputs += [tile.latch.grad_a, tile.latch.grad_b]
    for call in tile.latch.calls:
        inputs += [call.x, call.xb, call.d, call.da]
    return [t.detach() for t in inputs]


def _swap(tile: TileModule, static: list[Tensor]) -> tuple[Any, ...]:
    latch = tile.latch
    return tile.A.grad, tile.B.grad, latch.calls, latch.grad_a, latch.grad_b


def _put(tile: TileModule, static: list[Tensor]) -> list[Tensor]:
    """Give a tile its share of the static tensors; returns the rest."""
    latch = tile.latch
    tile.A.grad, tile.B.grad, *rest = static
    if latch.grad_a is not None:
        latch.grad_a, latch.grad_b, *rest = rest
    calls = []
    for _ in latch.calls:
        x, xb, d, da, *rest = rest
        calls.append(Operands(x, xb, d, da, x._version))
    latch.calls = calls
    return rest


def _put_back(tile: TileModule, old: tuple[Any, ...]) -> None:
    tile.A.grad, tile.B.grad, tile.latch.calls, tile.latch.grad_a, tile.latch.grad_b = old
