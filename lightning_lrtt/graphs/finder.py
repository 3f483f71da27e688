"""Finds, in one ordinary step, what a graph could not hold: host synchronisations and values frozen on the host."""

from __future__ import annotations

import dis
import gc
import inspect
import random
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Finder", "Finding"]

_SYNCS = {
    "aten::_local_scalar_dense": "a value is read (.item(), float(), if tensor:)",
    "aten::equal": "torch.equal returns a Python bool",
    "aten::is_nonzero": "a truth value is read",
    "aten::nonzero": "the size of nonzero's result is read",
    "aten::masked_select": "the size of a masked selection is read",
    "aten::_unique": "the size of unique's result is read",
    "aten::_unique2": "the size of unique's result is read",
    "aten::unique_dim": "the size of unique's result is read",
    "aten::unique_consecutive": "the size of unique's result is read",
    "aten::bincount": "the size of bincount's result is read",
    "aten::_linalg_check_errors": "the error code of a factorisation is read (use the _ex form)",
    "aten::tolist": "values are read",
}
_METHODS = {
    "item": "a value is read",
    "tolist": "values are read",
    "numpy": "values are read",
    "cpu": "a copy to the host waits",
}
_MADE_ON_HOST = "a tensor is made on the host and copied to the device (torch.full and the like make it there)"
_OWN = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finding:
    """One thing that a graph cannot hold.

    Args:
        kind: ``sync`` (waits for the device) or ``frozen`` (a host value that a graph would repeat for ever).
        what: What happens there.
        where: ``file:line`` of the code that caused it, or ``in backward``.
    """

    kind: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


