"""Layouts of TensorBoard's custom-scalars tab."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning_lrtt.callbacks._log_row import writers

Layout = dict[str, dict[str, list[Any]]]  # category -> chart -> [kind, tags]

_MOST_TILES = 32  # categories of single tiles; the overall charts have all
_SINGLE = {
    "norms": ("norm_A", "norm_B", "norm_AB"),
    "C and A·B": ("norm_C", "norm_AB"),
    "rank in use": ("effective_rank_AB",),
    "cells at bounds": ("at_bounds_A", "at_bounds_B", "at_bounds_C"),
    "stability": ("stability",),
}


def tile_layout(names: Iterable[str]) -> Layout:
    """Charts over all tiles, then a category for each tile."""

    def over_all(*tags: str) -> list[Any]:
        return ["Multiline", list(tags)]

    overall = {
        "loss": over_all("^(train|val)/.*loss"),
        "stability: above 2 / curvature a step diverges": over_all("^tile/.*/stability$"),
        "share of a transfer that was lost": over_all("^transfer/.*/clip_fraction$"),
        "cells of C at a bound": over_all("^tile/.*/at_bounds_C$"),
        "cells of A and B at a bound": over_all("^tile/.*/at_bounds_[AB]$"),
        "effective rank of A·B": over_all("^tile/.*/effective_rank_AB$"),
        "cosine of A·B and the gradient": over_all("^tile/.*/cosine_gradient$"),
        "size of a transfer, per cell": over_all("^transfer/.*/size$"),
        "pulses per cell so far": over_all("^pulse/.*/per_cell_[ABC]$"),
        "energy, J": over_all("^cost/(.*/)?energy_J$"),
        "wear, share of the endurance": over_all("^cost/.*/wear_[ABC]$"),
        "samples a second": over_all("^perf/samples_per_s$"),
        "step, ms": over_all("^perf/step_ms$"),
    }
    layout: Layout = {"tiles: overall": overall}
    for name in list(names)[:_MOST_TILES]:
        at = re.escape(name)
        charts: dict[str, list[Any]] = {
            title: ["Multiline", [f"^tile/{at}/{tag}$" for tag in tags]] for title, tags in _SINGLE.items()
        }
        # A band takes exact tags: value, lower, upper.
        charts["C: mean between its extremes"] = [
            "Margin",
            [f"tile/{name}/mean_C", f"tile/{name}/min_C", f"tile/{name}/max_C"],
        ]
        charts["pulses since the last log"] = ["Multiline", [f"^pulse/{at}/[ABC]$"]]
        charts["transfer: lost share"] = ["Multiline", [f"^transfer/{at}/clip_fraction$"]]
        layout[f"tile {name}"] = charts
    return layout


def write_layouts(trainer: pl.Trainer, owner: Any) -> None:
    """Write the layouts of all callbacks (``custom_scalars() -> Layout``) as one, when ``owner`` is the first of them.

    TensorBoard reads one layout a run.
    """
    owners = [callback for callback in trainer.callbacks if hasattr(callback, "custom_scalars")]  # type: ignore[attr-defined]
    if not owners or owners[0] is not owner:
        return
    layout: Layout = {}
    for callback in owners:
        layout |= callback.custom_scalars()
    for writer in writers(trainer) if layout else []:
        writer.add_custom_scalars(layout)  # type: ignore[no-untyped-call]
