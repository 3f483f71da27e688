"""What a training step says to Lightning (``self.log``, metrics): written down once, said again after every replay."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from lightning_lrtt.graphs import Finder

_METRIC_METHODS = ("forward", "update", "compute", "reset")


class Deferred:
    """The value of a metric that is not computed yet: it may be logged, and nothing else."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.value: Any = None

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"the value of {self.source} may only be logged in a recorded training_step: metrics run after "
            "every replay, outside the graph"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __float__ = __int__ = __bool__ = __getitem__ = __iter__ = __len__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse

    def __getattr__(self, name: str) -> Any:
        self._refuse()


@dataclass
class Entry:
    """One call, its tensors static."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hook: str | None = None  # the hook that logged
    result: Deferred | None = None

    def __post_init__(self) -> None:
        # Whether an argument is the value of a metric that runs before.
        self.waits = any(isinstance(v, Deferred) for v in pytree.tree_leaves((self.args, self.kwargs)))


@dataclass
class Tape:
    """Calls of ``log``, ``log_dict`` and of metrics, in order.

    Logged tensors are copied within the graph, since the step may go on to change them; arguments of metrics are not,
    and `check` refuses the tape if the step changed them.

    Args:
        module: The LightningModule.
    """

    module: pl.LightningModule
    entries: list[Entry] = field(default_factory=list)
    _versions: list[tuple[Tensor, int, str]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within, calls are written down instead of made."""
        with _shadowed(self.module, self._write_log, self._write_log_dict, self._write_metric):
            yield

    def check(self) -> None:
        """After the step.

        Raises:
            ValueError: If a metric's argument was modified in place after the metric saw it.
        """
        for tensor, version, name in self._versions:
            if tensor._version != version:
                raise ValueError(f"an argument of {name} is modified in place after the metric saw it; give it a copy")
        self._versions.clear()

    def tensors(self) -> list[Tensor]:
        """All static tensors of the entries."""
        return [t for e in self.entries for t in pytree.tree_leaves((e.args, e.kwargs)) if isinstance(t, Tensor)]

    def play(self) -> None:
        """Make every call, with what the static tensors hold now."""
        for entry in self.entries:
            args, kwargs = entry.args, entry.kwargs
            if entry.hook is None:  # a metric may keep its arguments, which the next replay rewrites
                args, kwargs = free((args, kwargs))
            if entry.waits:
                args, kwargs = pytree.tree_map(_value, (args, kwargs))
            previous = self.module._current_fx_name
            if entry.hook is not None:
                self.module._current_fx_name = entry.hook
            try:
                value = entry.call(*args, **kwargs)
            finally:
                self.module._current_fx_name = previous
            if entry.result is not None:
                entry.result.value = value

    # -------------------------------------------------------------- writing

    def _write_log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if why := _frozen(f"self.log({name!r})", value, self.module.device):
            raise TypeError(f"{why}, which a graph would repeat for ever")
        if isinstance(value, Tensor):
            value = value.detach().clone()
        self.entries.append(
            Entry(
                self.module.__class__.log.__get__(self.module),
                (name, value, *args),
                kwargs,
                self.module._current_fx_name,
            )
        )

    def _write_log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(dictionary, (Deferred, MetricCollection)):
            call = self.module.__class__.log_dict.__get__(self.module)
            self.entries.append(Entry(call, (dictionary, *args), kwargs, self.module._current_fx_name))
        else:
            self.module.__class__.log_dict(self.module, dictionary, *args, **kwargs)  # calls self.log for each

    def _write_metric(self, name: str, method: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if why := _frozen(f"{name}.{method}", value, self.module.device):
                raise TypeError(f"{why}, which a graph would repeat for ever: give it a tensor on {self.module.device}")
        args, kwargs = pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
        self._versions += [(t, t._version, name) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = Deferred(name) if method in ("forward", "compute") else None
        self.entries.append(Entry(original, args, kwargs, None, result))
        return result


def _frozen(call: str, value: Any, device: torch.device) -> str:
    """What is wrong with an argument that no replay would renew; flags aside, which do not change."""
    if isinstance(value, Tensor):
        return f"{call} is given a tensor on {value.device}" if value.device != device else ""
    is_number = isinstance(value, numbers.Number) and not isinstance(value, bool)
    return f"{call} is given a Python number" if is_number else ""


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Deferred) else leaf


@contextmanager
def watched(module: pl.LightningModule, finder: Finder) -> Iterator[None]:
    """Within, logging and metrics work as ever but are no findings of ``finder``, except for logged Python numbers."""

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if why := _frozen(f"self.log({name!r})", value, module.device):
            finder.add("frozen", why)
        with finder.pause():
            module.__class__.log(module, name, value, *args, **kwargs)

    def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        module.__class__.log_dict(module, dictionary, *args, **kwargs)  # calls log for each

    def metric(name: str, method: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if why := _frozen(f"{name}.{method}", value, module.device):
                finder.add("frozen", why)
        with finder.pause():
            return original(*args, **kwargs)

    with _shadowed(module, log, log_dict, metric):
        yield


@contextmanager
def _shadowed(module: pl.LightningModule, log: Any, log_dict: Any, metric: Callable[..., Any]) -> Iterator[None]:
    """Attributes of these objects that hide their classes' methods for a while; the classes stay as they are."""
    hidden: list[tuple[nn.Module, str, Any]] = []

    def hide(owner: nn.Module, name: str, function: Any) -> None:
        hidden.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = function

    hide(module, "log", log)
    hide(module, "log_dict", log_dict)
    for name, child in module.named_modules():
        if isinstance(child, (Metric, MetricCollection)):
            for method in _METRIC_METHODS:
                hide(child, method, _caller(metric, name, method, getattr(child, method)))
    try:
        yield
    finally:
        for owner, name, old in reversed(hidden):
            if old is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = old


def _caller(metric: Callable[..., Any], name: str, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return metric(name, method, original, args, kwargs)

    return call


def metric_names(module: nn.Module) -> list[str]:
    """Qualified names of metrics and of everything in them."""
    return [name for name, child in module.named_modules() if isinstance(child, (Metric, MetricCollection))]


def free(values: Any) -> Any:
    """Copies of tensors in a nest, out of the memory that the next replay rewrites."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, values)


def plain(values: Any) -> bool:
    """Whether a nest holds tensors only."""
    return all(isinstance(v, Tensor) for v in pytree.tree_leaves(values))


def detached(values: Any) -> Any:
    """The nest without autograd history."""
    return pytree.tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, values)
