"""Python-side state of modules: what a step changes there, a graph of it would not; what changes there, a graph froze."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["FrozenValues", "HostState", "tensor_slots"]

_SIMPLE = (bool, int, float, str, type(None))
_SIMPLE_TYPES = frozenset(_SIMPLE)
_CONTAINERS = (list, dict, set, deque)
# Have their own ways of keeping a step's traces apart, or none.
_NOT_LOOKED_INTO = (
    nn.Module,
    Tensor,
    type,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    ModuleType,
    np.random.Generator,
    *_SIMPLE,
    *_CONTAINERS,
)
_LIBRARIES = frozenset(
    {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "lightning_lrtt"}
)


@dataclass
class _Slot:
    """One attribute: where it stands, what it holds, and what makes a change of it visible."""

    holder: dict[str, Any]
    key: str
    value: Any
    mark: Any
    content: Any = None  # a shallow copy of a container

    def put_back(self) -> None:
        self.holder[self.key] = self.value
        if isinstance(self.value, np.random.Generator):
            self.value.bit_generator.state = pickle.loads(self.mark)
        elif isinstance(self.value, (list, deque)):
            self.value.clear()
            self.value.extend(self.content)
        elif isinstance(self.value, (dict, set)):
            self.value.clear()
            self.value.update(self.content)


class HostState:
    """What the attributes of modules hold on the host, at one moment.

    That is: plain Python values, which tensors there are, the elements of lists, dicts, sets and deques, the states of
    NumPy's generators; all of it in the modules' attributes and, one level deep, in those of plain objects that they hold.

    Args:
        modules: The modules.
        ignore: Attributes that may change.

    Example:
        >>> module = nn.Linear(1, 1)
        >>> module.calls, module.outputs = 0, []
        >>> before = HostState({"net": module})
        >>> module.calls += 1
        >>> module.outputs.append(1.0)
        >>> before.changes()
        ['net.calls', 'net.outputs']
    """

    def __init__(self, modules: Mapping[str, nn.Module], ignore: frozenset[str] = frozenset()) -> None:
        self._modules, self._ignore = modules, ignore
        self._before = self._read()

    def changes(self) -> list[str]:
        """Attributes that have another value, another tensor or other elements than then."""
        return [name for name, _, _ in self._differences()]

    def restore(self) -> None:
        """Put the values, tensors and elements of then back."""
        for _, before, now in self._differences():
            if before is not None:
                before.put_back()
            elif now is not None:
                now.holder.pop(now.key, None)

    def _differences(self) -> list[tuple[str, _Slot | None, _Slot | None]]:
        before, now = self._before, self._read()
        return [
            (name, before.get(name), now.get(name))
            for name in {**before, **now}
            if name not in before or name not in now or _differs(before[name].mark, now[name].mark)
        ]

    def _read(self) -> dict[str, _Slot]:
        slots = {}
        for place, holder in _holders(self._modules, self._ignore):
            for key, value in holder.items():
                if key in self._ignore:
                    continue
                if isinstance(value, _CONTAINERS):
                    if not key.startswith("_"):  # torch's and Lightning's own
                        slots[place + key] = _Slot(holder, key, value, _elements(value), value.copy())
                elif isinstance(value, np.random.Generator):
                    slots[place + key] = _Slot(holder, key, value, pickle.dumps(value.bit_generator.state))
                elif isinstance(value, (*_SIMPLE, Tensor)):
                    slots[place + key] = _Slot(holder, key, value, value)
        return slots


class FrozenValues:
    """What a graph of a step of ``modules`` read on the host and holds for ever, compared with the present in microseconds.

    Plain Python values are compared by value, tensors and other objects by identity; the values in plain objects too, one
    level deep.

    Args:
        modules: The modules.
        names: Attributes that the step's code may read; None: any of them.
        ignore: Attributes that may change.

    Example:
        >>> module = nn.Dropout(0.1)
        >>> frozen = FrozenValues({"drop": module}, {"p"})
        >>> frozen.changed()
        []
        >>> module.p = 0.2
        >>> frozen.changed()
        ['drop.p']
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], names: set[str] | None = None, ignore: frozenset[str] = frozenset()
    ) -> None:
        self._modules, self._names, self._ignore = modules, names, ignore
        self._holders: list[dict[str, Any]] = []
        self._lengths: list[int] = []
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._values: list[Any] = []
        self._frozen = self._collect()

    def changed(self) -> list[str]:
        """Attributes that hold something else than at the start; empty most of the time, and then at once."""
        if [len(holder) for holder in self._holders] == self._lengths:
            now = [v if (v := holder.get(key)).__class__ in _SIMPLE_TYPES else id(v) for holder, key in self._slots]
            if now == self._values:
                return []
        old, new, gone = self._frozen, self._collect(), object()
        found = [name for name in {**old, **new} if _differs(old.get(name, gone), new.get(name, gone))]
        if found:
            self._lengths = []  # the next call compares names again
        return found

    def _collect(self) -> dict[str, Any]:
        """What the attributes hold, by name; afterwards `changed` looks where they stand now."""
        found = list(_holders(self._modules, self._ignore))
        self._holders = [holder for _, holder in found]
        self._lengths = [len(holder) for holder in self._holders]
        self._slots, self._values = [], []
        named: dict[str, Any] = {}
        for place, holder in found:
            for key, value in holder.items():
                if key in self._ignore or not (self._names is None or key in self._names):
                    continue
                if key.startswith("_") and not isinstance(value, (*_SIMPLE, Tensor)):  # torch's and Lightning's own
                    continue
                named[place + key] = value if value.__class__ in _SIMPLE_TYPES else id(value)
                self._slots.append((holder, key))
                self._values.append(named[place + key])
        return named


def tensor_slots(modules: Mapping[str, nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """Where plain attributes, no parameters or buffers, hold tensors that a step may write to.

    Args:
        modules: The modules.

    Returns:
        Dictionary and key of each.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> module.mean = module.weight.detach().mean()
        >>> [key for _, key in tensor_slots({"": module})]
        ['mean']
    """
    return [
        (holder, key)
        for _, holder in _holders(modules, frozenset(), buffers=False)
        for key, value in holder.items()
        if isinstance(value, Tensor) and value.grad_fn is None and value.is_contiguous()
    ]


def _holders(
    modules: Mapping[str, nn.Module], ignore: frozenset[str], buffers: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dictionaries of attributes, and what stands before an attribute's name."""
    for name, module in modules.items():
        own = vars(module)
        yield f"{name}.".lstrip("."), own
        if buffers and module._buffers:
            yield f"{name}.".lstrip("."), module._buffers
        for key, value in own.items():
            if value.__class__ in _SIMPLE_TYPES or key.startswith("_") or key in ignore:
                continue
            if isinstance(value, _NOT_LOOKED_INTO) or type(value).__module__.partition(".")[0] in _LIBRARIES:
                continue
            inner = getattr(value, "__dict__", None)
            if inner:
                yield f"{name}.{key}.".lstrip("."), inner


def _elements(container: Any) -> tuple[Any, ...]:
    items = container.items() if isinstance(container, dict) else ((v,) for v in container)
    return (id(container), *(tuple(map(id, item)) for item in items))


def _differs(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor) or isinstance(now, Tensor):
        return before is not now
    return bool(before != now) and not (before != before and now != now)
