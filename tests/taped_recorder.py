"""A recorder without a GPU that replays operators, no Python: values that a graph would freeze are frozen here too.

A digital optimizer has no device form on a CPU, so its lr is frozen as well: runs that are compared keep it constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rerun_recorder import RehearsedGraph, RerunRecorder
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def _storages(nest: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(nest) if isinstance(t, Tensor)}


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Taped:
    """Calls the function once; a replay calls its operators again, and writes their results where the first ones lie."""

    def __init__(self, function: Callable[[], Any]) -> None:
        with _Calls() as mode:
            self.outputs = function()
        self._calls = mode.calls

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            if (
                func._schema.name == "aten::_local_scalar_dense"
            ):  # values of tensors of the host, frozen like all numbers
                continue
            inputs = _storages((args, kwargs))
            fresh = pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(pytree.tree_leaves(result), fresh, strict=True):
                # What lies in an argument's memory was written there, or is a view of it.
                if isinstance(old, Tensor) and old.numel() and old.untyped_storage().data_ptr() not in inputs:
                    old.data.copy_(new)


class TapedRecorder(RerunRecorder):
    """See the module. ``fail`` is raised by captures after the function's Python has run."""

    def record(self, function: Callable[[], Any]) -> Taped:
        undo = self.before_record()
        try:
            recorded = Taped(function)
            if self.fail is not None:
                raise self.fail
        except BaseException:
            undo()
            raise
        return recorded


class TapedGraph(RehearsedGraph):
    """`CUDAGraph` on the CPU, through a `TapedRecorder`."""

    def __init__(self, *args: Any, fail: BaseException | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = TapedRecorder(fail)
