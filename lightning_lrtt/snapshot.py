"""Registered state: taken, and put back into the same storage; what changes without being registered is an error."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lrtt import _check

__all__ = ["Snapshot", "UnregisteredStateError"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class UnregisteredStateError(RuntimeError):
    """Something changed that the snapshot does not hold and so could not restore."""


class Snapshot:
    """An explicit registry of state with `take` and `restore`.

    It holds tensors (in any nesting of dicts, lists and tuples), random generators (their whole state, offset included)
    and attributes with Python values, such as counters. The copies are allocated at the first `take` and
    reused. `restore` copies into the registered tensors' own storage, so pointers in a CUDA graph stay valid. Tensors
    can be taken and restored while a graph is captured; generators and values cannot, as the graph would not replay it.

    Example:
        >>> import torch
        >>> state = torch.zeros(2)
        >>> snapshot = Snapshot()
        >>> snapshot.add("state", state)
        >>> snapshot.take()
        >>> _ = state.add_(1)
        >>> snapshot.restore()
        >>> state
        tensor([0., 0.])
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._generators: dict[str, torch.Generator] = {}
        self._values: dict[str, tuple[Any, str]] = {}
        self._saved: dict[str, Tensor] = {}
        self._saved_host: dict[str, Any] = {}
        self._taken = False

    @property
    def names(self) -> tuple[str, ...]:
        """Everything registered, in the order of registration."""
        return (*self._tensors, *self._generators, *self._values)

    @property
    def capturable(self) -> bool:
        """Whether `take` and `restore` can be part of a CUDA graph: only tensors are registered."""
        return not self._generators and not self._values

    def add(self, name: str, value: Any) -> None:
        """Register a tensor, a `torch.Generator`, or a dict, list or tuple of them (named ``name.key``).

        Raises:
            ValueError: If the name is taken.
            TypeError: If there is anything else in ``value``.
        """
        if isinstance(value, Tensor):
            self._claim(name)
            self._tensors[name] = value
        elif isinstance(value, torch.Generator):
            self._claim(name)
            self._generators[name] = value
        elif isinstance(value, Mapping):
            for key, part in value.items():
                self.add(f"{name}.{key}", part)
        elif isinstance(value, (list, tuple)):
            for key, part in enumerate(value):
                self.add(f"{name}.{key}", part)
        else:
            raise TypeError(
                f"Snapshot: {name} must be tensors or generators, got {type(value).__name__}; register a "
                "Python value with add_attribute(name, owner, attribute)"
            )

    def add_attribute(self, name: str, owner: Any, attribute: str) -> None:
        """Register a Python value: an attribute of ``owner``, of which deep copies are taken and put back.

        Raises:
            ValueError: If the name is taken.
            AttributeError: If ``owner`` has no such attribute.
        """
        getattr(owner, attribute)
        self._claim(name)
        self._values[name] = (owner, attribute)

    def _claim(self, name: str) -> None:
        if name in self.names:
            raise _check.fail("Snapshot", "name", "new", name, "every state is registered once")
        self._taken = False

    @torch.no_grad()
    def take(self) -> None:
        """Copy everything registered.

        Raises:
            RuntimeError: While a CUDA graph is captured, if generators or values are registered.
        """
        self._refuse_capture()
        for name, tensor in self._tensors.items():
            if name not in self._saved:
                with torch.inference_mode(False):
                    self._saved[name] = torch.empty_like(tensor)
            self._saved[name].copy_(tensor)
        self._saved_host = {name: generator.get_state() for name, generator in self._generators.items()}
        self._saved_host |= {name: copy.deepcopy(getattr(*value)) for name, value in self._values.items()}
        self._taken = True

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `take` copied; again and again, if asked.

        Raises:
            RuntimeError: Before `take` (a registration asks for a new one), and as in `take`.
        """
        if not self._taken:
            raise RuntimeError("Snapshot: restore must follow take, got no snapshot of what is registered; call take()")
        self._refuse_capture()
        for name, tensor in self._tensors.items():
            tensor.copy_(self._saved[name])
        for name, generator in self._generators.items():
            generator.set_state(self._saved_host[name])
        for name, (owner, attribute) in self._values.items():
            setattr(owner, attribute, copy.deepcopy(self._saved_host[name]))

    def _refuse_capture(self) -> None:
        if not self.capturable and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            held = [*self._generators, *self._values]
            raise RuntimeError(
                f"Snapshot: state must be tensors while a CUDA graph is captured, got {held}; a replay "
                "would not restore them: keep counters in tensors and draw noise from a counter"
            )

    @contextlib.contextmanager
    def guard(self, *roots: Any) -> Iterator[None]:
        """Within it, only registered state may change.

        Looks at everything that hangs on ``roots`` (parameters, buffers, attributes, containers) by identity and
        version of tensors, by value of numbers and strings, and at the global generators of torch, numpy and Python.
        It reads no tensor, so it does not wait for a device; a kernel that writes through a raw pointer is not seen.

        Raises:
            UnregisteredStateError: Naming what changed, appeared or vanished.
        """
        before, drawn = self._fingerprint(roots), self._global_generators()
        yield
        after = self._fingerprint(roots)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        changed += [name for name, state in self._global_generators().items() if not _same(state, drawn.get(name))]
        if changed:
            raise UnregisteredStateError(
                f"Snapshot: state that a window changes must be registered, got changes in {', '.join(changed[:8])}"
                f"{' and more' if len(changed) > 8 else ''}; register it, or create it before the window"
            )

    def _fingerprint(self, roots: Sequence[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        exempt = {tensor.untyped_storage().data_ptr() for tensor in self._tensors.values() if tensor.numel()}
        exempt_generators = {id(generator) for generator in self._generators.values()}
        exempt_attributes = {(id(owner), attribute) for owner, attribute in self._values.values()}
        seen: set[int] = set()
        keep: list[Any] = []  # so that no id is used twice within one walk

        def walk(path: str, value: Any) -> None:
            if isinstance(value, _PLAIN):
                found[path] = repr(value)
                return
            if isinstance(value, Tensor):
                registered = (
                    value.layout == torch.strided and value.numel() and value.untyped_storage().data_ptr() in exempt
                )
                if not registered:
                    found[path] = (id(value), None if value.is_inference() else value._version)
                return
            if isinstance(value, torch.Generator):
                if id(value) not in exempt_generators:
                    found[path] = value.get_state().numpy().tobytes()
                return
            if id(value) in seen or isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)):
                return
            seen.add(id(value))
            keep.append(value)
            if isinstance(value, Mapping):
                found[path] = len(value)
                for key, part in value.items():
                    walk(f"{path}.{key}", part)
            elif isinstance(value, (list, tuple, set, frozenset)):
                found[path] = len(value)
                for key, part in enumerate(value):
                    walk(f"{path}.{key}", part)
            elif isinstance(value, np.ndarray):
                found[path] = value.tobytes()
            elif hasattr(value, "__dict__"):
                for key, part in vars(value).items():
                    if (id(value), key) not in exempt_attributes:
                        walk(f"{path}.{key}", part)

        for root in roots:
            walk(type(root).__name__, root)
        return found

    def _global_generators(self) -> dict[str, Any]:
        known = {id(generator) for generator in self._generators.values()}
        states: dict[str, Any] = {"random": random.getstate(), "numpy.random": tuple(np.random.get_state())[1:3]}
        if id(torch.default_generator) not in known:
            states["torch's CPU generator"] = torch.get_rng_state().numpy().tobytes()
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            for index, generator in enumerate(torch.cuda.default_generators):
                if id(generator) not in known:
                    states[f"torch's generator of cuda:{index}"] = (generator.initial_seed(), generator.get_offset())
        return states


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    return bool(one == other)
