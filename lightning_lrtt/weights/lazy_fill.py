"""Filling a module while it is used: each layer before its first call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from lightning_lrtt.weights.plan import Entry, LoadPlan
from lightning_lrtt.weights.single_flight import SingleFlight

log = logging.getLogger("lightning_lrtt.weights")
# These read weights of their children without calling them: what lies below them is loaded before they are called.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class LazyFill:
    """Installs the hooks of a load that happens on first use, and removes each when its work is done.

    A layer is filled before its first forward pass; saving (``state_dict``) or loading a state dict fills everything
    that is left, so no file ever holds a parameter without values. Until then the first element of each parameter is
    NaN: code that reads a weight around the layer's ``forward`` computes NaN instead of something quietly wrong.

    Args:
        module: Whose parameters are filled; none may be on meta any more.
        plan: What goes where.
        done: Called once, when everything is filled.
    """

    def __init__(self, module: nn.Module, plan: LoadPlan, done: Callable[[], None]) -> None:
        self.plan, self._done = plan, done
        self._flight: SingleFlight[bool] = SingleFlight()
        self._lock = threading.Lock()
        self._filled: set[str] = set()
        self._finished, self._stop = False, threading.Event()
        self._thread: threading.Thread | None = None
        self._work = _by_module(module, plan.entries)
        self._hooks: dict[nn.Module, Any] = {}
        self._others: list[Any] = [
            module.register_state_dict_pre_hook(self._before_all),
            module.register_load_state_dict_pre_hook(self._before_all),
        ]
        for owner in self._work:
            self._hooks[owner] = owner.register_forward_pre_hook(self._before_forward)
            if owner is not module:
                self._others.append(owner.register_state_dict_pre_hook(self._before_state))
                self._others.append(owner.register_load_state_dict_pre_hook(self._before_state))
        with torch.no_grad():
            for entry in plan.entries:
                memory = getattr(entry.owner, entry.attr).detach()
                if memory.is_floating_point() and memory.numel():
                    memory[(0,) * memory.dim()] = torch.nan  # a flat view would be a copy where strides are others
        if not plan.entries:
            self._end()

    @property
    def pending(self) -> list[str]:
        """Names that are not filled yet."""
        return [entry.name for entry in self.plan.entries if entry.name not in self._filled]

    def finish(self) -> None:
        """Fill everything that is left."""
        self._ensure(self.plan.entries)

    def prefetch(self) -> threading.Thread:
        """Start a thread that walks ahead of the forward passes, once; what fails there is raised where it is needed."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._walk, name="lrtt-prefetch", daemon=True)
            self._thread.start()
        return self._thread

    def stop(self) -> None:
        """End the prefetching thread after the tensor that it is at and wait for that; hooks stay."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()  # the module may be moved next, away from memory that is being written to

    def _walk(self) -> None:
        try:
            for entry in self.plan.entries:
                if self._stop.is_set():
                    return
                self._ensure([entry])
        except Exception as error:
            log.warning("lightning_lrtt: prefetching stopped, layers are loaded on first use: %s", error)

    def _ensure(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.name not in self._filled:
                self._flight.do(entry.name, lambda entry=entry: self._fill(entry))  # type: ignore[misc]  # the lambda's default
        if not self._finished and len(self._filled) == len(self.plan.entries):
            self._end()

    def _fill(self, entry: Entry) -> bool:
        if entry.name not in self._filled:  # somebody may have been faster than our look
            self.plan.fill(entry)
            memory = getattr(entry.owner, entry.attr)
            if memory.is_cuda:
                torch.cuda.current_stream(memory.device).synchronize()  # the layer may run on another thread's stream
            self._filled.add(entry.name)
        return True

    def _before_forward(self, owner: nn.Module, *args: Any) -> None:
        self._ensure(self._work[owner])
        hook = self._hooks.pop(owner, None)
        if hook is not None:
            hook.remove()

    def _before_state(self, owner: nn.Module, *args: Any) -> None:
        self._ensure(self._work[owner])

    def _before_all(self, *args: Any) -> None:
        self.finish()

    def _end(self) -> None:
        with self._lock:
            if self._finished:
                return
            self._finished = True
        for hook in (*self._hooks.values(), *self._others):
            hook.remove()
        self._hooks.clear()
        self._done()

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RuntimeError(
            "LazyFill: a module must be filled before it is copied or pickled, but "
            f"{len(self.pending)} tensors are pending; call finish() of its Pretrained first, or use "
            "mode='progressive'"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__(None)


def _by_module(module: nn.Module, entries: list[Entry]) -> dict[nn.Module, list[Entry]]:
    """The module before whose call each entry must be there; of tied parameters every owner."""
    wanted = {id(getattr(entry.owner, entry.attr)): entry for entry in entries}
    found: dict[nn.Module, list[Entry]] = {}
    for name, owner in module.named_modules(remove_duplicate=False):
        own = [wanted[id(t)] for t in (*owner._parameters.values(), *owner._buffers.values()) if id(t) in wanted]
        if not own:
            continue
        parts = name.split(".")
        parents = [module, *(module.get_submodule(".".join(parts[:k])) for k in range(1, len(parts)))] if name else []
        caller = next((parent for parent in parents if isinstance(parent, _READERS)), owner)
        for entry in own:
            if entry not in found.setdefault(caller, []):
                found[caller].append(entry)
    return found
