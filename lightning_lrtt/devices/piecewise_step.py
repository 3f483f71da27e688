"""Steps interpolated between nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lrtt import _check
from lightning_lrtt.devices.pulsed import PulsedDevice

_NODES = 16  # as csrc/devices.h has room for


@dataclass(frozen=True, kw_only=True)
class PiecewiseStep(PulsedDevice):
    """Step given by nodes at equal distances over the cell's range, interpolated linearly.

    Args:
        piecewise_up: Factors of the up step from ``b_min`` to ``b_max``, 1 to 16 numbers.
        piecewise_down: The same for the down step; as many.

    All other arguments are those of `PulsedDevice`.

    Raises:
        ValueError: If the lists differ in length, are too long, or the middle up node is 0.

    Example:
        >>> PiecewiseStep(dw_min=0.01, piecewise_up=(1.0, 0.5, 0.0), piecewise_down=(0.0, 0.5, 1.0)).granularity
        0.005
    """

    kind: ClassVar[int] = 8

    piecewise_up: tuple[float, ...] = (1.0,)
    piecewise_down: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        owner = type(self).__name__
        for name in ("piecewise_up", "piecewise_down"):
            nodes = getattr(self, name)
            if not 1 <= len(nodes) <= _NODES:
                raise _check.fail(owner, name, f"1 to {_NODES} numbers", nodes)
            for node in nodes:
                _check.number(owner, name, node, low=0.0)
        if len(self.piecewise_up) != len(self.piecewise_down):
            raise _check.fail(
                owner, "piecewise_down", f"as long as piecewise_up ({len(self.piecewise_up)})", self.piecewise_down
            )
        middle = len(self.piecewise_up) // 2
        _check.number(
            owner,
            f"piecewise_up[{middle}]",
            self.piecewise_up[middle],
            above=0.0,
            remedy="pulses are counted in the middle node's step",
        )
        for name in ("piecewise_up", "piecewise_down"):  # YAML hands over lists, which have no hash
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def granularity(self) -> float:
        """The up step at the middle node, number ``len(piecewise_up) // 2``, as in aihwkit."""
        return self.dw_min * self.piecewise_up[len(self.piecewise_up) // 2]

    def numbers(self) -> dict[str, float]:
        """The model's fields and its nodes."""
        nodes = {
            f"{name}_{i}": float(v)
            for name in ("piecewise_up", "piecewise_down")
            for i, v in enumerate(getattr(self, name))
        }
        return super().numbers() | nodes | {"sections": float(len(self.piecewise_up) - 1)}
