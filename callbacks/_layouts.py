"""Layouts of TensorBoard's custom-scalars tab."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning_lrtt.callbacks._log_row import writers

from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.devices import Device
from lightning_lrtt.nn import TileModule

Layout = dict[str, dict[str, list[Any]]]  # category -> chart -> [kind, tags]

_MOST_TILES = 32  # categories of single tiles; the overall charts have all
_SINGLE = {
    "norms": ("norm_A", "norm_B", "norm_AB"),
    "C and A·B": ("norm_C", "norm_AB"),
    "rank in use": ("effective_rank_AB",),
    "stability": ("stability",),
}


def tile_layout(tiles: Mapping[str, TileModule], more: Collection[str] = ()) -> Layout:
    """Charts over all tiles, then a category for each tile; none that would stay empty.

    Args:
        tiles: By name.
        more: What else is logged: ``gradient``, ``energy``, ``wear``.
    """
    configs = [tile.config for tile in tiles.values()]
    charts = {
        "loss": ("^(train|val)/.*loss", True),
        "stability: above 2 / curvature a step diverges": ("^tile/.*/stability$", True),
        "share of a transfer that was lost": ("^transfer/.*/clip_fraction$", _any(c.visible_device for c in configs)),
        "cells of C at a bound": ("^tile/.*/at_bounds_C$", _any(c.visible_device for c in configs)),
        "cells of A and B at a bound": ("^tile/.*/at_bounds_[AB]$", _any(c.fast_device for c in configs)),
        "effective rank of A·B": ("^tile/.*/effective_rank_AB$", True),
        "cosine of A·B and the gradient": ("^tile/.*/cosine_gradient$", "gradient" in more),
        "size of a transfer, per cell": ("^transfer/.*/size$", any(c.mode.startswith("pulsed") for c in configs)),
        "pulses per cell so far": ("^pulse/.*/per_cell_[ABC]$", any(_on_devices(c) for c in configs)),
        "energy, pJ": ("^cost/(.*/)?energy_pJ$", "energy" in more),
        "wear, share of the endurance": ("^cost/.*/wear_[ABC]$", "wear" in more),
        "samples a second": ("^perf/samples_per_s$", True),
        "step, ms": ("^perf/step_ms$", True),
    }
    layout: Layout = {
        "tiles: overall": {title: ["Multiline", [tag]] for title, (tag, logged) in charts.items() if logged}
    }
    for name, tile in list(tiles.items())[:_MOST_TILES]:
        at, config = re.escape(name), tile.config
        on: tuple[str, ...] = ("A", "B") if config.fast_device is not None else ()
        on += ("C",) if config.visible_device is not None else ()
        own: dict[str, list[Any]] = {title: [f"^tile/{at}/{tag}$" for tag in tags] for title, tags in _SINGLE.items()}
        if on:
            own["cells at bounds"] = [f"^tile/{at}/at_bounds_[{''.join(on)}]$"]
            own["pulses since the last log"] = [f"^pulse/{at}/[{''.join(on)}]$"]
        if config.visible_device is not None:
            own["transfer: lost share"] = [f"^transfer/{at}/clip_fraction$"]
        # A band takes exact tags: value, lower, upper.
        band = ["Margin", [f"tile/{name}/mean_C", f"tile/{name}/min_C", f"tile/{name}/max_C"]]
        layout[f"tile {name}"] = {title: ["Multiline", tags] for title, tags in own.items()}
        layout[f"tile {name}"]["C: mean between its extremes"] = band
    return layout


def _any(devices: Iterable[Device | None]) -> bool:
    return any(device is not None for device in devices)


def _on_devices(config: LRTTConfig) -> bool:
    return config.is_pulsed or config.mode.startswith("pulsed")


def write_layouts(trainer: pl.Trainer, owner: Any) -> None:
    """Write the layouts of all callbacks (``custom_scalars() -> Layout``) as one, when ``owner`` is the first of them.

    TensorBoard reads one layout a run.
    """
    owners = [callback for callback in trainer.callbacks if hasattr(callback, "custom_scalars")]  # type: ignore[attr-defined]  # set by a connector
    if not owners or owners[0] is not owner:
        return
    layout: Layout = {}
    for callback in owners:
        layout |= callback.custom_scalars()
    for writer in writers(trainer) if layout else []:
        writer.add_custom_scalars(layout)
