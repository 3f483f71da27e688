"""Memory for parameters on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lrtt.nn import TileModule

_TILE_OWN = ("A", "B", "tile_state", "tile_counts")


def uninitialised(module: nn.Module) -> list[str]:
    """Names of all parameters and buffers on the meta device that `materialize` leaves without values."""
    return [
        f"{prefix}.{attr}" if prefix else attr
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for attr, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if tensor is not None and tensor.is_meta and not (isinstance(owner, TileModule) and attr in _TILE_OWN)
    ]


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer on the meta device uninitialised memory on ``device``; ties stay ties.

    On the CPU untouched memory costs nothing yet. Tiles get fresh counters.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for attr, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and tensor.is_meta:
                places.setdefault(id(tensor), []).append((owner, attr))
    for owner in dict.fromkeys(owner for tied in places.values() for owner, _ in tied):
        if isinstance(owner, TileModule):
            owner.materialize(device)
        else:
            owner.to_empty(device=device, recurse=False)
    for (first, attr), *others in places.values():
        for owner, other in others:
            kind = owner._parameters if other in owner._parameters else owner._buffers
            kind[other] = getattr(first, attr)
