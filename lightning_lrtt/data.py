"""A data loader that can stop in the middle of an epoch and go on later with the very next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_lrtt import _check

__all__ = ["ResumableLoader"]


class ResumableLoader:
    """Batches of a map-style dataset in an order that is a function of ``(seed, epoch)`` alone.

    Lightning saves `state_dict` in its checkpoints and continues with the batch after the last one trained on; with a
    plain DataLoader it starts the epoch's data over. Under torch.distributed every process gets its own part. With
    Lightning's ``overfit_batches`` set ``shuffle=False``.

    Iterating draws nothing from torch's global generator. Randomness inside ``dataset[i]`` is exact after a resume with
    ``num_workers=0`` (the strategy restores the global generators); workers should seed it with the index.

    Args:
        dataset: Map-style dataset.
        batch_size: Samples in a batch, per process, at least 1.
        shuffle: A new permutation in every epoch; otherwise in order.
        seed: Seed of the permutations, at least 0.
        drop_last: Leave out the last batch if it is smaller.
        num_workers: As in `torch.utils.data.DataLoader`.
        collate_fn: As in `torch.utils.data.DataLoader`.
        pin_memory: As in `torch.utils.data.DataLoader`.

    Raises:
        ValueError: If a number is out of range, or a state belongs to another order.

    Example:
        >>> loader = ResumableLoader(range(6), batch_size=2, seed=1)
        >>> batches = iter(loader)
        >>> first, state = next(batches), loader.state_dict()
        >>> resumed = ResumableLoader(range(6), batch_size=2, seed=1)
        >>> resumed.load_state_dict(state)
        >>> [b.tolist() for b in resumed] == [b.tolist() for b in batches]
        True
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[..., Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        _check.integer("ResumableLoader", "batch_size", batch_size, low=1)
        _check.integer("ResumableLoader", "seed", seed, low=0)
        _check.integer("ResumableLoader", "num_workers", num_workers, low=0)
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.shuffle, self.seed = shuffle, seed
        self._rest: dict[str, Any] = {"num_workers": num_workers, "collate_fn": collate_fn, "pin_memory": pin_memory}
        self._epoch = self._batch = 0  # where the last iterator stands
        self._next = (0, 0)  # where the next one starts

    @property
    def batch_sampler(self) -> Any:
        """Where Lightning looks for `set_epoch`. Not ``sampler``: a loader that has one is taken for a DataLoader."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration with this epoch; a position inside it, from `load_state_dict`, is kept."""
        if self._next[0] != epoch:
            self._next = (epoch, 0)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        full, rest = divmod(len(self._order(0)), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing happens before the first batch is asked for, so Lightning's set_epoch, which comes after
        # iter() in a resumed run, is in time.
        self._epoch, self._batch = self._next
        self._next = (self._epoch + 1, 0)
        order = self._order(self._epoch)
        batches = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(self._batch, len(self))]
        base = torch.Generator().manual_seed(_mix(self.seed, self._epoch))  # the workers' seeds
        for batch in DataLoader(self.dataset, batch_sampler=batches, generator=base, **self._rest):
            self._batch += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out in it, and what the order depends on."""
        return {"epoch": self._epoch, "batch": self._batch, "batches": len(self), "order": self._depends_on()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on after the last batch that was handed out."""
        inside = 0 < state["batch"] < state["batches"]
        for name, value in self._depends_on().items():
            if inside and state["order"][name] != value:
                raise _check.fail(
                    "ResumableLoader",
                    name,
                    f"as in the checkpoint, {state['order'][name]!r}",
                    value,
                    "it lies in the middle of an epoch, whose order depends on it",
                )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._next = (self._epoch, self._batch) if state["batch"] < state["batches"] else (self._epoch + 1, 0)

    def _depends_on(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "samples": len(self.dataset),
            "processes": _process()[1],
        }

    @property
    def options(self) -> dict[str, Any]:
        """What is handed to the DataLoader besides dataset, order and batch size."""
        return dict(self._rest)

    def global_order(self, epoch: int) -> list[int]:
        """The samples of all processes in the order of that epoch."""
        size = len(self.dataset)
        if self.shuffle:
            return torch.randperm(size, generator=torch.Generator().manual_seed(_mix(self.seed, epoch))).tolist()
        return list(range(size))

    def _order(self, epoch: int) -> list[int]:
        """The samples of this process; all get equally many, by repeating (or dropping) some at the end."""
        size, (rank, processes) = len(self.dataset), _process()
        order = self.global_order(epoch)
        if processes > 1 and size:
            share = size // processes if self.drop_last else -(-size // processes)
            order = (order * (share * processes // size + 1))[: share * processes]
        return order[rank::processes]


def _mix(seed: int, epoch: int) -> int:
    """32 bits, as many as torch's CPU generator takes; seeds that differ by 1 do not share their epochs."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _process() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
