"""Batches of training steps in static buffers, as soon as a graph is to read them there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_lrtt.callbacks._graph_records import Placed

from lightning_lrtt.graphs import GraphCache, StaticBatch, Unsupported, describe
from lightning_lrtt.graphs.batches import shapes


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
        self._device, self._changing = device, changing
        self._uses: GraphCache[StaticBatch] = GraphCache(most)
        self._kinds: Counter[Hashable] = Counter()
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
            kind, leaves, spec = describe(batch)
        except Unsupported as why:
            return transfer(batch) if self._stock_transfer else batch, Placed(None, "", str(why))
        key = (position, kind)
        use = self._uses.entry((key,))
        if not use.seen:
            self._look_at_values(kind, leaves)
        use.seen += 1
        if use.recording is None and eager is not None and use.seen > eager and self._uses.room((key,)):
            use.recording = StaticBatch(leaves, spec, self._device)
        placed = Placed(key, shapes(leaves), static=use.recording)
        if use.recording is None:
            return transfer(batch) if self._stock_transfer else batch, placed
        return use.recording.fill(leaves), placed

    def clear(self) -> None:
        """Let go of all buffers."""
        self._uses.clear()

    def _look_at_values(self, parts: Any, leaves: list[Any]) -> None:
        """Kinds that differ in Python values only, again and again, will never be replayed."""
        plain = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        if self._told or not plain:
            return
        kind = tuple(part if isinstance(part, tuple) else type(part) for part in parts[1:])  # after the structure
        self._kinds[kind] += 1
        if self._kinds[kind] > _VALUES:
            self._told = True
            self._changing(
                f"the batches hold Python values that change from step to step, such as {str(plain[-1])[:80]!r}, and a graph "
                "freezes them; leave them out in collate_fn, or make them tensors"
            )


_VALUES = 8
