"""From the tiles' counters, as they arrive, to what is logged of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning_lrtt.callbacks import _tile_statistics as statistics

from lightning_lrtt.costs import CellCosts, costs_of
from lightning_lrtt.nn import TileModule
from lightning_lrtt.ops import COUNTS, FIXED_POINT


@dataclass(frozen=True)
class _Facts:
    """What of a tile does not change in a run: cells of each array, and the costs of those on a device."""

    cells: dict[str, int]
    costs: dict[str, CellCosts]


class TileRows:
    """Differences since the last log, means per cell, and estimates of energy and wear.

    Args:
        costs: Of all arrays on devices; None: those of each device's preset.
    """

    def __init__(self, costs: CellCosts | None) -> None:
        self._costs = costs
        self._counts: dict[str, list[int]] = {}  # at the last log
        self._facts: dict[str, _Facts] = {}
        self._gains: dict[int, float] = {}

    def state(self) -> dict[str, list[int]]:
        """Counters at the last log, for a checkpoint."""
        return {name: list(row) for name, row in self._counts.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._counts = dict(state)

    def begin(self, tiles: Mapping[str, TileModule]) -> None:
        """At the start of training: one read of the counters of tiles that no checkpoint knows."""
        self._facts = {name: self._facts_of(tile) for name, tile in tiles.items()}
        self._gains.clear()
        fresh = {name: tile for name, tile in tiles.items() if name not in self._counts}
        if fresh:  # a resumed run goes on from the checkpoint's last log
            rows = torch.stack([tile.tile_counts for tile in fresh.values()]).tolist()
            self._counts.update(zip(fresh, rows, strict=True))

    def known(self) -> set[str]:
        """What is estimated of all tiles or some: ``energy``, ``wear``."""
        found = [costs for facts in self._facts.values() for costs in facts.costs.values()]
        energy = {"energy"} if any(c.energy_per_pulse is not None for c in found) else set()
        return energy | ({"wear"} if any(c.endurance is not None for c in found) else set())

    def gain(self, tile: TileModule) -> float:
        """`_tile_statistics.effective_gain`, computed once."""
        if id(tile) not in self._gains:
            self._gains[id(tile)] = statistics.effective_gain(tile)
        return self._gains[id(tile)]

    def counted(self, values: list[float]) -> dict[str, float]:
        """Metrics from the counters of all tiles, one after the other (exact in float64 below 2^53)."""
        metrics: dict[str, float] = {}
        total: float | None = 0.0
        size = len(COUNTS)
        for i, (name, facts) in enumerate(self._facts.items()):
            new = [int(value) for value in values[i * size : (i + 1) * size]]
            old, self._counts[name] = self._counts[name], new
            counts = dict(zip(COUNTS, new, strict=True))
            since = {key: value - before for (key, value), before in zip(counts.items(), old, strict=True)}
            for array, cells in facts.cells.items():
                pulses = f"pulses_{array.lower()}"
                metrics[f"pulse/{name}/{array}"] = float(since[pulses])
                metrics[f"pulse/{name}/per_cell_{array}"] = counts[pulses] / cells
            metrics[f"transfer/{name}/count"] = float(counts["transfers"])
            metrics[f"transfer/{name}/clip_fraction"] = since["lost"] / max(since["intended"], 1)
            if since["intended"] and since["transfers"]:
                moved = since["intended"] / FIXED_POINT
                metrics[f"transfer/{name}/size"] = moved / since["transfers"] / facts.cells["C"]
            metrics[f"tile/{name}/nonfinite"] = float(counts["nonfinite"])
            energy = self._estimate(name, facts, counts, metrics)
            total = None if total is None or energy is None else total + energy
        if total is not None and any(facts.costs for facts in self._facts.values()):
            metrics["cost/energy_pJ"] = total
        return metrics

    @staticmethod
    def _estimate(name: str, facts: _Facts, counts: dict[str, int], metrics: dict[str, float]) -> float | None:
        """Energy of a tile's pulses so far in pJ, None if a figure is missing; wear of its arrays."""
        energy: float | None = 0.0
        for array, costs in facts.costs.items():
            pulses = counts[f"pulses_{array.lower()}"]
            each = costs.energy_per_pulse
            energy = None if energy is None or each is None else energy + pulses * each * 1e12
            if costs.endurance is not None:
                metrics[f"cost/{name}/wear_{array}"] = pulses / facts.cells[array] / costs.endurance
        if facts.costs and energy is not None:
            metrics[f"cost/{name}/energy_pJ"] = energy
        return energy

    def _facts_of(self, tile: TileModule) -> _Facts:
        fast, visible = tile.config.fast_device, tile.config.visible_device
        on = {"A": fast, "B": fast, "C": visible}
        costs = {array: self._costs or costs_of(device) for array, device in on.items() if device is not None}
        return _Facts({"A": tile.A.numel(), "B": tile.B.numel(), "C": tile.weight.numel()}, costs)
