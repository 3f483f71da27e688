"""LRTT: an optimizer that moves tiles by LR-TT and every other parameter by an ordinary optimizer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed
from torch.optim import SGD, Optimizer

from lightning_lrtt import _check, tile_step
from lightning_lrtt.nn.analog import number_samples
from lightning_lrtt.nn.tile import TileLink, TileModule
from lightning_lrtt.ops import COUNTS, STEP

__all__ = ["LRTT", "NonFiniteError"]

_REDUCED: ContextVar[bool] = ContextVar("lrtt_reduced", default=False)


class NonFiniteError(RuntimeError):
    """An operand of an update was NaN or infinite; the update was skipped."""


class LRTT(Optimizer):
    """Low-rank Tiki-Taka for tiles, ``digital`` for the rest.

    One step, from the pre-step values of A and B: ``A -= eta D^T X_B``, ``B -= eta D_A^T x`` with ``eta = lr alpha s_r``
    (pulse trains on a pulsed tile, exact otherwise), then the counter, and where it is due ``C += tau A B`` and fresh
    factors. On a pulsed tile eta also follows what was done to ``p.grad`` after backward (clipping, unscaling):
    ``eta *= <p.grad, g0> / <g0, g0>``, with g0 the gradient as backward left it. Tiki-Taka is Gokmen & Haensch's (2020);
    docs/algorithm.md derives the low-rank form.

    Groups, ``state`` and ``defaults`` are those of the digital optimizer, so learning-rate schedulers and checkpoints
    work as usual; all state of the tiles is in their modules' ``state_dict``. Momentum, betas and weight decay apply to
    digital parameters only.

    Args:
        params: Parameters or groups, usually ``model.parameters()``. Factors join the group of their C.
        lr: Learning rate of groups that bring none, > 0.
        digital: The optimizer of the other parameters: a class or function that takes groups (e.g.
            ``functools.partial(torch.optim.AdamW, weight_decay=0.1)``), or an instance, whose groups are then shared
            and ``params`` must be None. None: SGD.
        tile_lr_scale: Factor on lr for tiles, > 0: an Adam lr of 1e-3 is no LR-TT lr.
        on_nonfinite: A non-finite operand never issues a pulse or a step and is counted. ``raise``: `check_finite`,
            called at logging intervals, raises; ``skip``: it only counts.

    Raises:
        ValueError: If a number is out of range, ``params`` and ``digital`` contradict each other, or ``digital`` needs
            a closure (LBFGS).
        MisconfigurationException: If parameters are sharded, or pulsed tiles meet several workers without a strategy of
            this package.

    Example:
        >>> import torch
        >>> from lightning_lrtt import LRTT, LRTTConfig
        >>> from lightning_lrtt.nn import LRTTLinear
        >>> layer = LRTTLinear(3, 2, config=LRTTConfig(rank=1, transfer_every=1))
        >>> optimizer = LRTT(layer.parameters(), lr=0.1)
        >>> layer(torch.ones(4, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(layer.A.abs().sum() == 0)  # T = 1: the first step has been transferred to C
        True
    """

    def __init__(
        self,
        params: Any = None,
        lr: float = 0.01,
        digital: Callable[..., Optimizer] | Optimizer | None = None,
        tile_lr_scale: float = 1.0,
        on_nonfinite: str = "raise",
    ) -> None:
        if not isinstance(lr, Tensor):
            _check.number("LRTT", "lr", lr, low=0.0)
        _check.number("LRTT", "tile_lr_scale", tile_lr_scale, above=0.0)
        _check.choice("LRTT", "on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.tile_lr_scale = tile_lr_scale
        self.on_nonfinite = on_nonfinite
        self.observer: Callable[[str, list[TileModule]], None] | None = None
        # Runs the tiles' part of a step in place of a plain call (`lightning_lrtt.graphs.TileGraphs`).
        self.runner: Callable[[list[TileModule], Callable[[], None]], None] | None = None
        self._lr_held = False
        self._places: set[tuple[int, torch.device]] = set()  # groups that hold tiles, and where
        self._lr: dict[tuple[int, torch.device], Tensor] = {}
        self._bad_seen: dict[int, int] = {}
        if isinstance(digital, Optimizer):
            if params is not None:
                raise _check.fail(
                    "LRTT",
                    "params",
                    "None with a digital optimizer instance",
                    "parameters",
                    "the instance's groups are used",
                )
            super().__init__([{"params": list(group["params"])} for group in digital.param_groups], {})
            self.digital = digital
        else:
            if params is None:
                raise _check.fail("LRTT", "params", "given unless digital is an optimizer instance", None)
            super().__init__(params, {"lr": lr})
            self.digital = (digital or SGD)(self.param_groups)
        self._share()
        if takes_closure(self.digital):
            raise _check.fail(
                "LRTT",
                "digital",
                "an optimizer that steps without a closure",
                type(self.digital).__name__,
                "pulses cannot be taken back: use SGD or Adam",
            )
        self.reduced = _REDUCED.get()
        self._expected, self._checked = 0, False
        self.adopt_factors()
        self._refuse_foreign()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The digital optimizer's own, also where somebody puts another list in their place."""
        return self.digital.param_groups if "digital" in self.__dict__ else self._own_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "digital" in self.__dict__:
            self.digital.param_groups = groups
        else:
            self._own_groups = groups

    def _share(self) -> None:
        """State and defaults are the digital optimizer's own objects: schedulers and checkpoints see one thing."""
        self.state = self.digital.state
        self.defaults = self.digital.defaults

    def __getstate__(self) -> dict[str, Any]:
        kept = ("tile_lr_scale", "on_nonfinite", "digital", "reduced", "_expected")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy: hooks, observer and runner stay with the original, as torch's optimizers leave hooks behind."""
        self.observer = self.runner = None
        self._lr_held = self._checked = False
        self._places, self._lr, self._bad_seen = set(), {}, {}
        del state["param_groups"]  # the digital optimizer's
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the digital optimizer, which shares it."""
        if "digital" in self.__dict__:
            self.digital.add_param_group(param_group)
            self.adopt_factors()
        else:
            super().add_param_group(param_group)

    def adopt_factors(self) -> None:
        """Put A and B into the group of their C: an optimizer that was built before the conversion knows C only."""
        known = {id(p) for group in self.param_groups for p in group["params"]}
        tiles = self.tiles()
        self._expected = len(tiles)
        self._places.clear()
        for tile, index in tiles:
            self.param_groups[index]["params"] += [p for p in (tile.A, tile.B) if id(p) not in known]

    def state_dict(self) -> dict[str, Any]:
        """The digital optimizer's state; tiles are in the model's ``state_dict``."""
        return self.digital.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.digital.load_state_dict(state_dict)
        self._share()
        # What the checkpoint counted was reported in the run that saved it.
        self._bad_seen = {id(tile): tile.counts()["nonfinite"] for tile, _ in self.tiles()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and what pulsed tiles latched."""
        for tile, _ in self.tiles():
            tile.latch.clear()
        super().zero_grad(set_to_none)

    def tiles(self) -> list[tuple[TileModule, int]]:
        """Each tile of the groups once, with the index of the group that holds its C (or its factors)."""
        return tiles_of(self.param_groups)

    def _refuse_foreign(self) -> None:
        """Say at once what would otherwise train something else than the tiles."""
        sharded = any(hasattr(p, "device_mesh") for group in self.param_groups for p in group["params"])
        if sharded or any(tile.A.shape[0] != tile.tile_shape[0] for tile, _ in self.tiles()):
            raise MisconfigurationException(
                "LRTT: parameters must be whole tensors, got sharded ones; tiles do not survive FSDP or tensor "
                "parallelism: use Trainer(strategy='lrtt'), or 'ddp' with digital tiles"
            )
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if several and not self.reduced and any(tile.config.is_pulsed for tile, _ in self.tiles()):
            raise MisconfigurationException(
                f"LRTT: pulsed tiles must have one worker, or a strategy that gives every worker the same pulses, got "
                f"{distributed.get_world_size()} workers; plain ddp averages gradients, not pulses, and the workers' "
                "tiles would drift apart. Use Trainer(strategy='lrtt', devices=1) or digital tiles"
            )
        if several and not self.reduced:  # plain ddp: converters of different workers must not draw the same noise
            for tile, _ in self.tiles():
                number_samples(tile, distributed.get_rank(), distributed.get_world_size())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient, and transfer the tiles that are due."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = self.tiles()
        if self._expected and not held:
            raise RuntimeError(
                f"LRTT: the optimizer's {self._expected} tiles must stay in its groups, got none; something replaced "
                "its parameters (DeepSpeed, a sharded optimizer, a copy of the optimizer): use Trainer(strategy='lrtt')"
            )
        if not self._checked:  # LightningCLI builds optimizers before there are workers
            self._refuse_foreign()
            self._checked = True
        tiles = [(tile, group) for tile, group in held if tile_step.has_update(tile)]
        by_device: dict[torch.device, list[tuple[TileModule, int]]] = {}
        for tile, group in tiles:
            by_device.setdefault(tile.A.device, []).append((tile, group))
        if not self._lr_held:
            self._places = {(index, tile.A.device) for tile, index in held}
            self.refresh_lr()
        for device, members in by_device.items():
            issue = partial(self._step_tiles, members, device)
            if self.runner is None:
                issue()
            else:
                self.runner([tile for tile, _ in members], issue)
        factors = [p for tile, _ in held for p in (tile.A, tile.B)]
        grads = [p.grad for p in factors]
        for p in factors:  # every torch optimizer skips a parameter without gradient
            p.grad = None
        try:
            self.digital.step()
        finally:
            for p, grad in zip(factors, grads, strict=True):
                p.grad = grad
        for tile, _ in tiles:
            tile.latch.clear()
        return loss

    def _step_tiles(self, members: list[tuple[TileModule, int]], device: torch.device) -> None:
        modules = [tile for tile, _ in members]
        self._notify("before_update", modules)
        tile_step.update([(tile, self._lr[group, device]) for tile, group in members], device)
        self._notify("before_transfer", modules)
        tile_step.transfer(modules)
        self._notify("after_transfer", modules)

    @torch.no_grad()
    def refresh_lr(self) -> None:
        """Write the groups' tile lr to the float64 device scalars that the kernels read: one fill a group, in place.

        `step` does it by itself. In a CUDA graph of the step the fill would be frozen with today's lr: capture within
        `lr_held`, and call this before every replay.
        """
        if not self._places:  # afterwards the last step knows them
            self._places = {(index, tile.A.device) for tile, index in self.tiles()}
        for index, device in self._places:
            if (index, device) not in self._lr:
                self._lr[index, device] = torch.empty((), dtype=torch.float64, device=device)
            held, lr = self._lr[index, device], self.param_groups[index]["lr"]
            if isinstance(lr, Tensor):
                held.copy_(lr).mul_(self.tile_lr_scale)
            else:
                held.fill_(float(lr) * self.tile_lr_scale)

    @contextlib.contextmanager
    def lr_held(self) -> Iterator[None]:
        """Within, `step` reads the device lr as the last `refresh_lr` left it."""
        before, self._lr_held = self._lr_held, True
        try:
            yield
        finally:
            self._lr_held = before

    def _notify(self, event: str, modules: list[TileModule]) -> None:
        if self.observer is not None:
            self.observer(event, modules)

    def check_finite(self) -> None:
        """Read the tiles' counters and report updates that were skipped since the last check.

        Reads from the device, so it belongs to logging intervals and epoch ends.

        Raises:
            NonFiniteError: With ``on_nonfinite='raise'``, naming tile shape, step and count.
        """
        tiles = [tile for tile, _ in self.tiles()]
        if not tiles:
            return
        rows = torch.stack([tile.tile_counts.to(tiles[0].A.device) for tile in tiles]).tolist()  # one read for all
        for tile, row in zip(tiles, rows, strict=True):
            counts = dict(zip(COUNTS, row, strict=True))
            seen = self._bad_seen.get(id(tile), 0)
            if counts["nonfinite"] > seen:
                self._bad_seen[id(tile)] = counts["nonfinite"]
                if self.on_nonfinite == "raise":
                    raise NonFiniteError(
                        f"LRTT: operands of updates must be finite, got {counts['nonfinite'] - seen} that are not in a tile "
                        f"{list(tile.tile_shape)}, first at optimizer step {counts['first_bad_step']} (now "
                        f"{int(tile.tile_state[STEP])}); they were skipped. Lower lr, clip gradients, or accept it with "
                        "on_nonfinite='skip'"
                    )


@contextlib.contextmanager
def reduced() -> Iterator[None]:
    """Optimizers made within belong to a strategy that sees to it that all workers issue the same pulses."""
    token = _REDUCED.set(True)
    try:
        yield
    finally:
        _REDUCED.reset(token)


def takes_closure(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` needs a closure, as LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def tiles_of(param_groups: list[dict[str, Any]]) -> list[tuple[TileModule, int]]:
    """Each tile of the groups once, with the index of the group that holds its C (or its factors)."""
    found: dict[int, tuple[TileModule, int]] = {}
    for index, group in enumerate(param_groups):
        for p in group["params"]:
            link = getattr(p, "tile", None)  # a torch.Tensor has a method of this name
            tile = link.module if isinstance(link, TileLink) else None
            if tile is not None and (id(tile) not in found or p is tile.weight):
                found[id(tile)] = (tile, index)
    return list(found.values())
