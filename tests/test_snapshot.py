"""snapshot.py: taken state comes back into the same storage, and nothing else may change."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lrtt.snapshot import Snapshot, UnregisteredStateError


class Counting(nn.Module):
    """State of every kind that a system may have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("field", torch.zeros(3))
        self.history: list[float] = []
        self.steps = 0
        self.generator = torch.Generator().manual_seed(5)
        self.plan = {"a": torch.zeros(2), "b": [torch.ones(1)]}


def full(system: Counting) -> Snapshot:
    """Everything registered."""
    snapshot = Snapshot()
    snapshot.add("field", system.field)
    snapshot.add("plan", system.plan)
    snapshot.add("generator", system.generator)
    snapshot.add_attribute("steps", system, "steps")
    return snapshot


def change(system: Counting) -> torch.Tensor:
    """Move all of it; returns what the generator drew."""
    system.field += 1
    system.plan["a"].fill_(7)
    system.plan["b"][0].mul_(3)
    system.steps += 1
    return torch.rand(4, generator=system.generator)


def test_restore_is_idempotent_and_in_place() -> None:
    """Every registered state, generators' offsets included, comes back, twice; storage stays."""
    system = Counting()
    snapshot = full(system)
    assert snapshot.names == ("field", "plan.a", "plan.b.0", "generator", "steps")
    pointers = [t.data_ptr() for t in (system.field, system.plan["a"], system.plan["b"][0])]
    change(system)
    snapshot.take()
    expected = [system.field.clone(), system.plan["a"].clone(), system.plan["b"][0].clone(), system.steps]
    draws = []
    for _ in range(3):
        draws.append(change(system))
        snapshot.restore()
        for value, now in zip(expected, [system.field, system.plan["a"], system.plan["b"][0]], strict=False):
            assert torch.equal(value, now)
        assert system.steps == expected[3]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[1], draws[2])
    assert pointers == [t.data_ptr() for t in (system.field, system.plan["a"], system.plan["b"][0])]


def test_the_guard_lets_registered_state_change() -> None:
    system = Counting()
    with full(system).guard(system):
        change(system)


CHANGES: dict[str, Any] = {
    "weight": lambda s: nn.init.zeros_(s.weight),
    "buffer": lambda s: s.field.add_(1),
    "replaced tensor": lambda s: setattr(s, "field", s.field.clone()),
    "history": lambda s: s.history.append(1.0),
    "counter": lambda s: setattr(s, "steps", 4),
    "lazily created": lambda s: setattr(s, "cache", torch.zeros(1)),
    "in a dict": lambda s: s.plan["b"][0].zero_(),
    "own generator": lambda s: torch.rand(1, generator=s.generator),
    "torch": lambda s: torch.rand(1),
    "numpy": lambda s: np.random.rand(),
    "python": lambda s: random.random(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_guard_names_unregistered_changes(what: str) -> None:
    system = Counting()
    with pytest.raises(UnregisteredStateError, match="must be registered, got changes in"), Snapshot().guard(system):
        CHANGES[what](system)


def test_the_guard_is_quiet_when_nothing_changes() -> None:
    system = Counting()
    with Snapshot().guard(system):
        system.field.add(1)


def test_bad_use() -> None:
    snapshot = Snapshot()
    with pytest.raises(RuntimeError, match="restore must follow take"):
        snapshot.restore()
    snapshot.add("x", torch.zeros(1))
    with pytest.raises(ValueError, match="name must be new, got 'x'"):
        snapshot.add("x", torch.zeros(1))
    with pytest.raises(TypeError, match="y must be tensors or generators, got int"):
        snapshot.add("y", 3)
    snapshot.take()
    snapshot.add("z", torch.zeros(1))
    with pytest.raises(RuntimeError, match="restore must follow take"):
        snapshot.restore()


def test_capturable() -> None:
    snapshot = Snapshot()
    snapshot.add("x", torch.zeros(1))
    assert snapshot.capturable
    snapshot.add("g", torch.Generator())
    assert not snapshot.capturable
