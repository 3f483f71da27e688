"""TileMonitor: what happens inside the tiles, at one device-to-host transfer per logging step."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_lrtt.callbacks import _tile_statistics as statistics
from lightning_lrtt.callbacks._device_figures import log_devices
from torch import Tensor
from typing_extensions import override

from lightning_lrtt import LRTT, _check
from lightning_lrtt.nn import TileModule, find_tiles
from lightning_lrtt.ops import COUNTER, COUNTS, CYCLE
from lightning_lrtt.strategies.foreign import refuse_foreign

log = logging.getLogger("lightning_lrtt")

Observer = Callable[[str, list[TileModule]], None]


class TileMonitor(Callback):
    """Log the state of every tile to all loggers, at the steps and with the step numbers that Lightning uses.

    Per tile: ``tile/<name>/norm_A|norm_B|norm_C|norm_AB`` (Frobenius), ``tile/<name>/at_bounds_A|B|C`` (share of cells
    at a bound, for arrays on a device), ``tile/<name>/nonfinite`` (skipped updates so far), ``tile/<name>/stability``,
    ``pulse/<name>/A|B|C`` (pulses since the last log), ``transfer/<name>/count`` (so far) and
    ``transfer/<name>/clip_fraction`` (share of ``|tau A B|`` that was lost in transfers since the last log).

    Norms and bounds are those after the step's update and before its transfer: afterwards A is 0, and where
    ``transfer_every`` divides the logging interval nothing else would ever be seen.

    ``stability`` is the estimate ``lr (lambda_max + tr H / r)`` with H the second moment of the tile's input in that
    step, for a loss with unit curvature in the tile's output; above 2 such a loss diverges. A warning says so once per
    tile. It needs a tile that an `LRTT` optimizer moves.

    Args:
        every_n_steps: Optimizer steps between logs; None: the Trainer's ``log_every_n_steps``.
        trace: Also write one line per finished cycle, with the norms before and after its transfer, to the logger
            ``lightning_lrtt`` and as text to TensorBoard. The environment variable ``LRTT_LOG=debug`` switches it on
            too. Reads from the device at every step.
        curvature: The curvature of the loss in a tile's output that the warning assumes: it comes when
            ``curvature * stability`` exceeds 2. Softmax cross-entropy bends by at most 0.5 in the logits.
        device_plots: Before training, draw each device that the tiles stand on (`device_plots.plot_response`) to
            TensorBoard, as ``device/<name>``. Takes about a second a device, and matplotlib.

    Raises:
        ValueError: If ``every_n_steps`` is below 1 or ``curvature`` is not positive.
        MisconfigurationException: At setup, if the module has no tiles, the strategy cannot train them, or
            ``device_plots`` has no TensorBoardLogger or no matplotlib.

    Example:
        >>> TileMonitor(every_n_steps=10).state_key
        "TileMonitor{'every_n_steps': 10}"
    """

    def __init__(
        self, every_n_steps: int | None = None, trace: bool = False, curvature: float = 1.0, device_plots: bool = False
    ) -> None:
        if every_n_steps is not None:
            _check.integer("TileMonitor", "every_n_steps", every_n_steps, low=1)
        _check.number("TileMonitor", "curvature", curvature, above=0.0)
        self.curvature = curvature
        self.every_n_steps = every_n_steps
        self.device_plots = device_plots
        self.trace = trace or os.environ.get("LRTT_LOG", "").lower() == "debug"
        self._tiles: dict[str, TileModule] = {}
        self._names: dict[int, str] = {}
        self._counts: dict[str, list[int]] = {}  # at the last log
        self._updates: dict[str, int] = {}  # of the cycle in progress
        self._warned: set[str] = set()
        self._values: dict[str, Tensor] = {}  # of a logging step in progress
        self._armed = False
        self._hooks: list[Any] = []
        self._observed: list[tuple[LRTT, Observer | None]] = []
        self._before: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self._undo_logging: Callable[[], None] | None = None

    # -------------------------------------------------------------- state

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"counts": {name: list(row) for name, row in self._counts.items()}, "updates": dict(self._updates)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts, self._updates = dict(state_dict["counts"]), dict(state_dict["updates"])

    def wants_eager_step(self) -> bool:
        """Whether the step in progress must run its Python, for `CUDAGraph`: a replay passes by hooks and observers."""
        return self._armed or (self.trace and bool(self._tiles))

    # -------------------------------------------------------------- begin and end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_foreign(trainer, pl_module)
        if self.device_plots:
            _require_figures(trainer)
        self._counts, self._updates = {}, {}  # of another run; a checkpoint's come after this
        if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):  # these may make layers
            self._find(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._find(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._tiles:
            return
        fresh = {name: tile for name, tile in self._tiles.items() if name not in self._counts}
        if fresh:  # a resumed run goes on from the checkpoint's last log
            rows = torch.stack([tile.tile_counts for tile in fresh.values()]).tolist()
            self._counts.update(zip(fresh, rows, strict=True))
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LRTT):
                self._observed.append((optimizer, optimizer.observer))
                optimizer.observer = partial(self._observe, trainer, optimizer.observer)
        if self.trace:
            self._undo_logging = _show(log)
        if self.device_plots and trainer.is_global_zero and not trainer.sanity_checking:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    log_devices(logger, self._tiles.values(), trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo()
        self._tiles, self._names = {}, {}

    def _find(self, pl_module: pl.LightningModule) -> None:
        self._tiles = find_tiles(pl_module)
        if not self._tiles:
            raise MisconfigurationException(
                f"TileMonitor: the module must have LR-TT tiles, got none in {type(pl_module).__name__}; use "
                "Trainer(strategy='lrtt') or convert_to_lrtt(module, config)"
            )
        self._names = {id(tile): name for name, tile in self._tiles.items()}

    def _undo(self) -> None:
        self._disarm()
        while self._observed:
            optimizer, previous = self._observed.pop()
            optimizer.observer = previous
        self._before.clear()
        if self._undo_logging is not None:
            self._undo_logging()
            self._undo_logging = None

    def _disarm(self) -> None:
        self._armed = False
        self._values = {}
        while self._hooks:
            self._hooks.pop().remove()

    # -------------------------------------------------------------- a logging step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        # The rule of Lightning's logger connector. With accumulation every micro-batch of the step is watched.
        done = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._armed = bool(every and self._tiles) and (done + 1) % every == 0
        if not self._armed:
            self._disarm()  # a logging step that was broken off
        if not self._armed or self._hooks:
            return
        for optimizer in (o for o in trainer.optimizers if isinstance(o, LRTT)):
            for tile, group in optimizer.tiles():
                if id(tile) in self._names:  # lr now: a scheduler steps before the batch ends
                    lr = optimizer.param_groups[group]["lr"] * optimizer.tile_lr_scale * statistics.effective_gain(tile)
                    hook = partial(self._watch_input, self._names[id(tile)], lr)
                    self._hooks.append(tile.register_forward_pre_hook(hook, with_kwargs=True))

    def _watch_input(self, name: str, lr: float | Tensor, tile: TileModule, args: Any, kwargs: Any) -> None:
        if not tile.training:
            return
        tag = f"tile/{name}/stability"
        estimate = lr * statistics.curvature(tile, args[0] if args else kwargs["x"])
        # The largest of all calls and micro-batches.
        self._values[tag] = torch.maximum(self._values[tag], estimate) if tag in self._values else estimate

    def _observe(self, trainer: pl.Trainer, previous: Observer | None, event: str, tiles: list[TileModule]) -> None:
        if previous is not None:
            previous(event, tiles)
        own = {self._names[id(tile)]: tile for tile in tiles if id(tile) in self._names}
        if self._armed and event == "before_transfer":
            for name, tile in own.items():
                self._measure(name, tile)
        if self.trace and own:
            self._trace(trainer, event, own)

    def _measure(self, name: str, tile: TileModule) -> None:
        self._values |= {f"tile/{name}/norm_{array}": value for array, value in statistics.norms(tile).items()}
        self._values |= {f"tile/{name}/at_bounds_{array}": value for array, value in statistics.at_bounds(tile).items()}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._armed or trainer.fit_loop._should_accumulate():
            return
        for name, tile in self._tiles.items():
            if f"tile/{name}/norm_C" not in self._values:  # no update in this step
                self._measure(name, tile)
        tags = list(self._values)
        metrics, counts = self._read(tags)
        self._disarm()
        for name, new in counts.items():
            old, self._counts[name] = self._counts[name], new
            now = dict(zip(COUNTS, new, strict=True))
            since = {key: value - before for (key, value), before in zip(now.items(), old, strict=True)}
            metrics |= {f"pulse/{name}/{array}": float(since[f"pulses_{array.lower()}"]) for array in "ABC"}
            metrics[f"transfer/{name}/count"] = float(now["transfers"])
            metrics[f"transfer/{name}/clip_fraction"] = since["lost"] / max(since["intended"], 1)
            metrics[f"tile/{name}/nonfinite"] = float(now["nonfinite"])
            self._judge(name, metrics)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _read(self, tags: list[str]) -> tuple[dict[str, float], dict[str, list[int]]]:
        """The one transfer: all values and all counters in a float64 vector (counters are exact below 2^53)."""
        counters = torch.cat([tile.tile_counts for tile in self._tiles.values()])
        on_device = torch.cat([torch.stack([self._values[tag] for tag in tags]), counters.double()])
        host = torch.empty(on_device.shape, dtype=torch.float64)
        values = host.copy_(on_device).tolist()
        rows = values[len(tags) :]
        size = len(COUNTS)
        counts = {name: [int(v) for v in rows[i * size : (i + 1) * size]] for i, name in enumerate(self._tiles)}
        return dict(zip(tags, values, strict=False)), counts

    def _judge(self, name: str, metrics: dict[str, float]) -> None:
        tag = f"tile/{name}/stability"
        estimate = metrics.get(tag, 0.0)
        if not math.isfinite(estimate):
            del metrics[tag]  # a non-finite input; `nonfinite` tells it
        elif self.curvature * estimate > 2.0 and name not in self._warned:
            self._warned.add(name)
            bend = "unit curvature" if self.curvature == 1 else f"curvature {self.curvature:g}"
            rank_zero_warn(
                f"TileMonitor: lr (lambda_max + tr H / r) of tile {name!r} is {estimate:.3g}. As an estimate for a "
                f"loss with {bend} in the tile's output, training diverges above {2 / self.curvature:g}. If the loss "
                "grows, lower lr or tile_lr_scale, or raise the rank; if it does not, give TileMonitor(curvature=...) "
                "what your loss has (softmax cross-entropy: at most 0.5)."
            )

    # -------------------------------------------------------------- trace

    def _trace(self, trainer: pl.Trainer, event: str, tiles: dict[str, TileModule]) -> None:
        if event == "before_update":
            return
        states = torch.stack([tile.tile_state for tile in tiles.values()]).tolist()
        for (name, tile), state in zip(tiles.items(), states, strict=True):
            if event == "before_transfer":
                steps = tile.config.transfer_unit == "steps"  # the counter itself, right after a resume too
                self._updates[name] = 1 + (state[COUNTER] if steps else self._updates.get(name, 0))
                self._before[name] = state[CYCLE], statistics.norms(tile)
                continue
            cycle, before = self._before.pop(name)
            if state[CYCLE] != cycle:
                numbers = ", ".join(
                    f"|{array}| {float(before[array]):.4g} -> {float(after):.4g}"
                    for array, after in statistics.norms(tile).items()
                )
                order = f"reinit -> {self._updates.pop(name)} updates -> transfer"
                self._write(trainer, name, f"{name} cycle {cycle}: {order}; {numbers}")

    def _write(self, trainer: pl.Trainer, name: str, line: str) -> None:
        log.info(line)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(f"transfer/{name}/trace", line, step)


def _require_figures(trainer: pl.Trainer) -> None:
    missing = None
    if not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        missing = "a TensorBoardLogger, which the Trainer has not; add one: Trainer(logger=TensorBoardLogger(...))"
    elif find_spec("matplotlib") is None:
        missing = "matplotlib, which is not installed; pip install 'lightning-lrtt[plot]'"
    if missing:
        raise MisconfigurationException(f"TileMonitor: device_plots=True needs {missing}, or leave it at False")


def _show(logger: logging.Logger) -> Callable[[], None]:
    """Make INFO visible on a logger that nobody has configured; returns what undoes it."""
    level, handler = logger.level, logging.StreamHandler()
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    missing = not logger.hasHandlers()
    if missing:
        logger.addHandler(handler)

    def undo() -> None:
        logger.setLevel(level)
        if missing:
            logger.removeHandler(handler)

    return undo
