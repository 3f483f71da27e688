"""The training data by segments: every segment is fetched and collated alone, so its bits do not depend on who asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_lrtt import _check
from lightning_lrtt.data import ResumableLoader
from lightning_lrtt.strategies.segment_rng import DATA, ORDER, isolated, key, seed_all

_CPU = torch.device("cpu")


class SegmentBatch:
    """This worker's segments of one global batch, each as the user's ``collate_fn`` made it.

    Lightning hands it to ``on_train_batch_start`` and ``on_train_batch_end``; ``training_step`` and the transfer hooks see
    single segments.

    Args:
        segments: Collated segments.
        numbers: Which segments of the global batch they are.
    """

    def __init__(self, segments: list[Any], numbers: range) -> None:
        self.segments, self.numbers = segments, numbers

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.segments)

    def __getitem__(self, index: int) -> Any:
        return self.segments[index]

    def map(self, function: Callable[[Any], Any]) -> SegmentBatch:
        """The batch with ``function`` applied to every segment."""
        return SegmentBatch([function(segment) for segment in self.segments], self.numbers)


def map_segments(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every segment of what the loaders gave (a `SegmentBatch`, or a collection of them)."""
    return apply_to_collection(batch, SegmentBatch, lambda own: own.map(function))


def has_segments(batch: Any) -> bool:
    """Whether the loaders' batch consists of segments."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return any(has_segments(part) for part in batch if isinstance(part, SegmentBatch | Mapping | list | tuple))
    return isinstance(batch, SegmentBatch)


def pick(batch: Any, index: int) -> Any:
    """The worker's ``index``-th segment of what the loaders gave."""
    return apply_to_collection(batch, SegmentBatch, lambda own: own[index])


