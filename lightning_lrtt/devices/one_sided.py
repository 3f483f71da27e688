"""Pairs of one-sided cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lightning_lrtt import _check
from lightning_lrtt.devices.base import Device
from lightning_lrtt.devices.soft_bounds import SoftBounds


@dataclass(frozen=True, kw_only=True)
class OneSided(Device):
    """A pair ``w = g+ - g-`` of cells of which each takes pulses upwards only.

    A pulse that raises w goes to g+, one that lowers it to g-, upwards both. Both cells are drawn from ``device``,
    each on its own. As they fill up, a refresh makes room: cells with ``larger / w_max > refresh_upper_thres`` and
    ``smaller / w_max > refresh_lower_thres`` are reset (``device.reset``), and the one that was larger takes up
    pulses, each followed by an exact read, until the difference is back or ``refresh_max_pulses`` were spent. Writing
    w without pulses (loads, reinits) puts ``max(w, 0)`` into g+ and ``max(-w, 0)`` into g-. Decay and diffusion act on
    both cells.

    The idea and the thresholds are aihwkit's OneSidedUnitCell; there, the refresh writes the difference open-loop with
    one pulse train of at most 31 pulses, and counts vector updates where this counts optimizer steps.

    Args:
        device: Model of both cells, without write noise.
        refresh_every: Optimizer steps between refreshes; 0: never.
        refresh_upper_thres: Threshold of the larger cell, as a share of ``w_max``.
        refresh_lower_thres: Threshold of the smaller cell.
        refresh_max_pulses: Most pulses that a refresh spends on a cell.

    Raises:
        ValueError: If a number is outside its range or ``device`` has write noise.
        TypeError: If ``device`` is no single device.

    Example:
        >>> OneSided(device=SoftBounds(dw_min=0.002), refresh_every=100).granularity
        0.002
    """

    kind: ClassVar[int] = -1  # that of ``device``

    device: Device = field(default_factory=SoftBounds)
    refresh_every: int = 0
    refresh_upper_thres: float = 0.75
    refresh_lower_thres: float = 0.25
    refresh_max_pulses: int = 1000

    def __post_init__(self) -> None:
        """Refuse what no pair can be."""
        if not isinstance(self.device, Device) or isinstance(self.device, OneSided):
            raise TypeError(f"OneSided: device must be a single device of lightning_lrtt.devices, got {self.device!r}")
        if self.device.planes:
            raise _check.fail(
                "OneSided",
                "device.write_noise_std",
                "0",
                self.device.numbers()["write_noise_std"],
                "a pair keeps its two conductances as they are read",
            )
        if self.device.numbers()["w_max"] <= 0:
            raise _check.fail(
                "OneSided", "device.w_max", "> 0", self.device.numbers()["w_max"], "pulses go upwards only"
            )
        _check.integer("OneSided", "refresh_every", self.refresh_every, low=0, high=2**24)
        _check.integer("OneSided", "refresh_max_pulses", self.refresh_max_pulses, low=1, high=2**24)
        for name in ("refresh_upper_thres", "refresh_lower_thres"):
            _check.number("OneSided", name, getattr(self, name), low=0.0, high=1.0)

    @property
    def granularity(self) -> float:
        """That of ``device``."""
        return self.device.granularity

    @property
    def relaxes(self) -> bool:
        """Whether the cells change between updates or are refreshed."""
        return self.device.relaxes or self.refresh_every > 0

    @property
    def planes(self) -> int:
        """2: g+ and g-."""
        return 2

    def numbers(self) -> dict[str, float]:
        """Those of ``device``, and the pair's."""
        own = ("refresh_every", "refresh_upper_thres", "refresh_lower_thres", "refresh_max_pulses")
        return self.device.numbers() | {"pair": 1.0} | {name: float(getattr(self, name)) for name in own}

    def clipped_power(self, std: float, one_sided: bool = True) -> float:
        """See `Device.clipped_power`: w reaches as far as the upper bound of either cell."""
        return self.device.clipped_power(std, one_sided=True)
