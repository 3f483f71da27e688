"""The process group of workers that torchrun has started again."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # not in its __all__

log = logging.getLogger(__name__)


def join_after_restart(backend: str, rank: int, workers: int, timeout: timedelta, device: torch.device) -> None:
    """Meet the other workers of this attempt; does nothing in a first attempt or without torchrun.

    torchrun shares one store between all attempts, and torch 2.13 uses the same keys in each of them: a restarted worker may
    read the address of one that is dead, and the group fails or hangs. Here every attempt has keys of its own.

    Args:
        backend: Of torch.distributed.
        rank: Of this worker.
        workers: How many there are.
        timeout: Of the store and the group.
        device: A CUDA device belongs to the group from the start.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == 0 or not shared or distributed.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore(f"attempt_{attempt}", TCPStore(address, port, workers, is_master=False, timeout=timeout))
    distributed.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=workers,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    log.info("lightning_lrtt: worker %d joined attempt %d of torchrun", rank, attempt)
