"""How workers trade tree nodes: collectives that only move bytes; every addition is ``segment_sum_``'s."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta

import torch
from torch import Tensor, distributed

from lightning_lrtt.strategies.tree import maximal_nodes, owners, root_program

ALIGNMENT = 64  # bytes, of every dtype's region and of every worker's chunk


class WorkerLostError(RuntimeError):
    """Another worker stopped, or did not come to an exchange in time."""


class Exchange(ABC):
    """One step's traffic: `meet` (point A), `begin`, then write `nodes`, `share` (B), `total` (C).

    Args:
        segments: Segments of a batch.
        rank: This worker.
        workers: How many there are.
        device: Where the gradients are.

    Attributes:
        bytes_sent: What this worker has sent to others since it was set to 0.
    """

    def __init__(self, segments: int, rank: int, workers: int, device: torch.device) -> None:
        self.segments, self.rank, self.workers, self.device = segments, rank, workers, device
        self.owners = owners(segments, workers)
        self.own = self.owners[rank]
        self.counts = [len(maximal_nodes(segments, own)) for own in self.owners]  # nodes of each worker
        self.program = list(root_program(segments, workers))
        self.bytes_sent = 0
        self._ones = torch.ones(sum(self.counts), dtype=torch.float64, device=device)
        self._no_stats = torch.zeros(0, dtype=torch.float64, device=device)

    @abstractmethod
    def meet(self, words: list[int]) -> list[list[int]]:
        """Gather a few 63-bit integers of every worker; returns once all have come.

        Raises:
            WorkerLostError: If one of them does not.
        """

    @abstractmethod
    def begin(self, split: int, size: int, columns: int, operand_bytes: int) -> list[Tensor]:
        """Make room for a step.

        Args:
            split: Bytes of the float32 region, a multiple of `ALIGNMENT`; float64 follows.
            size: Bytes of one node, a multiple of `ALIGNMENT`.
            columns: Numbers in a segment's row.
            operand_bytes: Bytes of a segment's pulse operands; 0: none.

        Returns:
            Where this worker writes its nodes, uint8 ``[size]`` each.
        """

    @abstractmethod
    def share(self, rows: Tensor, operands: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gather rows float64 ``[own, columns]`` and operands uint8 ``[own, operand_bytes]`` of all segments.

        Returns:
            ``[segments, columns]`` and ``[segments, operand_bytes]``; the latter may be memory of the exchange, which lasts
            until the next `meet`.
        """

    @abstractmethod
    def total(self, scale: Tensor) -> Tensor:
        """``scale`` times the sum of all nodes along the tree, uint8 ``[size]``, this worker's own memory."""

    def fail(self) -> None:  # noqa: B027  a hook; collectives end with the process
        """Tell the others that this worker gives up."""

    def close(self) -> None:  # noqa: B027
        """Let go of shared resources."""

    def combine(self, nodes: list[Tensor], out: Tensor, split: int, first: int, scale: Tensor) -> None:
        """Add pieces of all nodes along the tree.

        Args:
            nodes: The pieces, uint8, in the order of workers.
            out: Takes the result, uint8 of the same size.
            split: Bytes of the float32 region.
            first: Where the pieces begin in a node.
            scale: float64 ``[1]``.
        """
        border = min(max(split - first, 0), out.numel())
        for low, high, dtype in ((0, border, torch.float32), (border, out.numel(), torch.float64)):
            if high > low:
                torch.ops.lrtt.segment_sum_(
                    [out[low:high].view(dtype)],
                    [n[low:high].view(dtype) for n in nodes],
                    self._ones,
                    scale,
                    self._no_stats,
                    self.program,
                    False,
                )

    def chunk(self, size: int) -> int:
        """Bytes of the part of a node that one worker adds up."""
        return -(-size // (self.workers * ALIGNMENT)) * ALIGNMENT


class CollectiveExchange(Exchange):
    """Over torch.distributed: all_to_all of the nodes' chunks, all_gather of the sums.

    Args:
        segments: See `Exchange`.
        rank: See `Exchange`.
        workers: See `Exchange`.
        device: See `Exchange`.
        timeout: Seconds that a worker may keep the others waiting.
    """

    def __init__(self, segments: int, rank: int, workers: int, device: torch.device, timeout: float) -> None:
        super().__init__(segments, rank, workers, device)
        self.timeout = timeout
        # Words travel between hosts even where gradients travel between GPUs: nothing is read back from a device, and a
        # worker that is missing is found here, where waiting ends in an exception.
        self._control = (
            distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if workers > 1 else None
        )
        self._split = self._size = -1
        self._most_own = max(len(own) for own in self.owners)

    def meet(self, words: list[int]) -> list[list[int]]:
        if self._control is None:
            return [words]
        mine = torch.tensor(words, dtype=torch.int64)
        all_ = torch.empty(self.workers * len(words), dtype=torch.int64)
        try:
            distributed.all_gather_into_tensor(all_, mine, group=self._control)
        except RuntimeError as error:
            raise lost(self.timeout, str(error).strip().splitlines()[0]) from error
        self.bytes_sent += (self.workers - 1) * mine.nbytes
        return all_.view(self.workers, -1).tolist()

    def begin(self, split: int, size: int, columns: int, operand_bytes: int) -> list[Tensor]:
        if (split, size) != (self._split, self._size):
            self._split, self._size = split, size
            self._padded = self.chunk(size) * self.workers
            self._nodes = torch.zeros(self.counts[self.rank], self._padded, dtype=torch.uint8, device=self.device)
        return [node[:size] for node in self._nodes]

    def share(self, rows: Tensor, operands: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._gather(rows), None if operands is None else self._gather(operands)

    def total(self, scale: Tensor) -> Tensor:
        chunk, mine = self.chunk(self._size), self.counts[self.rank]
        if self.workers == 1:
            out = torch.empty(self._padded, dtype=torch.uint8, device=self.device)
            self.combine(list(self._nodes), out, self._split, 0, scale)
            return out[: self._size]
        # [destination, node, chunk], so that what one worker gets lies together.
        sent = self._nodes.view(mine, self.workers, chunk).transpose(0, 1).contiguous().view(-1)
        received = torch.empty(sum(self.counts) * chunk, dtype=torch.uint8, device=self.device)
        all_ = torch.empty(self._padded, dtype=torch.uint8, device=self.device)
        part = torch.empty(chunk, dtype=torch.uint8, device=self.device)
        try:
            distributed.all_to_all_single(
                received, sent, [count * chunk for count in self.counts], [mine * chunk] * self.workers
            )
            self.combine(list(received.view(-1, chunk)), part, self._split, self.rank * chunk, scale)
            distributed.all_gather_into_tensor(all_, part)
        except RuntimeError as error:
            raise lost(self.timeout, str(error).strip().splitlines()[0]) from error
        self.bytes_sent += (self.workers - 1) * (mine + 1) * chunk
        return all_[: self._size]

    def _gather(self, own: Tensor) -> Tensor:
        """Rows of all segments; workers with fewer segments pad, since collectives want equal sizes."""
        if self.workers == 1:
            return own
        padded = own.new_zeros((self._most_own, own.shape[1]))
        padded[: len(own)] = own
        all_ = own.new_empty((self.workers * self._most_own, own.shape[1]))
        try:
            distributed.all_gather_into_tensor(all_, padded)
        except RuntimeError as error:
            raise lost(self.timeout, str(error).strip().splitlines()[0]) from error
        self.bytes_sent += (self.workers - 1) * padded.nbytes
        most = self._most_own
        return torch.cat([all_[w * most : w * most + len(own)] for w, own in enumerate(self.owners)])

    def close(self) -> None:
        if self._control is not None and distributed.is_initialized():
            distributed.destroy_process_group(self._control)
        self._control = None


def lost(timeout: float, why: str) -> WorkerLostError:
    """The error of a worker that waited in vain."""
    return WorkerLostError(
        f"LRTTDDPStrategy: every worker must come to the exchange within timeout = {timeout:g} s, but {why}. If a worker was "
        "killed or raised an error, its log says why; start again from the last checkpoint (any number of workers will do). "
        "If it is only slow, raise strategy.timeout"
    )
