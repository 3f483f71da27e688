"""Python-side state of modules: what a step changes there, a graph of it would not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["HostState"]

_SIMPLE = (bool, int, float, str, type(None))


class HostState:
    """The plain Python values and the tensors' identities in the attributes of modules, at one moment.

    Args:
        modules: The modules.
        ignore: Attributes that may change.

    Example:
        >>> module = nn.Linear(1, 1)
        >>> module.calls = 0
        >>> before = HostState({"net": module})
        >>> module.calls += 1
        >>> before.changes()
        ['net.calls']
    """

    def __init__(self, modules: dict[str, nn.Module], ignore: frozenset[str] = frozenset()) -> None:
        self._modules, self._ignore = modules, ignore
        self._before = {name: self._read(module) for name, module in modules.items()}

    def changes(self) -> list[str]:
        """Attributes that have another value, or another tensor, than then."""
        found = []
        for name, module in self._modules.items():
            before, now = self._before[name], self._read(module)
            found += [
                f"{name}.{key}".lstrip(".")
                for key in {**before, **now}
                if (key in before) != (key in now) or _differs(before[key], now[key])
            ]
        return found

    def restore(self) -> None:
        """Put the values and tensors of then back."""
        for name, module in self._modules.items():
            before, now = self._before[name], self._read(module)
            for key in now:
                if key not in before:
                    delattr(module, key)
            for key, value in before.items():
                if key not in now or _differs(value, now[key]):
                    setattr(module, key, value)

    def _read(self, module: nn.Module) -> dict[str, Any]:
        kept = (*_SIMPLE, Tensor)
        own = {key: v for key, v in vars(module).items() if isinstance(v, kept) and key not in self._ignore}
        return own | {key: v for key, v in module._buffers.items() if v is not None}


def _differs(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor) or isinstance(now, Tensor):
        return before is not now
    return bool(before != now) and not (before != before and now != now)
