"""Steps with exponential saturation."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import ClassVar

from lightning_lrtt import _check
from lightning_lrtt.devices.pulsed import PulsedDevice


@dataclass(frozen=True, kw_only=True)
class ExpStep(PulsedDevice):
    """Step with exponential saturation on both sides, as measured on ReRAM (Gong et al. 2018).

    With ``z = 2 a w / (b_max - b_min) + b``: ``w += max(1 - A_up exp(gamma_up z), 0) s_up (1 + sigma xi)``; down with
    ``1 - A_down exp(-gamma_down z)``.

    Args:
        A_up: Amplitude of the up saturation.
        A_down: Amplitude of the down saturation.
        gamma_up: Rate of the up saturation.
        gamma_down: Rate of the down saturation.
        a: Scale of the weight in z.
        b: Offset in z.

    All other arguments are those of `PulsedDevice`.

    Example:
        >>> round(ExpStep(dw_min=0.01).granularity, 5)  # the down step at w = 0
        0.00983
    """

    kind: ClassVar[int] = 5

    A_up: float = 0.00081
    A_down: float = 0.36833
    gamma_up: float = 12.44625
    gamma_down: float = 12.78785
    a: float = 0.244
    b: float = 0.2425

    def __post_init__(self) -> None:
        """Refuse what no device can be."""
        super().__post_init__()
        for name in ("A_up", "A_down", "gamma_up", "gamma_down", "a", "b"):
            _check.number(type(self).__name__, name, getattr(self, name))

    @property
    def granularity(self) -> float:
        """The mean down step at w = 0, as in aihwkit; ``dw_min`` where that is 0."""
        down = 1.0 - self.A_down * exp(min(-self.gamma_down * self.b, 80.0))  # the core clips there too
        step = self.dw_min * (1.0 - max(self.up_down, 0.0)) * max(down, 0.0)
        return step if step > 0.0 else self.dw_min
