"""HParams of a run with tiles: what was set, and what came out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict, _sanitize_params
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_lrtt.callbacks._log_row import add_summary, log_row, writers
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from lightning_lrtt import LRTT, presets
from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.devices import Device
from lightning_lrtt.nn import TileModule

_EVALUATION = ("val", "valid", "validation", "test")
_FIRST = {f"lrtt/{name}" for name in ("rank", "transfer_every", "fast_device", "lr", "transfer_mode")}
_RANKED = "differs" in api_pb2.HParamInfo.DESCRIPTOR.fields_by_name  # newer versions of TensorBoard


class HParams:
    """One entry of TensorBoard's HPARAMS tab a run, with the metrics of its evaluations.

    TensorBoard keeps the first entry of a run and, of a sweep, the first list of metrics. Lightning would write its own,
    with ``hp_metric = -1``, before there is any result; so its call is held back (the values still go to
    ``hparams.yaml``), and the entry is written once the names of the metrics are known: at the first validation, or else
    at the end of training.

    Args:
        metrics: Names as in ``self.log``; None: what validation logs, and the same names with ``test``.
    """

    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        self._metrics = metrics
        self._held: list[TensorBoardLogger] = []
        self._values: dict[str, Any] = {}
        self._listed: set[str] = set()
        self._open = False  # the entry is written and has no end yet

    # -------------------------------------------------------------- Lightning's own entry

    def begin(self, trainer: pl.Trainer, values: Mapping[str, Any]) -> None:
        """A new run, told ``values``."""
        self._values, self._listed, self._open = dict(values), set(), False
        self.hold(trainer)

    def hold(self, trainer: pl.Trainer) -> None:
        """From here to `release` Lightning's entry is only remembered."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and "log_hyperparams" not in vars(logger):

                def remember(
                    params: Any, metrics: Any = None, step: Any = None, to: TensorBoardLogger = logger
                ) -> None:
                    params = _convert_params(params)
                    to.hparams.update(params)  # what `save` writes to hparams.yaml
                    flat = _sanitize_params(_flatten_dict(params))
                    self._values = {k: v for k, v in flat.items() if not k.startswith("_")} | self._values

                vars(logger)["log_hyperparams"] = remember
                self._held.append(logger)

    def release(self) -> None:
        """Give the loggers their method back."""
        while self._held:
            vars(self._held.pop()).pop("log_hyperparams", None)

    # -------------------------------------------------------------- our entry

    def evaluated(self, trainer: pl.Trainer, step: int) -> None:
        """After a validation or a test: write the entry if it is not there yet, and the ``hp/`` metrics."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if self._counts(name)}
        if not self._listed and found:
            self._write_start(trainer, list(found))
        log_row(trainer, {tag(name): value for name, value in found.items()}, step)

    @property
    def written(self) -> bool:
        """Whether the run has its entry."""
        return bool(self._listed)

    def end(self, trainer: pl.Trainer, step: int, success: bool) -> None:
        """At the end of training: metrics of a run without validation, and the status."""
        if success and not self._listed:
            found = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
            self._write_start(trainer, list(found))
            log_row(trainer, {tag(name): value for name, value in found.items()}, step)
        elif not self._listed:
            self._write_start(trainer, [])
        if self._open:
            status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
            info = SessionEndInfo(status=status, end_time_secs=time.time())
            self._add(trainer, metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))
            self._open = False

    def _counts(self, name: str) -> bool:
        if self._metrics is not None:
            return name in self._metrics
        return name == "hp_metric" or any(_of(name, kind) for kind in _EVALUATION)

    def _write_start(self, trainer: pl.Trainer, names: list[str]) -> None:
        names = list(self._metrics) if self._metrics is not None else names
        if self._metrics is None:  # a test after training has the names of validation
            names += [f"test{name[len('val') :]}" for name in names if _of(name, "val")]
        tags = dict.fromkeys(tag(name) for name in names)
        self._listed = set(tags) or {""}
        start = SessionStartInfo(start_time_secs=time.time())
        infos = []
        for name, value in self._values.items():
            # The table begins with columns that are said to differ between runs, and shows few more.
            info = api_pb2.HParamInfo(name=name, **({"differs": True} if _RANKED and name in _FIRST else {}))
            if isinstance(value, bool):
                start.hparams[name].bool_value, info.type = value, api_pb2.DATA_TYPE_BOOL
            elif isinstance(value, (int, float)):
                start.hparams[name].number_value, info.type = value, api_pb2.DATA_TYPE_FLOAT64
            else:
                start.hparams[name].string_value, info.type = str(value), api_pb2.DATA_TYPE_STRING
            infos.append(info)
        if tags:  # a run that failed before any result must not define the columns of a sweep
            metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in tags]
            experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics, time_created_secs=time.time())
            self._add(trainer, metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))
        self._add(trainer, metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))
        self._open = True

    @staticmethod
    def _add(trainer: pl.Trainer, name: str, data: HParamsPluginData) -> None:
        summary = Summary(value=[Summary.Value(tag=name, metadata=metadata.create_summary_metadata(data))])
        for writer in writers(trainer):
            add_summary(writer, summary)


def tag(name: str) -> str:
    """``val/acc`` as it is called in the HPARAMS tab: ``hp/val_acc``."""
    return "hp/" + name.removeprefix("hp/").replace("/", "_")


def _of(name: str, kind: str) -> bool:
    return name.startswith((f"{kind}/", f"{kind}_"))


def hyperparameters(trainer: pl.Trainer, tiles: Iterable[TileModule]) -> dict[str, Any]:
    """What the tiles, the optimizers and the Trainer were told, flat, for a table; ``mixed`` where tiles differ."""
    first, *others = [_of_config(config) for config in _configs(getattr(trainer.strategy, "config", None), tiles)]
    values = {name: v if all(other[name] == v for other in others) else "mixed" for name, v in first.items()}
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LRTT):
            group = optimizer.param_groups[0]
            lr = group.get("initial_lr", group["lr"])  # a scheduler that warms up has scaled the other one
            values["lr"] = float(lr) if isinstance(lr, torch.Tensor) else lr
            values["tile_lr_scale"] = optimizer.tile_lr_scale
            values["optimizer"] = type(optimizer.digital).__name__
            break
    values["precision"] = str(trainer.precision)
    values["workers"] = trainer.world_size
    values["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    return {f"lrtt/{name}": value for name, value in values.items()}


def _configs(given: Any, tiles: Iterable[TileModule]) -> list[LRTTConfig]:
    """The configurations of the tiles, each once, with the rank that was asked for where the layer is too small for it.

    The strategy's is among them only if some tile has it: tiles that were there before have their own.
    """
    tiles = list(tiles)
    asked = [given] if isinstance(given, LRTTConfig) else []
    for config in sorted((tile.config for tile in tiles), key=lambda config: -config.rank):
        asked += [] if config in asked else [config]
    found: list[LRTTConfig] = []
    for tile in tiles:
        config = next(config for config in asked if _has(tile, config))
        found += [] if config in found else [config]
    return found


def _has(tile: TileModule, config: LRTTConfig) -> bool:
    own = tile.config
    lowered = own.rank == min(tile.tile_shape) and config.rank > own.rank
    names = (field.name for field in dataclasses.fields(config) if not (lowered and field.name == "rank"))
    return all(getattr(own, name) == getattr(config, name) for name in names)


def _of_config(config: LRTTConfig) -> dict[str, Any]:
    pulse, transfer = config.pulse, config.transfer_pulse
    return {
        "rank": config.rank,
        "transfer_every": config.transfer_every,
        "transfer_unit": config.transfer_unit,
        "transfer_mode": config.mode,
        "transfer_lr": config.tau,
        "alpha": config.alpha,
        "reinit": config.reinit,
        "reinit_gain": str(config.reinit_gain),
        "grad_scale": config.grad_scale,
        "fast_device": _name(config.fast_device),
        "visible_device": _name(config.visible_device),
        "pulse_type": pulse.pulse_type if config.fast_device is not None else "digital",
        "pulse_bl": pulse.desired_bl,
        "transfer_bl": transfer.desired_bl,
        "transfer_max_words": config.transfer_max_words,
        "io": config.io is not None,
        "seed": config.seed,
    }


def _name(device: Device | None) -> str:
    return "digital" if device is None else presets.name_of(device) or type(device).__name__
