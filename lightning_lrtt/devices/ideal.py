"""Exact cells."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_lrtt.devices.constant_step import ConstantStep


@dataclass(frozen=True, kw_only=True)
class Ideal(ConstantStep):
    """ConstantStep without any variation: exact steps of ``dw_min`` between exact bounds.

    All arguments are those of `PulsedDevice`; every spread and noise is 0 and the bounds are -1 and 1 by default.

    Example:
        >>> Ideal(dw_min=0.01).dw_min_std
        0.0
    """

    dw_min_dtod: float = 0.0
    dw_min_std: float = 0.0
    up_down_dtod: float = 0.0
    w_max: float = 1.0
    w_min: float = -1.0
    w_max_dtod: float = 0.0
    w_min_dtod: float = 0.0
