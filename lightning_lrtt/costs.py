"""What a pulse costs on a device: energy, and how many of them a cell stands.

Estimates, under these assumptions: a device pulse (a coincidence that reaches a cell) costs ``energy_per_pulse``, whatever
the weight, the direction and the array; writes without pulses (initialisation, the fresh B of a cycle, loads), half-selected
cells, charging of lines, converters and digital circuits cost nothing. So a figure is a lower bound of what a chip would
take. Wear is pulses per cell, averaged over an array, divided by ``endurance``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_lrtt import _check, presets
from lightning_lrtt.devices import Device

__all__ = ["COSTS", "CellCosts", "costs_of"]


@dataclass(frozen=True, kw_only=True)
class CellCosts:
    """Costs of one device pulse on one cell; None: not known, and nothing is estimated from it.

    Args:
        energy_per_pulse: Joules a pulse, > 0.
        endurance: Pulses that a cell stands, > 0.
        source: Where the figures come from, for tables.

    Raises:
        ValueError: If a figure is not positive.

    Example:
        >>> CellCosts(energy_per_pulse=1e-12, endurance=1e8, source="my array").energy_per_pulse
        1e-12
    """

    energy_per_pulse: float | None = None
    endurance: float | None = None
    source: str = "unknown"

    def __post_init__(self) -> None:
        """Refuse figures that cannot be."""
        for name in ("energy_per_pulse", "endurance"):
            if getattr(self, name) is not None:
                _check.number("CellCosts", name, getattr(self, name), above=0.0)


_UNKNOWN = "unknown: the publication of the fit gives no energy a pulse that we know of; set TileMonitor(costs=...)"

# Endurance is open in all of them: published cycling tests count full switches or stop before wear shows.
COSTS: dict[str, CellCosts] = {
    "capacitor": CellCosts(source=_UNKNOWN),
    # Tang et al., IEDM 2018, abstract: about 1 fJ projected for 100 x 100 nm^2 (charge scales with area).
    "ecram": CellCosts(energy_per_pulse=1e-15, source="Tang et al., IEDM 2018: projection for 100 nm x 100 nm"),
    "ecram_mo": CellCosts(source=_UNKNOWN),
    "idealized": CellCosts(source="unknown: a specification with more states, not a device"),
    # Gokmen & Vlasov 2016 specify pulses of 1 V and 1 ns on devices of 24 MOhm on average: V^2 t / R.
    "gokmen_vlasov": CellCosts(
        energy_per_pulse=1.0**2 * 1e-9 / 24e6,
        source="derived from the specification of Gokmen & Vlasov 2016: (1 V)^2 x 1 ns / 24 MOhm; no measured device",
    ),
    "ideal": CellCosts(source="unknown: exact cells, not a device"),
    "reram_es": CellCosts(source=_UNKNOWN),
    "reram_sb": CellCosts(source=_UNKNOWN),
    "reram_array_om": CellCosts(source=_UNKNOWN),
    "reram_array_hfo2": CellCosts(source=_UNKNOWN),
}


def costs_of(device: Device) -> CellCosts:
    """The costs of the preset that ``device`` equals; unknown for a device of your own.

    Example:
        >>> costs_of(presets.device("ecram")).energy_per_pulse
        1e-15
    """
    name = presets.name_of(device)
    return CellCosts() if name is None else COSTS[name]
