"""Markdown tables of tiles, devices, pulse trains, costs and the build, for TensorBoard's text tab."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import lightning
import torch
from lightning_lrtt.callbacks._device_figures import devices_of

from lightning_lrtt import build_info
from lightning_lrtt.config import PulseConfig
from lightning_lrtt.costs import CellCosts, costs_of
from lightning_lrtt.devices import Device
from lightning_lrtt.nn import TileModule


def tables(tiles: Mapping[str, TileModule], costs: CellCosts | None = None) -> dict[str, str]:
    """All tables by tag."""
    found = devices_of(tiles.values())
    return {
        "info/tiles": _tiles(tiles, found),
        "info/devices": _devices(found),
        "info/pulses": _pulses(tiles),
        "info/costs": _costs(found, costs),
        "info/build": _build(),
    }


def name_of(device: Device | None, found: Mapping[str, Device]) -> str:
    """A device's name in the tables; ``digital`` for none."""
    return "digital" if device is None else next(name for name, known in found.items() if known == device)


def markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table; bars within a cell are escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _tiles(tiles: Mapping[str, TileModule], found: Mapping[str, Device]) -> str:
    head = ["tile", "kind", "d x k", "rank", "alpha", "transfer every", "tau", "mode", "A, B on", "C on", "cells"]
    rows = []
    for name, tile in tiles.items():
        c, (d, k), r = tile.config, tile.tile_shape, tile.A.shape[1]
        devices = [name_of(x, found) for x in (c.fast_device, c.visible_device)]
        every = f"{c.transfer_every} {c.transfer_unit}"
        cells = d * k + r * (d + k)
        rows.append([name, type(tile).__name__, f"{d} x {k}", r, c.alpha, every, c.tau, c.mode, *devices, cells])
    return markdown(head, rows)


def _devices(found: Mapping[str, Device]) -> str:
    if not found:
        return "All arrays are digital."
    rows = []
    for name, device in found.items():
        numbers = device.numbers()
        low, high = numbers["w_min"], numbers["w_max"]
        rows.append(
            [
                name,
                type(device).__name__,
                f"{low:g} to {high:g}",
                device.granularity,
                f"{(high - low) / device.granularity:.0f}",
                numbers["dw_min_std"],
                numbers["dw_min_dtod"],
                numbers["write_noise_std"],
                device.relaxes,
            ]
        )
    head = ["device", "model", "weights", "step", "states (range / step)", "step noise", "step spread", "write noise"]
    every = "\n\n".join(
        f"**{name}**\n\n" + markdown(["number", "value"], _fields(device)) for name, device in found.items()
    )
    return markdown([*head, "relaxes"], rows) + "\n\n" + every


def _fields(thing: Any) -> list[list[Any]]:
    return [[f.name, getattr(thing, f.name)] for f in dataclasses.fields(thing)]


def _pulses(tiles: Mapping[str, TileModule]) -> str:
    kinds: dict[tuple[str, PulseConfig], list[str]] = {}
    for name, tile in tiles.items():
        if tile.config.fast_device is not None:
            kinds.setdefault(("A, B", tile.config.pulse), []).append(name)
        if tile.config.mode.startswith("pulsed"):
            kinds.setdefault(("C (transfer)", tile.config.transfer_pulse), []).append(name)
    if not kinds:
        return "No pulses: all updates are digital."
    names = [f.name for f in dataclasses.fields(PulseConfig)]
    columns = [
        [array, *(getattr(pulse, name) for name in names), ", ".join(on)] for (array, pulse), on in kinds.items()
    ]
    rows = zip(["array", *names, "tiles"], *columns, strict=True)
    return markdown(["number", *(f"train {i + 1}" for i in range(len(columns)))], rows)


def _costs(found: Mapping[str, Device], costs: CellCosts | None) -> str:
    if not found:
        return "All arrays are digital: no pulses, no estimates."
    rows = []
    for name, device in found.items():
        own = costs_of(device) if costs is None else costs
        figures = ["unknown" if v is None else v for v in (own.energy_per_pulse, own.endurance)]
        rows.append([name, *figures, "set by TileMonitor(costs=...)" if costs is not None else own.source])
    assumed = (
        "Assumed: each device pulse costs the same energy; writes without pulses (the fresh B of a cycle), half-selected "
        "cells, lines and converters cost nothing. Wear is pulses per cell, averaged over an array, over the endurance."
    )
    return markdown(["device", "J a pulse", "endurance, pulses", "source"], rows) + "\n\n" + assumed


def _build() -> str:
    info = build_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = [[name, value] for name, value in info.items()]
    rows += [["torch", torch.__version__], ["torch's CUDA", torch.version.cuda or "none"]]
    rows += [["lightning", lightning.__version__], ["Python", platform.python_version()]]
    rows += [["GPU", gpu], ["torch threads", torch.get_num_threads()]]
    return markdown(["what", "value"], rows)
