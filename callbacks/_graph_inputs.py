"""Batches of training steps in static buffers, as soon as a graph is to read them there."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_lrtt.callbacks._graph_records import Placed

from lightning_lrtt.graphs import StaticBatch, Unsupported, describe
from lightning_lrtt.graphs.batches import shapes


@dataclass
class _Use:
    """Batches of one key: how many there were, the number of the last, and their buffers once a graph may read them."""

    count: int = 0
    last: int = 0
    static: StaticBatch | None = None


class StepInputs:
    """Puts training batches where steps read them.

    A batch of an eager step is the user's own, as without graphs: it may be kept. Buffers are made for the step that may be
    captured and those after it.

    Args:
        trainer: The Trainer.
        module: Its module.
        device: Where the module is.
        most: Kinds of batches with buffers; another one takes the place of one that has rested, as in a `GraphCache`.
        changing: Told once of a Python value in the batches that is another one all the time.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        device: torch.device,
        most: int,
        changing: Callable[[str], None],
    ) -> None:
        self._device, self._most, self._changing = device, most, changing
        self._uses: OrderedDict[Hashable, _Use] = OrderedDict()
        self._kinds: Counter[Hashable] = Counter()
        self._now = 0
        self._told = False
        self._stock_transfer = not any(
            is_overridden(hook, owner)
            for owner in (module, trainer.datamodule)  # type: ignore[attr-defined]  # set by a connector
            if owner is not None
            for hook in ("transfer_batch_to_device", "on_after_batch_transfer")
        )

    def place(self, batch: Any, transfer: Callable[[Any], Any], position: int, eager: int | None) -> tuple[Any, Placed]:
        """The batch on the device, and what is known of it.

        Args:
            batch: As the loader gave it.
            transfer: What moves it as without graphs.
            position: Its place in a window of accumulated micro-batches, whose operands must all live until the update.
            eager: Steps of a kind that run eagerly at first; None: all of them.
        """
        if not self._stock_transfer:
            batch = transfer(batch)
        try:
            key, leaves, spec = describe(batch)
        except Unsupported as why:
            return transfer(batch) if self._stock_transfer else batch, Placed(None, "", str(why))
        key = (position, key)
        use = self._use(key, leaves)
        use.count += 1
        placed = Placed(key, shapes(leaves))
        if use.static is None and eager is not None and use.count > eager and self._room():
            use.static = StaticBatch(leaves, spec, self._device)
        placed.static = use.static
        if use.static is None:
            return transfer(batch) if self._stock_transfer else batch, placed
        return use.static.fill(leaves), placed

    def clear(self) -> None:
        """Let go of all buffers."""
        self._uses.clear()

    def _use(self, key: Any, leaves: list[Any]) -> _Use:
        use = self._uses.get(key)
        if use is None:
            idle = [k for k, u in self._uses.items() if u.static is None] if len(self._uses) >= _KINDS else []
            for old in idle[: _KINDS // 2]:
                del self._uses[old]
            use = self._uses[key] = _Use()
            self._look_at_values(key[1][1:], leaves)
        self._uses.move_to_end(key)
        self._now += 1
        use.last = self._now
        return use

    def _room(self) -> bool:
        """Whether another kind may have buffers; makes room for it."""
        held = [use for use in self._uses.values() if use.static is not None]  # the least recently used first
        if len(held) < self._most:
            return True
        if self._now - held[0].last < _PATIENCE:
            return False
        held[0].static = None  # a graph that reads them is captured anew, should the kind come back
        return True

    def _look_at_values(self, parts: tuple[Hashable, ...], leaves: list[Any]) -> None:
        """Kinds that differ in Python values only, again and again, will never be replayed."""
        plain = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        if self._told or not plain:
            return
        kind = tuple(part if isinstance(part, tuple) else type(part) for part in parts)
        self._kinds[kind] += 1
        if self._kinds[kind] > _VALUES:
            self._told = True
            self._changing(
                f"the batches hold Python values that change from step to step, such as {str(plain[-1])[:80]!r}, and a graph "
                "freezes them; leave them out in collate_fn, or make them tensors"
            )


_VALUES = 8
_KINDS = 256
_PATIENCE = 100  # batches
