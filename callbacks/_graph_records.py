"""Plain records of `CUDAGraph`: what was asked for, what happened, what a step leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_lrtt.callbacks._graph_tape import Tape
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_lrtt.graphs import FrozenValues, StaticBatch
from lightning_lrtt.nn.latch import Latch


@dataclass
class Options:
    """What `CUDAGraph` was asked for; see there."""

    warmup: int
    max_graphs: int
    on_failure: str
    parity_steps: int
    find_syncs: bool


@dataclass
class Outputs:
    """What a step leaves behind, all tensors static."""

    loss: Tensor
    extra: dict[str, Any]
    tape: Tape
    grads: list[tuple[torch.nn.Parameter, Tensor | None]]
    latches: list[tuple[Latch, dict[str, Any]]]
    zeroes: bool

    def tensors(self) -> list[Tensor]:
        """See `lightning_lrtt.graphs.recorder.Outputs`."""
        latched = [t for _, state in self.latches for t in latched_in(state)]
        extra = [t for t in pytree.tree_leaves(self.extra) if isinstance(t, Tensor)]
        return [self.loss, *extra, *self.tape.tensors(), *(g for _, g in self.grads if g is not None), *latched]


@dataclass
class Placed:
    """The batch of the step in progress."""

    key: Hashable
    words: str
    refused: str = ""
    static: StaticBatch | None = None  # where it lies, if a graph may read it there


@dataclass
class Kept:
    """What belongs to a recording: the buffers that it reads, and the Python values that it froze."""

    static: StaticBatch | None
    frozen: FrozenValues


@dataclass
class Events:
    """Counters and what happened, for the callback to report."""

    captures: int = 0
    replays: int = 0
    eager_steps: int = 0
    capture_ms: float = 0.0
    parity_max_abs: float | None = None
    pool_mib: float = 0.0
    measured: int = 0  # captures when the pool was last measured
    reasons: list[str] = field(default_factory=list)
    on_reason: Callable[[str], None] = lambda reason: None

    def because(self, reason: str) -> None:
        """Note a reason once."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            self.on_reason(reason)


def held_by(latch: Latch) -> dict[str, Any]:
    """What a latch holds now."""
    return {**latch.__dict__, "calls": list(latch.calls)}


def latched_in(held: dict[str, Any]) -> list[Tensor]:
    """The tensors of what `held_by` returned."""
    tensors = [getattr(call, name) for call in held["calls"] for name in ("x", "xb", "d", "da")]
    return tensors + [t for t in (held["grad_a"], held["grad_b"]) if t is not None]
