"""Groups of worker processes for the benchmarks of ``lrtt_ddp``: results as they come, and an end to everything.

Workers are forked from a server that has imported everything once (and has not touched a GPU), so a group starts in about
a second where the first import from a cold disk takes long. A group that is not done in time is ended; where each worker
hung is printed by itself (`faulthandler`) three seconds before.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing as mp
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any


class GroupError(RuntimeError):
    """A worker raised, was lost, or did not end in time."""


def group(workers: int, job: Callable[..., Iterator[Any]], *args: Any, limit: float) -> Iterator[tuple[int, Any]]:
    """Run ``job(rank, workers, *args)`` in that many processes and yield (rank, value) of what they yield.

    Args:
        workers: Processes.
        job: A generator function of a module that workers can import.
        args: Its arguments after rank and count.
        limit: Seconds until what is left of the group is killed.

    Raises:
        GroupError: Naming worker and reason.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "torch._dynamo", "lightning_lrtt"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    end = time.monotonic() + limit
    pipes, processes = {}, []
    for rank in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, rank, workers, port, limit - 3, job, args), daemon=True)
        process.start()
        theirs.close()
        pipes[ours] = rank
        processes.append(process)
    last = dict.fromkeys(range(workers), "nothing")
    try:
        while pipes:
            ready = wait(list(pipes), max(end - time.monotonic(), 0.0))
            if not ready:
                late = ", ".join(f"worker {rank} (last: {last[rank]})" for rank in pipes.values())
                raise GroupError(f"{workers} workers: not done within {limit:.0f} s: {late}")
            for pipe in ready:
                rank = pipes[pipe]  # type: ignore[index]
                try:
                    kind, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise GroupError(
                        f"{workers} workers: worker {rank} ended without a word after {last[rank]}"
                    ) from None
                if kind == "error":
                    raise GroupError(f"{workers} workers: worker {rank}: {value}")
                if kind == "end":
                    del pipes[pipe]  # type: ignore[arg-type]
                    continue
                last[rank] = str(value)[:100]
                yield rank, value
    finally:
        for process in processes:
            process.join(5.0 if not pipes else 0.0)
            if process.is_alive():
                process.kill()
                process.join()


def _work(pipe: Any, rank: int, workers: int, port: int, dump: float, job: Any, args: tuple[Any, ...]) -> None:
    import torch

    faulthandler.dump_traceback_later(max(dump, 1.0))
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_lrtt"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # All workers are on this host: gloo would otherwise look the host's name up, which takes long where nobody answers.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        for value in job(rank, workers, *args):
            pipe.send(("value", value))
        pipe.send(("end", None))
    except BaseException:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send(("error", traceback.format_exc()[-3000:]))
    # Without destroy_process_group: after an error in another worker it would wait for that one.
    pipe.close()
    os._exit(0)
