"""Figures of the devices that tiles stand on, for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lrtt import presets
from lightning_lrtt.device_plots import plot_response
from lightning_lrtt.devices import Device
from lightning_lrtt.nn import TileModule


def devices_of(tiles: Iterable[TileModule]) -> dict[str, Device]:
    """Each device of the tiles once, by a name: that of the preset, or of the class, numbered where needed."""
    found: dict[str, Device] = {}
    for tile in tiles:
        for device in (tile.config.fast_device, tile.config.visible_device):
            if device is None or device in found.values():
                continue
            name = base = presets.name_of(device) or type(device).__name__
            count = 1
            while name in found:
                count += 1
                name = f"{base}_{count}"
            found[name] = device
    return found


def log_devices(logger: TensorBoardLogger, tiles: Iterable[TileModule], step: int) -> None:
    """One figure a device, as ``device/<name>``."""
    for name, device in devices_of(tiles).items():
        logger.experiment.add_figure(f"device/{name}", plot_response(device, name), step)


def require_figures(trainer: pl.Trainer) -> None:
    """Refuse figures that nobody could draw or show."""
    missing = None
    if not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        missing = "a TensorBoardLogger, which the Trainer has not; add one: Trainer(logger=TensorBoardLogger(...))"
    elif find_spec("matplotlib") is None:
        missing = "matplotlib, which is not installed; pip install 'lightning-lrtt[plot]'"
    if missing:
        raise MisconfigurationException(f"TileMonitor: device_plots=True needs {missing}, or leave it at False")