class Finder:
    """Watches one step without changing it, on any device.

    Every operator that reaches the dispatcher is looked at, and so are calls of tensor methods and of Python's clocks
    and generators from code outside the libraries.

    Args:
        device: Where the model is. On CUDA only work on that device can wait for it; on a CPU, everything counts as if
            the model were on a GPU.
        frozen: Names of functions, by code object, whose value changes from step to step.

    Example:
        >>> finder = Finder(torch.device("cpu"))
        >>> with finder.watch():
        ...     _ = torch.ones(3).sum().item()
        >>> finder.findings[0].kind
        'sync'
    """

    def __init__(self, device: torch.device, frozen: dict[CodeType, str] | None = None) -> None:
        self.device, self.frozen = device, frozen or {}
        self._found: dict[Finding, None] = {}
        self._codes: dict[int, CodeType] = {}
        self._all_seen = True
        self._paused = 0

    @property
    def findings(self) -> list[Finding]:
        """Everything found so far, each once; a place that is found twice is told with its most exact cause."""
        places: dict[tuple[str, str], Finding] = {}
        for finding in self._found:
            places.setdefault((finding.kind, finding.where), finding)
        return list(places.values())

    @property
    def names(self) -> set[str] | None:
        """Names and strings in all code that ran, so of every attribute that it can have read; None if not all was seen."""
        if not self._all_seen:
            return None
        found: set[str] = set()
        for code in self._codes.values():
            found.update(code.co_names)
            found.update(value for value in code.co_consts if isinstance(value, str))
        return found

    def add(self, kind: str, what: str, where: str | None = None) -> None:
        """Note something; ``where`` defaults to the code that is running."""
        if not self._paused:
            self._found.setdefault(Finding(kind, what, where or location()))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Look at everything within. A profiler that is at work is left alone; then operators only are seen."""
        free, before = sys.getprofile() is None, _numpy_state()
        collecting = gc.isenabled()
        gc.disable()  # what a collection calls (a clock, in hypothesis; finalisers) is no part of the step
        if free:
            sys.setprofile(self._on_call)
        else:
            self._all_seen = False
        try:
            with _Dispatch(self):
                yield
        finally:
            if free:
                sys.setprofile(None)
            if collecting:
                gc.enable()
        if _numpy_state() != before:  # its compiled methods call no profiler
            self.add("frozen", "random numbers are drawn on the host (numpy.random)", "an unknown line")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within, nothing is noted: for what will not be part of the graph."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # -------------------------------------------------------------- operators

    def look(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """One operator call."""
        if self._paused:
            return
        name = function._schema.name
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        here = [t for t in inputs if t.device == self.device]
        if here and (what := _SYNCS.get(name) or _mask(name, args, kwargs)):
            self.add("sync", what)
        if self.device.type == "cpu":
            return
        if name == "aten::lift_fresh" and outputs and outputs[0].device == self.device:  # torch.tensor, as_tensor
            self.add("sync", _MADE_ON_HOST)
        crossing = {t.device.type for t in inputs + outputs} - {"meta"}
        if name in ("aten::_to_copy", "aten::copy_") and len(crossing) > 1:
            waits = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            to_host = outputs and outputs[0].device.type == "cpu"
            self.add("sync" if waits or to_host else "frozen", "a copy to the host waits" if to_host else _MADE_ON_HOST)
        elif torch.Tag.nondeterministic_seeded in function.tags and outputs and outputs[0].device.type == "cpu":
            self.add("frozen", f"{name.removeprefix('aten::')} draws random numbers on the host")

    # -------------------------------------------------------------- Python calls

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._paused:
            return
        if event == "call":
            self._codes[id(frame.f_code)] = frame.f_code
            if frame.f_code.co_name == "compile_wrapper":  # torch.compile's code reads attributes under no name
                self._all_seen = False
            name = self.frozen.get(frame.f_code)
            if name and frame.f_back is not None and not _in_tools(frame.f_back.f_code.co_filename):
                self.add("frozen", f"{name} is read, a Python number", _place(frame.f_back))
        elif event == "c_call":
            owner, name = getattr(argument, "__self__", None), getattr(argument, "__name__", "")
            if name in _METHODS and isinstance(owner, Tensor):
                if owner.device == self.device:
                    self.add("sync", f"{_METHODS[name]} (.{name}())", location(frame))
            elif isinstance(owner, random.Random) and name in ("random", "getrandbits"):
                self.add("frozen", "random numbers are drawn on the host", location(frame))
            elif owner is time and not _in_tools(frame.f_code.co_filename):
                self.add("frozen", f"time.{name}() is read", _place(frame))


class _Dispatch(TorchDispatchMode):
    def __init__(self, finder: Finder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._finder = finder

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._finder.look(func, args, kwargs or {}, result)
        return result


def _numpy_state() -> tuple[bytes, int]:
    state: Any = np.random.get_state(legacy=True)
    return np.asarray(state[1]).tobytes(), int(state[2])


def _mask(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        masks = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        fills = name != "aten::index" and args[2].numel() == 1  # becomes masked_fill
        return "the size of a selection by a boolean mask is read (use torch.where)" if masks and not fills else ""
    if name == "aten::repeat_interleave":
        given = kwargs.get("output_size") is not None
        return "" if given else "the size of repeat_interleave's result is read (give output_size)"
    return ""


def location(frame: FrameType | None = None) -> str:
    """``file:line`` of the innermost running code outside the libraries; failing that, outside torch."""
    if frame is None:
        if threading.current_thread() is not threading.main_thread() and not _own_frames(sys._getframe(1)):
            return "in backward"
        frame = sys._getframe(1)
    inner = None
    while frame is not None:
        name = frame.f_code.co_filename
        if not _in_library(name):
            return _place(frame)
        if inner is None and not _within(name, _TORCH) and not _within(name, _GRAPHS):
            inner = _place(frame)
        frame = frame.f_back
    return inner or "in backward"


def _own_frames(frame: FrameType | None) -> bool:
    return any(not _in_library(f.f_code.co_filename) for f, _ in traceback.walk_stack(frame))


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _within(name: str, folder: str) -> bool:
    return name.startswith(folder)


_TORCH = str(Path(torch.__file__).resolve().parent) + "/"
_GRAPHS = str(_OWN / "graphs") + "/"
_LIBRARIES: dict[str, bool] = {}
_TOOLS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
_FOLDERS = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")})
_OWN_CALLBACKS = str(_OWN.parent / "callbacks") + "/"  # an editable install runs them from there


def _in_library(name: str) -> bool:
    """Whether a file belongs to Python, an installed package or this one."""
    known = _LIBRARIES.get(name)
    if known is None:
        folders = (*_FOLDERS, str(_OWN) + "/", _OWN_CALLBACKS)
        known = name.startswith("<") or any(name.startswith(f) for f in folders) or "site-packages" in name
        _LIBRARIES[name] = known
    return known


def _in_tools(name: str) -> bool:
    """Whether a file belongs to Python, to what this package stands on or to this one.

    A user's model may itself be an installed package: what it reads counts as much as in a script.
    """
    if not _in_library(name) or _within(name, str(_OWN) + "/") or _within(name, _OWN_CALLBACKS):
        return _in_library(name)
    package = name.rpartition("-packages/")[2].partition("/")[0]
    return package in _TOOLS if "-packages/" in name else True


def of_the_user(function: Callable[..., Any]) -> bool:
    """Whether a function, a method or a callable object is written outside the libraries."""
    while isinstance(function, partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code is not None and not _in_library(code.co_filename)


def read_argument(function: Callable[..., Any], position: int) -> str:
    """Name of a parameter that a function's own code reads (``*args`` if it comes in there); empty if it leaves it alone.

    Args:
        function: Python function; wrappers are looked through.
        position: Which parameter, the first after ``self`` being 0.
    """
    try:
        function = inspect.unwrap(function)
        code = getattr(function, "__func__", function).__code__
        parameters = list(inspect.signature(function).parameters.values())
    except (AttributeError, TypeError, ValueError):
        return ""
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [p.name for p in parameters if p.kind == p.VAR_POSITIONAL]
    if position >= len(names) and not rest:
        return ""
    name = names[position] if position < len(names) else rest[0]
    pending = [code]
    while pending:
        current = pending.pop()
        pending += [c for c in current.co_consts if isinstance(c, CodeType)]
        for instruction in dis.get_instructions(current):
            values = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
            if "LOAD" in instruction.opname and name in values:  # also the fused ones, which begin with STORE
                return name if position < len(names) else f"*{name}"
    return ""
