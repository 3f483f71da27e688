"""TileMonitor: what happens inside the tiles, without waiting for the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_lrtt.callbacks import _tile_pictures as pictures
from lightning_lrtt.callbacks import _tile_statistics as statistics
from lightning_lrtt.callbacks._device_figures import log_devices, require_figures
from lightning_lrtt.callbacks._hparams import HParams, hyperparameters
from lightning_lrtt.callbacks._layouts import Layout, tile_layout, write_layouts
from lightning_lrtt.callbacks._log_row import after, log_row, now, writers
from lightning_lrtt.callbacks._metric_ring import MetricRing
from lightning_lrtt.callbacks._snapshots import Snapshots
from lightning_lrtt.callbacks._stability import Stability
from lightning_lrtt.callbacks._step_clock import StepClock
from lightning_lrtt.callbacks._tile_gradient import GradientWatch
from lightning_lrtt.callbacks._tile_rows import TileRows
from lightning_lrtt.callbacks._tile_tables import tables
from lightning_lrtt.callbacks._tile_trace import Trace, log, show
from torch import Tensor
from typing_extensions import override

from lightning_lrtt import LRTT, _check
from lightning_lrtt.costs import CellCosts
from lightning_lrtt.free_nudged import FreeNudgedModule
from lightning_lrtt.nn import TileModule, find_tiles
from lightning_lrtt.strategies.foreign import refuse_foreign

Observer = Callable[[str, list[TileModule]], None]


class TileMonitor(Callback):
    """Log the state of every tile to all loggers, at the steps and with the step numbers that Lightning uses.

    Per tile: ``tile/<name>/norm_A|norm_B|norm_C|norm_AB`` (Frobenius), ``tile/<name>/min_C|mean_C|max_C``,
    ``tile/<name>/effective_rank_AB`` (directions that A B uses), ``tile/<name>/at_bounds_A|B|C`` (share of cells at a
    bound, for arrays on a device), ``tile/<name>/nonfinite`` (skipped updates so far), ``tile/<name>/stability``,
    ``pulse/<name>/A|B|C`` (pulses since the last log), ``pulse/<name>/per_cell_A|B|C`` (mean so far),
    ``transfer/<name>/count`` (so far), ``transfer/<name>/clip_fraction`` (share of ``|tau A B|`` that was lost in
    transfers since the last log), ``transfer/<name>/size`` (mean ``|tau A B|`` a cell and transfer, pulsed transfers
    since the last log), ``cost/<name>/energy_pJ`` and ``cost/<name>/wear_A|B|C`` where the device's figures are known
    (`lightning_lrtt.costs`). Of the run: ``perf/step_ms`` and ``perf/samples_per_s`` (means since the last log, without
    validation), ``cost/energy_pJ``.

    Norms and bounds are those after the step's update and before its transfer: afterwards A is 0, and where
    ``transfer_every`` divides the logging interval nothing else would ever be seen.

    Numbers leave the device in one asynchronous copy a logging step, and are written when they have arrived, at a later
    step or at the end; training waits for nothing.

    TensorBoard also gets a layout of the custom-scalars tab, tables of tiles, devices, pulses, costs and the build
    (``info/...``), one entry of the HPARAMS tab with ``hp/...`` metrics of validation and test, histograms of A, B, C and
    of pulses per cell (``histogram/...``), and images of C, A B and the cells at bounds (``image/...``). docs/tensorboard.md
    says which question each answers.

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
        histograms_every_n_epochs: Epochs between histograms, of an epoch's last step, and once at the end; 0: never.
        images_every_n_epochs: The same for images, at most 128 pixels a side (means of blocks of cells).
        gradient_every_n_steps: Steps between ``tile/<name>/cosine_gradient``, the cosine of ``-alpha A B``, as gathered
            since the last transfer, and this step's dense gradient (of this worker's batches). Costs the third matrix
            product of dense training in those steps, and its memory. None: never.
        costs: Costs of a pulse on all arrays; None: those of the presets, as far as they are known.
        hparams_metrics: Metrics of the HPARAMS tab, by their names in ``self.log``; None: all that validation logs, and
            the same names with ``test``. With runs to compare, all should list the same.

    Raises:
        ValueError: If ``every_n_steps`` or ``gradient_every_n_steps`` is below 1, an interval in epochs below 0 or
            ``curvature`` not positive.
        TypeError: If ``costs`` is no `CellCosts`.
        MisconfigurationException: At setup, if the module has no tiles, the strategy cannot train them,
            ``device_plots`` has no TensorBoardLogger or no matplotlib, or ``gradient_every_n_steps`` meets a
            `FreeNudgedModule`, which makes its own gradient.

    Example:
        >>> TileMonitor(every_n_steps=10).state_key
        "TileMonitor{'every_n_steps': 10}"
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        trace: bool = False,
        curvature: float = 1.0,
        device_plots: bool = False,
        histograms_every_n_epochs: int = 1,
        images_every_n_epochs: int = 10,
        gradient_every_n_steps: int | None = None,
        costs: CellCosts | None = None,
        hparams_metrics: Sequence[str] | None = None,
    ) -> None:
        for name, steps in (("every_n_steps", every_n_steps), ("gradient_every_n_steps", gradient_every_n_steps)):
            if steps is not None:
                _check.integer("TileMonitor", name, steps, low=1)
        _check.number("TileMonitor", "curvature", curvature, above=0.0)
        _check.integer("TileMonitor", "histograms_every_n_epochs", histograms_every_n_epochs, low=0)
        _check.integer("TileMonitor", "images_every_n_epochs", images_every_n_epochs, low=0)
        if costs is not None and not isinstance(costs, CellCosts):
            raise TypeError(f"TileMonitor: costs must be a CellCosts or None, got {costs!r}")
        self.every_n_steps, self.curvature, self.device_plots = every_n_steps, curvature, device_plots
        self.gradient_every_n_steps, self.costs = gradient_every_n_steps, costs
        self.trace = trace or os.environ.get("LRTT_LOG", "").lower() == "debug"
        self._tiles: dict[str, TileModule] = {}
        self._names: dict[int, str] = {}
        self._rows = TileRows(costs)
        self._trace = Trace(self._write_line)
        self._gradient, self._clock = GradientWatch(), StepClock()
        self._snapshots = Snapshots(histograms_every_n_epochs, images_every_n_epochs)
        self._hparams = HParams(hparams_metrics)
        self._ring: MetricRing | None = None
        self._trainer: pl.Trainer | None = None
        self._stability = Stability(curvature)
        self._values: dict[str, Tensor] = {}  # of a watched step in progress
        self._armed = False
        self._hooks: list[Any] = []
        self._observed: list[tuple[LRTT, Observer | None]] = []
        self._undo_logging: Callable[[], None] | None = None

    # -------------------------------------------------------------- state

    @cached_property  # Lightning asks for it at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._ring is not None:
            self._ring.drain(wait=True)  # a checkpoint waits for the device anyway
        return {"counts": self._rows.state(), "updates": dict(self._trace.updates)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows.load(state_dict["counts"])
        self._trace.updates = dict(state_dict["updates"])

    def wants_eager_step(self) -> bool:
        """Whether the step in progress must run its Python, for `CUDAGraph`: a replay passes by hooks and observers."""
        watched = self._armed or self._gradient.armed or self._snapshots.armed
        return watched or (self.trace and bool(self._tiles))

    def custom_scalars(self) -> Layout:
        """Charts for the custom-scalars tab."""
        return tile_layout(self._tiles, self._rows.known() | ({"gradient"} if self.gradient_every_n_steps else set()))

    # -------------------------------------------------------------- begin and end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            if self._hparams.written:  # Lightning would add its own entry to that of the fit before
                self._hparams.hold(trainer)
            return
        refuse_foreign(trainer, pl_module)
        if self.device_plots:
            require_figures(trainer)
        if self.gradient_every_n_steps is not None and isinstance(pl_module, FreeNudgedModule):
            raise MisconfigurationException(
                f"TileMonitor: gradient_every_n_steps must be None with a FreeNudgedModule, got "
                f"{self.gradient_every_n_steps}; its gradient is its own: FreeNudgedMonitor(bptt_every_n_steps=...)"
            )
        self._rows.load({})  # of another run; a checkpoint's come after this
        self._trace.updates = {}
        if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):  # these may make layers
            self._find(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._find(pl_module)
        if self._tiles and writers(trainer):
            self._hparams.begin(trainer, hyperparameters(trainer, self._tiles.values()))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hparams.release()
        if not self._tiles:
            return
        self._trainer = trainer
        self._rows.begin(self._tiles)
        self._snapshots.begin()
        device = next(iter(self._tiles.values())).A.device
        self._ring = MetricRing(device, self._arrived)
        self._clock.begin(trainer)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LRTT):
                self._observed.append((optimizer, optimizer.observer))
                optimizer.observer = partial(self._observe, optimizer, optimizer.observer)
        if self.trace:
            self._undo_logging = show(log)
        write_layouts(trainer, self)
        for writer in writers(trainer):
            for tag, text in tables(self._tiles, self.costs).items():
                writer.add_text(tag, text, now(trainer))
        if self.device_plots and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    log_devices(logger, self._tiles.values(), now(trainer))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ring is not None:
            self._disarm()
            if writers(trainer) and self._snapshots.finish(after(trainer), self._tiles):
                self._snapshots.send(self._ring, after(trainer))
            self._ring.drain(wait=True)
            self._hparams.end(trainer, after(trainer), success=True)
        self._undo()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._ring is not None:
            self._ring.abandon()
            self._hparams.end(trainer, after(trainer), success=False)
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
        self._hparams.release()
        while self._observed:
            optimizer, previous = self._observed.pop()
            optimizer.observer = previous
        self._trace.forget()
        self._ring = self._trainer = None
        if self._undo_logging is not None:
            self._undo_logging()
            self._undo_logging = None

    def _disarm(self) -> None:
        self._armed = False
        self._values = {}
        self._gradient.disarm()
        self._snapshots.disarm()
        while self._hooks:
            self._hooks.pop().remove()

    # -------------------------------------------------------------- a watched step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ring is None:
            return
        self._ring.drain()
        # The rule of Lightning's logger connector. With accumulation every micro-batch of the step is watched.
        done = now(trainer)
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        gradient = self.gradient_every_n_steps
        self._clock.count(batch)
        if self.wants_eager_step() and trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self._disarm()  # a step that was broken off
        self._armed = bool(every) and (done + 1) % every == 0
        if gradient is not None and (done + 1) % gradient == 0:
            self._gradient.arm(self._tiles)
        ends = trainer.max_steps > 0 and trainer.global_step + 1 == trainer.max_steps
        if (ends or trainer.is_last_batch) and writers(trainer):
            self._snapshots.arm(trainer.current_epoch, ends or trainer.current_epoch + 1 == trainer.max_epochs)
        if not self._armed or self._hooks:
            return
        for optimizer in (o for o in trainer.optimizers if isinstance(o, LRTT)):
            for tile, group in optimizer.tiles():
                if id(tile) in self._names:  # lr now: a scheduler steps before the batch ends
                    lr = optimizer.param_groups[group]["lr"] * optimizer.tile_lr_scale * self._rows.gain(tile)
                    hook = partial(self._watch_input, self._names[id(tile)], lr)
                    self._hooks.append(tile.register_forward_pre_hook(hook, with_kwargs=True))

    def _watch_input(self, name: str, lr: float | Tensor, tile: TileModule, args: Any, kwargs: Any) -> None:
        if not tile.training:
            return
        tag = f"tile/{name}/stability"
        estimate = lr * statistics.curvature(tile, args[0] if args else kwargs["x"])
        # The largest of all calls and micro-batches.
        self._values[tag] = torch.maximum(self._values[tag], estimate) if tag in self._values else estimate

    def _observe(self, optimizer: LRTT, previous: Observer | None, event: str, tiles: list[TileModule]) -> None:
        if previous is not None:
            previous(event, tiles)
        if not self.wants_eager_step():
            return
        own = {self._names[id(tile)]: tile for tile in tiles if id(tile) in self._names}
        if not own:
            return
        if event == "before_transfer":
            self._look(own)
        if self._snapshots.armed:
            self._snapshots.observe(event, optimizer, own)
        if self.trace:
            self._trace.observe(event, own)

    def _look(self, tiles: dict[str, TileModule]) -> None:
        if self._armed:
            self._values |= statistics.measure(tiles, self._snapshots.bounds)
        if self._gradient.armed:
            self._values |= self._gradient.cosines(tiles)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._ring is None or trainer.fit_loop._should_accumulate():
            return
        if self._armed:
            rest = {name: tile for name, tile in self._tiles.items() if f"tile/{name}/norm_C" not in self._values}
            if rest:  # no update in this step
                self._look(rest)
            note = ("row", now(trainer), list(self._values), self._clock.read(now(trainer)))
            counters = torch.cat([tile.tile_counts for tile in self._tiles.values()])
        elif self._values:  # a cosine between two logs
            note, counters = ("part", now(trainer), list(self._values), {}), None
        if self._values:
            values = torch.stack([value.double() for value in self._values.values()])
            self._ring.push(values if counters is None else torch.cat([values, counters.double()]), note)
        if self._snapshots.armed:
            self._snapshots.complete(self._tiles)
            self._snapshots.send(self._ring, now(trainer))
        if self._armed or self._gradient.armed or self._snapshots.armed:
            self._disarm()

    def _arrived(self, note: tuple[Any, ...], values: list[float]) -> None:
        """Write a row; the numbers are of the step that the note names."""
        trainer = self._trainer
        assert trainer is not None
        kind, step, what, more = note
        if kind == "pictures":
            for writer in writers(trainer):
                pictures.write(writer, what, values, step)
            return
        metrics = dict(zip(what, values, strict=False))
        if kind == "row":
            metrics |= self._rows.counted(values[len(what) :]) | more
            for name in self._tiles:
                self._stability.judge(name, metrics)
        log_row(trainer, metrics, step)

    # -------------------------------------------------------------- evaluation

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.pause()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hparams.release()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.resume()
        if self._ring is not None and not trainer.sanity_checking:
            self._hparams.evaluated(trainer, now(trainer))

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._hparams.written:  # after a fit of this Trainer
            self._hparams.evaluated(trainer, after(trainer))

    # -------------------------------------------------------------- trace

    def _write_line(self, name: str, line: str) -> None:
        log.info(line)
        assert self._trainer is not None
        for writer in writers(self._trainer):
            writer.add_text(f"transfer/{name}/trace", line, now(self._trainer))
