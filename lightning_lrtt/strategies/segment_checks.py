"""Whether all workers are alike: versions, code and numbers at the start, hashes of the replicas on the way."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from collections.abc import Iterable
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed

from lightning_lrtt._compiled import build_info

_CHUNK = 1 << 20
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


class ReplicaError(RuntimeError):
    """Workers that should hold the same numbers do not."""


@torch.no_grad()
def hash64(tensors: Iterable[Tensor]) -> int:
    """63 bits of the tensors' bits, their order and sizes; computed where they are, read once.

    Example:
        >>> hash64([torch.zeros(3)]) == hash64([torch.zeros(2)])
        False
    """
    total: Tensor | None = None
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if rest := -bits.numel() % 4:
            bits = torch.cat([bits, bits.new_zeros(rest)])
        words = bits.view(torch.int32)
        value = torch.tensor(tensor.numel(), dtype=torch.int64, device=tensor.device)
        for chunk in words.split(_CHUNK):  # integer sums wrap and commute: the same on every device
            place = torch.arange(1, 2 * len(chunk), 2, dtype=torch.int64, device=tensor.device) * _ODD
            place = place ^ (place >> 29)
            value = value * _ODD + (chunk.long() * place).sum()
        total = value if total is None else (total ^ (total >> 31)) * _ODD + value.to(total.device)
    return 0 if total is None else int(total) & (1 << 63) - 1


def identity_card(module: pl.LightningModule, numbers: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What all workers must have in common, by name."""
    try:
        source = inspect.getsource(type(module))
    except (OSError, TypeError):  # made in a notebook or an interpreter
        source = ""
    shapes = repr([(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters()])
    card = {
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "lightning_lrtt build": repr(sorted(build_info().items())),
        "code of the LightningModule": _digest(source),
        "parameters": _digest(shapes),
        "intra-op threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }
    if device.type == "cpu":
        card["CPU features"] = torch.backends.cpu.get_cpu_capability()
        card["MKL/oneDNN settings"] = repr(
            sorted((k, v) for k, v in os.environ.items() if k.startswith(("MKL_", "DNNL_", "ONEDNN_")))
        )
    return card | numbers


def compare_cards(card: dict[str, Any]) -> None:
    """Collective.

    Raises:
        MisconfigurationException: On every worker, naming what differs and where.
    """
    cards: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(cards, card)
    for name in cards[0]:
        for worker, other in enumerate(cards):
            if other.get(name) != cards[0][name]:
                raise MisconfigurationException(
                    f"LRTTDDPStrategy: {name} must be the same on all workers, got {cards[0][name]!r} on worker 0 and "
                    f"{other.get(name)!r} on worker {worker}; start all of them from one environment and one checkout"
                )


def compare_hashes(what: str, hashes: list[int], step: int) -> None:
    """Raise where workers disagree.

    Raises:
        ReplicaError: Naming the workers that differ from the majority.
    """
    usual = max(set(hashes), key=hashes.count)
    others = [worker for worker, value in enumerate(hashes) if value != usual]
    if others:
        raise ReplicaError(
            f"LRTTDDPStrategy: {what} must have the same bits on all workers, got others on worker "
            f"{', '.join(map(str, others))} at optimizer step {step}. Either the machines or builds differ, or something "
            "outside training_step (a callback, a hook) changes parameters on some workers only; start again from the last "
            "checkpoint"
        )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
