"""What a step exchanges, and where it lies in a node; agreed by all workers before anything moves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed

from lightning_lrtt.strategies.exchange import ALIGNMENT, Exchange

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Contents:
    """What a segment produced, by number.

    Args:
        gradients: Parameters with a gradient.
        buffers: Floating-point buffers that changed.
        logs: (name, reduction) of logged values, sorted.
        operands: For each call of each pulsed tile: (tile, then shape and dtype of x, X_B, D, D_A); the same in every
            segment.
        samples: Samples that each tile saw.
    """

    gradients: tuple[int, ...] = ()
    buffers: tuple[int, ...] = ()
    logs: tuple[tuple[str, str], ...] = ()
    operands: tuple[tuple[Any, ...], ...] = ()
    samples: tuple[int, ...] = ()

    @cached_property
    def fingerprint(self) -> int:
        """63 bits of it."""
        words = repr((self.gradients, self.buffers, self.logs, self.operands, self.samples))
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1

    def joined(self, other: Contents) -> Contents:
        """What two segments (or workers) exchange together.

        Raises:
            MisconfigurationException: If they logged other names, or called pulsed layers otherwise.
        """
        if self == other:
            return self
        if self.logs != other.logs:
            names = sorted({name for name, _ in set(self.logs) ^ set(other.logs)})
            raise MisconfigurationException(
                f"LRTTDDPStrategy: training_step must log the same names in every segment, got {', '.join(names)} in "
                "some only; log them always, or not from training_step"
            )
        if self.operands != other.operands or self.samples != other.samples:
            raise MisconfigurationException(
                "LRTTDDPStrategy: every segment must call each tile with the same shapes, got "
                f"{_difference(self, other)}; pad the samples to one size in the dataset"
            )
        return Contents(
            tuple(sorted({*self.gradients, *other.gradients})),
            tuple(sorted({*self.buffers, *other.buffers})),
            self.logs,
            self.operands,
            self.samples,
        )


def _difference(one: Contents, other: Contents) -> str:
    if one.samples != other.samples:
        return f"{one.samples} and {other.samples} samples"
    return f"{one.operands} and {other.operands}"


class Agreement:
    """Finds the `Contents` of all workers; what was agreed once costs one meeting of two words."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Contents] = {}

    def agree(self, exchange: Exchange, own: Contents, step: int) -> Contents:
        """Collective.

        Raises:
            RuntimeError: If the workers are at different steps.
        """
        words = exchange.meet([own.fingerprint, step])
        if any(other != step for _, other in words):
            raise RuntimeError(
                f"LRTTDDPStrategy: all workers must be at one step, got {[s for _, s in words]}; the code of "
                "training_step or of a callback differs between workers"
            )
        prints = tuple(f for f, _ in words)
        if prints not in self._known:
            contents = own
            if len(set(prints)) > 1:
                everyone: list[Any] = [None] * exchange.workers
                distributed.all_gather_object(everyone, own)
                for other in everyone:
                    contents = contents.joined(other)
            self._known[prints] = contents
        return self._known[prints]


@dataclass(frozen=True)
class Place:
    """A tensor's place in a node, in bytes."""

    first: int
    last: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, node: Tensor) -> Tensor:
        """The tensor in a node, uint8 ``[size]``."""
        return node[self.first : self.last].view(self.dtype).view(self.shape)


class Layout:
    """Places of gradients and buffers: float32 first, then float64, each region aligned.

    Args:
        tensors: Parameters, then buffers, in the order of the places.
        names: Their names, for errors.

    Raises:
        MisconfigurationException: For other dtypes.
    """

    def __init__(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        for tensor, name in zip(tensors, names, strict=True):
            if tensor.dtype not in _DTYPES:
                raise MisconfigurationException(
                    f"LRTTDDPStrategy: {name} must be float32 or float64, got {tensor.dtype}; keep parameters and buffers "
                    "whole "
                    "and use precision='bf16-mixed'"
                )
        self.places: list[Place] = [None] * len(tensors)  # type: ignore[list-item]  # all are filled below
        at, self.split = 0, 0
        for dtype in _DTYPES:
            for i, tensor in enumerate(tensors):
                if tensor.dtype == dtype:
                    size = tensor.numel() * tensor.element_size()
                    self.places[i] = Place(at, at + size, dtype, tensor.shape)
                    at += size
            at = -(-at // ALIGNMENT) * ALIGNMENT
            if dtype == torch.float32:
                self.split = at
        self.size = max(at, ALIGNMENT)
