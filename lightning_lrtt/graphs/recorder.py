"""Recording device work and replaying it: the one place that talks to CUDA's graph API."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaRecorder", "GraphCaptureError", "Mark", "Recorder", "Recording"]


class GraphCaptureError(RuntimeError):
    """A step could not be recorded; nothing of it has run on the device."""


class Outputs(Protocol):
    """What a recorded function returns."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that a replay rewrites and somebody reads afterwards, in a fixed order."""


class Recording(Protocol):
    """A recorded function and the tensors it returned, whose memory every replay rewrites."""

    outputs: Any

    def replay(self) -> None:
        """Run the device work again on what the static tensors hold now."""


class Mark(Protocol):
    """A moment on the device's time line."""

    def ready(self) -> bool:
        """Whether the device has passed it; never waits."""

    def milliseconds_since(self, earlier: Any) -> float:
        """Device time between two moments that are ready."""


class Recorder(Protocol):
    """Runs a function eagerly, or records it for replay.

    `record` does the function's device work exactly once, as an eager call would, and its Python exactly once.
    """

    def eager(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` and return its value."""

    def record(self, function: Callable[[], Any]) -> Recording:
        """Run and record ``function``, which returns `Outputs`.

        Raises:
            Exception: What ``function`` raised, or what the device refused; then no device work was done.
        """

    def mark(self) -> Mark:
        """This moment."""

    def pool_bytes(self) -> int:
        """Device memory that belongs to the recordings, in bytes."""


class CudaRecording:
    """A CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        """One launch on the current stream; never waits for the device."""
        self._graph.replay()


class CudaMark:
    """An event on the current stream."""

    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def ready(self) -> bool:
        """Whether the event has happened."""
        return bool(self._event.query())

    def milliseconds_since(self, earlier: CudaMark) -> float:
        """Time between two events that have happened."""
        return float(earlier._event.elapsed_time(self._event))


class CudaRecorder:
    """CUDA graphs of one device, in one memory pool and captured on one stream.

    Eager calls run on that stream too, so that everything which is made lazily (cuBLAS workspaces, the streams of
    autograd's accumulation nodes) is made where the capture will need it.

    Args:
        device: The CUDA device.

    Example::

        recorder = CudaRecorder(torch.device("cuda:0"))
        for _ in range(3):
            recorder.eager(step)
        recording = recorder.record(step)  # the fourth step
        recording.replay()                 # the fifth
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self.device)
        self._pools: list[Any] = []

    def eager(self, function: Callable[[], Any]) -> Any:
        """Run on the capture stream, ordered between what the current stream has and will have to do."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], Any]) -> CudaRecording:
        """Capture ``function`` and launch the graph once.

        Raises:
            Exception: What ``function`` raised; the random generator and the allocator are as before.
            RuntimeError: If the device refused, for instance at a synchronisation.
        """
        graph = torch.cuda.CUDAGraph()
        if not self._pools:
            self._pools.append(torch.cuda.graph_pool_handle())
        generator = torch.cuda.default_generators[self.device.index]
        random_state = generator.clone_state()
        gc.collect()  # a collection inside the capture could free what a capture may not free
        collecting = gc.isenabled()
        gc.disable()
        try:
            outputs = self._capture(graph, function)
        except BaseException:
            # A capture that the device broke off leaves the generator waiting for its end: it gets a fresh state.
            generator.graphsafe_set_state(random_state)
            self._pools.append(torch.cuda.graph_pool_handle())
            self._pools.pop(0)
            raise
        finally:
            if collecting:
                gc.enable()
        graph.replay()
        return CudaRecording(graph, outputs)

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], Any]) -> Any:
        # Not `torch.cuda.graph`: where the end of a capture fails, it leaves its stream current.
        pool = self._pools[0]
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        failure: BaseException | None = None
        outputs = None
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            # thread_local: loader and logger threads may go on with their own CUDA calls.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            except BaseException as error:
                failure = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                _end_allocation(self.device.index, pool)
                failure = failure or error
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        if failure is not None:
            torch.cuda.synchronize(self.device)
            raise failure
        return outputs

    def mark(self) -> CudaMark:
        """An event on the current stream."""
        return CudaMark()

    def pool_bytes(self) -> int:
        """Segments of the recordings' pool. Walks the allocator's tables: for captures, not for steps."""
        pools = {tuple(pool) for pool in self._pools}
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", ())) in pools)


def _end_allocation(device: int, pool: Any) -> None:
    """Stop sending allocations to a pool after a capture whose end failed before it came to that."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # it had come to that
