"""Static input buffers: a graph reads a batch always at the same addresses."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["StaticBatch", "Unsupported", "describe"]

_PLAIN = (bool, int, float, str, bytes, type(None))


class Unsupported(ValueError):
    """A batch that cannot be held in static buffers."""


def describe(batch: Any) -> tuple[Hashable, list[Any], Any]:
    """What distinguishes one graph's inputs from another's.

    Args:
        batch: Any nest of dicts, lists, tuples and registered containers of tensors and plain Python values.

    Returns:
        The key (structure; shape, strides and dtype of tensors; plain values as they are, since a graph freezes them),
        the leaves and the structure.

    Raises:
        Unsupported: If a leaf is neither a strided tensor nor a plain value.

    Example:
        >>> key, leaves, _ = describe([torch.zeros(4, 2), 3])
        >>> key == describe([torch.ones(4, 2), 3])[0], key == describe([torch.ones(4, 2), 5])[0]
        (True, False)
    """
    leaves, spec = pytree.tree_flatten(batch)
    parts: list[Hashable] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.layout != torch.strided or leaf.is_quantized or leaf.requires_grad:
                raise Unsupported(
                    f"a batch must hold plain strided tensors without gradient, got {leaf.layout}, "
                    f"requires_grad={leaf.requires_grad}"
                )
            parts.append((tuple(leaf.shape), leaf.stride(), leaf.dtype))
        elif isinstance(leaf, _PLAIN):
            parts.append(leaf)
        else:
            raise Unsupported(
                f"a batch must be made of tensors and plain Python values, got {type(leaf).__name__}; "
                "return a dict, list or tuple from collate_fn"
            )
    return tuple(parts), leaves, spec


def shapes(leaves: list[Any]) -> str:
    """The batch in words, for messages: ``(16, 8) float32, (16,) int64``."""
    return ", ".join(
        f"{tuple(v.shape)} {str(v.dtype).removeprefix('torch.')}" if isinstance(v, Tensor) else repr(v) for v in leaves
    )


class StaticBatch:
    """Buffers for all batches of one key.

    Args:
        leaves: Leaves of a first batch.
        spec: Its structure.
        device: Where the buffers lie.

    Example:
        >>> _, leaves, spec = describe({"x": torch.zeros(2)})
        >>> static = StaticBatch(leaves, spec, torch.device("cpu"))
        >>> static.fill([torch.ones(2)])["x"].tolist(), static.bytes
        ([1.0, 1.0], 8)
    """

    def __init__(self, leaves: list[Any], spec: Any, device: torch.device) -> None:
        self._spec = spec
        # Strides as `Tensor.to(device)` would give them, so that eager and static steps choose the same kernels.
        self._leaves = [torch.empty_like(v, device=device) if isinstance(v, Tensor) else v for v in leaves]

    def fill(self, leaves: list[Any]) -> Any:
        """Copy a batch in, from the host without waiting, and return it in its own structure."""
        for own, new in zip(self._leaves, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(new, non_blocking=True)
        return pytree.tree_unflatten(self._leaves, self._spec)

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(v.numel() * v.element_size() for v in self._leaves if isinstance(v, Tensor))