class _SegmentDataset(Dataset[Any]):
    """Item (key, rows): the collated rows, with random numbers of that key inside ``dataset[i]`` and ``collate_fn``."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, item: tuple[int, list[int]]) -> Any:
        seed, rows = item
        with isolated(_CPU):
            seed_all(seed, _CPU)
            if hasattr(self.dataset, "__getitems__"):
                return self.collate(self.dataset.__getitems__(rows))
            return self.collate([self.dataset[row] for row in rows])


class _Items:
    """The sampler of the inner DataLoader; what it yields is set before every epoch."""

    def __init__(self) -> None:
        self.items: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def _as_it_is(segment: Any) -> Any:
    return segment


class SegmentLoader:
    """This worker's segments of every global batch, in an order that is a function of (seed, epoch).

    Its state is (epoch, global batch), so a run may go on with another number of workers.

    Args:
        loader: The user's DataLoader or `ResumableLoader`; its ``batch_size`` is the global one.
        segments: Segments of a batch.
        own: This worker's.
        seed: Seed of order and of random numbers in the dataset.

    Raises:
        MisconfigurationException: If the batches cannot be cut into equal segments, or the loader cannot be cut at all.
    """

    def __init__(self, loader: Any, segments: int, own: range, seed: int) -> None:
        self.dataset, self._order, self.batch_size, options = _describe(loader, seed)
        drop_last, rows = options.pop("drop_last"), len(self._order(0))
        if self.batch_size % segments:
            below, above = self.batch_size // segments * segments, -(-self.batch_size // segments) * segments
            raise MisconfigurationException(
                f"LRTTDDPStrategy: batch_size must be a multiple of {segments} (it is the global batch of all workers), got "
                f"{self.batch_size}; use {above}" + (f" or {below}" if below else "")
            )
        if rows % self.batch_size and not drop_last:
            raise MisconfigurationException(
                f"LRTTDDPStrategy: the last batch must be whole, got {rows} samples in batches of {self.batch_size}, which "
                f"leaves {rows % self.batch_size}; set drop_last=True"
            )
        if rows < self.batch_size:
            raise MisconfigurationException(
                f"LRTTDDPStrategy: the training set must hold a batch of {self.batch_size}, got {rows} samples; use a smaller "
                "batch_size"
            )
        self.segments, self.own, self.seed = segments, own, seed
        self._rows = rows
        self._items = _Items()
        self._inner = DataLoader(
            _SegmentDataset(self.dataset, options.pop("collate_fn")),
            batch_size=None,
            sampler=self._items,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            **options,
        )
        self._epoch = self._batch = 0  # where the last iterator stands
        self._next = (0, 0)  # where the next one starts

    @property
    def batch_sampler(self) -> Any:
        """Where Lightning looks for `set_epoch`."""
        return SimpleNamespace(sampler=self)

    @property
    def num_workers(self) -> int:
        """Processes that load data, of this worker."""
        return self._inner.num_workers

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration with this epoch; a position inside it, from `load_state_dict`, is kept."""
        if self._next[0] != epoch:
            self._next = (epoch, 0)

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return self._rows // self.batch_size

    def __iter__(self) -> Iterator[SegmentBatch]:
        # A generator: Lightning's set_epoch comes after iter() in a resumed run, and is still in time.
        self._epoch, self._batch = self._next
        self._next = (self._epoch + 1, 0)
        order, share = self._order(self._epoch), self.batch_size // self.segments
        first = [(batch, s) for batch in range(self._batch, len(self)) for s in self.own]
        self._items.items = [
            (
                key(self.seed, DATA, self._epoch, batch, s),
                order[(at := batch * self.batch_size + s * share) : at + share],
            )
            for batch, s in first
        ]
        self._inner.generator.manual_seed(key(self.seed, DATA, self._epoch))
        segments = iter(self._inner)
        for _ in range(self._batch, len(self)):
            own = [next(segments) for _ in self.own]
            self._batch += 1
            yield SegmentBatch(own, self.own)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, global batches handed out in it, and what the order depends on."""
        return {"epoch": self._epoch, "batch": self._batch, "batches": len(self), "order": self._depends_on()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on after the last batch that was handed out.

        Raises:
            ValueError: If the state lies in the middle of an epoch of another order.
        """
        inside = 0 < state["batch"] < state["batches"]
        for name, value in self._depends_on().items():
            if inside and state["order"].get(name) != value:
                raise _check.fail(
                    "LRTTDDPStrategy",
                    name,
                    f"as in the checkpoint, {state['order'].get(name)!r}",
                    value,
                    "it lies in the middle of an epoch, whose order depends on it",
                )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._next = (self._epoch, self._batch) if inside or state["batch"] == 0 else (self._epoch + 1, 0)

    def _depends_on(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch_size": self.batch_size, "samples": self._rows, "segments": self.segments}


def _describe(loader: Any, seed: int) -> tuple[Any, Callable[[int], list[int]], int, dict[str, Any]]:
    """(dataset, order of an epoch, global batch size, options of the inner DataLoader)."""
    if isinstance(loader, ResumableLoader):
        return (
            loader.dataset,
            loader.global_order,
            loader.batch_size,
            {
                "drop_last": loader.drop_last,
                **loader.options,
                "collate_fn": loader.options["collate_fn"] or _default_collate(),
            },
        )
    if not isinstance(loader, DataLoader):
        raise _refuse(
            "a DataLoader or ResumableLoader, whose samples can be cut into segments",
            type(loader).__name__,
            "wrap the data in a map-style Dataset",
        )
    if isinstance(loader.dataset, IterableDataset):
        raise _refuse(
            "over a map-style dataset",
            f"the iterable {type(loader.dataset).__name__}",
            "which rows belong to which segment must be known; give it __getitem__ and __len__",
        )
    sampler_of_batches = loader.batch_sampler
    if type(sampler_of_batches) is not BatchSampler:
        raise _refuse(
            "one that makes its batches itself",
            f"batch_sampler={type(sampler_of_batches).__name__}",
            "use batch_size and sampler",
        )
    sampler = sampler_of_batches.sampler
    if isinstance(sampler, DistributedSampler):
        raise _refuse(
            "without a DistributedSampler",
            type(sampler).__name__,
            "every worker finds its segments itself; use shuffle=True or a sampler over the whole dataset",
        )

    def order(epoch: int) -> list[int]:
        # A random sampler draws from its generator or from the global one; either starts alike in every epoch.
        with isolated(_CPU):
            seed_all(key(seed, ORDER, epoch), _CPU)
            generator = getattr(sampler, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(key(seed, ORDER, epoch))
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            return [int(row) for row in sampler]

    options = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "persistent_workers",
            "collate_fn",
        )
    }
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
    return loader.dataset, order, sampler_of_batches.batch_size, options | {"drop_last": sampler_of_batches.drop_last}


def _default_collate() -> Callable[[list[Any]], Any]:
    return torch.utils.data.default_collate


def _refuse(rule: str, value: str, remedy: str) -> MisconfigurationException:
    return MisconfigurationException(f"LRTTDDPStrategy: the training loader must be {rule}, got {value}; {remedy}")
