"""Steps that do not depend on the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lrtt.devices.pulsed import PulsedDevice


@dataclass(frozen=True, kw_only=True)
class ConstantStep(PulsedDevice):
    """Step independent of the weight: ``w += s_up (1 + sigma xi)`` (Gokmen & Vlasov 2016).

    All arguments are those of `PulsedDevice`.

    Example:
        >>> ConstantStep(dw_min=0.002).granularity
        0.002
    """

    kind: ClassVar[int] = 1
