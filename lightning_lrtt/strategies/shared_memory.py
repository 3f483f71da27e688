"""Exchange between CPU workers of one host: slots in shared memory, one writer each, and a futex barrier."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import time
from pathlib import Path

import torch
from torch import Tensor, distributed

from lightning_lrtt import _C
from lightning_lrtt.strategies.exchange import ALIGNMENT, Exchange, lost

_FOLDER = Path("/dev/shm")
_WORDS = 8  # most words of a meeting
_SLICE_MS = 200  # how often a waiting worker looks whether the others are alive


def one_host() -> bool:
    """Whether all workers can share memory and see each other's processes. Collective."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        where: tuple[object, ...] = (
            socket.gethostname(),
            boot,
            os.readlink("/proc/self/ns/pid"),
            _FOLDER.stat().st_dev,
        )
    except OSError:  # not Linux, or no /dev/shm
        where = (socket.gethostname(), os.getpid())  # like nobody else
    hosts: list[object] = [None] * distributed.get_world_size()
    distributed.all_gather_object(hosts, where)
    return all(host == hosts[0] for host in hosts)


class NoSharedMemoryError(RuntimeError):
    """/dev/shm has no room."""


class SharedMemoryExchange(Exchange):
    """Nodes are written where all can read them; every worker adds up its part of all nodes.

    Files are unlinked as soon as all workers have mapped them, so a worker that is killed leaves nothing behind.

    Args:
        segments: See `Exchange`.
        rank: See `Exchange`.
        workers: See `Exchange`.
        timeout: Seconds that a worker may keep the others waiting; one that has ended is found at once.

    Raises:
        NoSharedMemoryError: On all workers alike, if /dev/shm cannot hold what is needed.
    """

    def __init__(self, segments: int, rank: int, workers: int, timeout: float) -> None:
        super().__init__(segments, rank, workers, torch.device("cpu"))
        self.timeout = timeout
        head = -(-_C.barrier_bytes // 4096) * 4096
        self._control = _map(head + 2 * workers * _WORDS * 8, rank)
        self._barrier = self._control.data_ptr()
        self._words = self._control[head:].view(torch.int64).view(2, workers, _WORDS)
        self._meetings = 0
        if rank == 0:
            _C.barrier_init(self._barrier, workers)
        processes: list[object] = [None] * workers
        distributed.all_gather_object(processes, (os.getpid(), _started(os.getpid())))  # after it the barrier is ready
        self._processes: list[tuple[int, str]] = processes  # type: ignore[assignment]  # pairs, from a list of lists
        self._data: Tensor | None = None
        self._need = (0, 0, 0)

    def meet(self, words: list[int]) -> list[list[int]]:
        page = self._words[self._meetings % 2]  # two pages: who is ahead by one meeting does not overwrite this one
        self._meetings += 1
        page[self.rank, : len(words)] = torch.tensor(words, dtype=torch.int64)
        self._wait()
        self.bytes_sent += (self.workers - 1) * len(words) * 8
        return page[:, : len(words)].tolist()

    def begin(self, split: int, size: int, columns: int, operand_bytes: int) -> list[Tensor]:
        operand_bytes = -(-operand_bytes // ALIGNMENT) * ALIGNMENT
        row_bytes = -(-columns * 8 // ALIGNMENT) * ALIGNMENT
        nodes = sum(self.counts)
        if (
            self._data is None
            or self._need < (size, row_bytes, operand_bytes)
            or any(have < need for have, need in zip(self._need, (size, row_bytes, operand_bytes), strict=True))
        ):
            node, row, operand = map(max, self._need, (size, row_bytes, operand_bytes))
            self._need = node, row, operand
            self._data = None
            self._data = _map((nodes + 1) * node + self.segments * (row + operand), self.rank)
        node, row, operand = self._need
        self._split, self._size = split, size
        space = self._data
        self._nodes = [space[i * node : i * node + size] for i in range(nodes)]
        self._result = space[nodes * node : nodes * node + size]
        at = (nodes + 1) * node
        self._rows = space[at : at + self.segments * row].view(self.segments, row)[:, : columns * 8].view(torch.float64)
        at += self.segments * row
        self._operands = space[at:].view(self.segments, operand) if operand else space[at:].view(self.segments, 0)
        first = sum(self.counts[: self.rank])
        return self._nodes[first : first + self.counts[self.rank]]

    def share(self, rows: Tensor, operands: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = slice(self.own.start, self.own.stop)
        self._rows[own] = rows
        if operands is not None:
            self._operands[own, : operands.shape[1]] = operands
        self._wait()
        others = self.workers - 1
        self.bytes_sent += others * (rows.nbytes + (operands.nbytes if operands is not None else 0))
        return self._rows.clone(), None if operands is None else self._operands[:, : operands.shape[1]]

    def total(self, scale: Tensor) -> Tensor:
        chunk = self.chunk(self._size)
        low = min(self.rank * chunk, self._size)
        high = min(low + chunk, self._size)
        self.combine([node[low:high] for node in self._nodes], self._result[low:high], self._split, low, scale)
        self._wait()
        self.bytes_sent += (self.workers - 1) * (self.counts[self.rank] + 1) * chunk
        return self._result.clone()  # clipping writes into gradients

    def fail(self) -> None:
        _C.barrier_fail(self._barrier, self.rank)

    def _wait(self) -> None:
        meeting = _C.barrier_arrive(self._barrier, self.rank)
        start = time.monotonic()
        while (result := _C.barrier_wait(self._barrier, meeting, _SLICE_MS)) != 0:
            if result == 2:
                raise lost(self.timeout, f"worker {_C.barrier_failed(self._barrier)} stopped with an error")
            missing = _C.barrier_missing(self._barrier, meeting)
            dead = [w for w in missing if _started(self._processes[w][0]) != self._processes[w][1]]
            if dead:
                self.fail()
                raise lost(self.timeout, f"the process of worker {', '.join(map(str, dead))} has ended")
            if time.monotonic() - start > self.timeout:
                self.fail()
                raise lost(self.timeout, f"worker {', '.join(map(str, missing))} did not come")


def _map(size: int, rank: int) -> Tensor:
    """Zeroed memory of all workers, uint8 ``[size]``. Collective."""
    name: list[str | None] = [None]
    if rank == 0:
        path = _FOLDER / f"lrtt-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                os.posix_fallocate(
                    file, 0, size
                )  # now: a full /dev/shm would otherwise end a worker at its first write
            finally:
                os.close(file)
            name = [str(path)]
        except OSError:
            path.unlink(missing_ok=True)
    distributed.broadcast_object_list(name)
    if name[0] is None:
        raise NoSharedMemoryError(
            f"LRTTDDPStrategy: /dev/shm must have room for {size / 2**20:.0f} MiB; enlarge it (docker: --shm-size), or set "
            "exchange='collectives'"
        )
    file = os.open(name[0], os.O_RDWR)
    try:
        memory = mmap.mmap(file, size)
    finally:
        os.close(file)
    distributed.barrier()
    if rank == 0:
        os.unlink(name[0])
    return torch.frombuffer(memory, dtype=torch.uint8)


def _started(pid: int) -> str | None:
    """When a process started, so that a number that was given anew is not taken for it; None once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
