"""Steps that vanish at the cell's own bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lrtt.devices.pulsed import PulsedDevice


@dataclass(frozen=True, kw_only=True)
class SoftBounds(PulsedDevice):
    """Step that vanishes at the cell's own bound: ``w += s_up (1 - w / b_max)(1 + sigma xi)``.

    Args:
        mult_noise: True: noise multiplies the step as above. False: ``w += s_up (1 - w / b_max + sigma xi)``.

    All other arguments are those of `PulsedDevice`.

    Example:
        >>> from lightning_lrtt import LRTTConfig, devices
        >>> LRTTConfig(rank=4, fast_device=devices.SoftBounds(), visible_device=devices.SoftBounds()).is_pulsed
        True
    """

    kind: ClassVar[int] = 3

    mult_noise: bool = True
