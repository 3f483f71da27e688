"""How many pulses each cell gets in a step, by doing the step again on cells that count.

The core counts pulses of whole arrays. Which cells they go to follows from operands, random words and pulse lengths alone,
not from the cells; so the same update on cells whose step is exactly 1, once for each direction, gives the exact number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lrtt import LRTT
from lightning_lrtt.config import LRTTConfig, PulseConfig
from lightning_lrtt.devices import Device, Ideal
from lightning_lrtt.nn import TileModule
from lightning_lrtt.ops import A, B
from lightning_lrtt.tile_step import factor_jobs

_FAR = 2.0**24  # float32 counts exactly up to here


@dataclass(frozen=True, kw_only=True)
class _Counter(Ideal):
    """Each pulse of one direction is a step of 1, whatever the step that pulse trains are planned with."""

    planned: float = 1.0

    @property
    def granularity(self) -> float:
        """The real device's."""
        return self.planned


def _counters(device: Device) -> Iterator[_Counter]:
    for direction in (1.0, -1.0):  # up_down = 1: no step down; -1: no step up
        yield _Counter(dw_min=1.0, up_down=direction, w_max=_FAR, w_min=-_FAR, planned=device.granularity)


@torch.no_grad()
def factor_pulses(optimizer: LRTT, tile: TileModule, group: int) -> dict[str, Tensor]:
    """Pulses that the update about to happen sends to each cell of A ``[d, r]`` and B ``[r, k]``.

    To be called at the optimizer's event ``before_update``. Nothing of the tile changes.
    """
    config = tile.config
    if not config.is_pulsed or config.fast_device is None:
        return {}
    lr = optimizer._lr[group, tile.A.device]
    eta = torch.empty(2, dtype=torch.float32, device=lr.device).unbind()
    first, scale = [tile.latch.grad_a, tile.latch.grad_b], config.alpha * config.factor_scale
    torch.ops.lrtt.pulse_scale_(list(eta), [tile.A.grad, tile.B.grad], first, [lr, lr], [scale, scale])
    found = {"A": torch.zeros_like(tile.A), "B": torch.zeros_like(tile.B)}
    for counter in _counters(config.fast_device):
        hyper = dataclasses.replace(
            config, fast_device=counter, visible_device=None, transfer_mode="auto", reinit_gain=1.0
        ).pack(tile.tile_shape[1])
        for array, name in ((A, "A"), (B, "B")):
            w = torch.zeros_like(found[name])
            for job in factor_jobs(tile, array, eta[array]):
                own = job._replace(w=w, counts=job.counts.clone(), hyper=hyper)
                *columns, _, x_top, d_top = ([column] for column in own)
                torch.ops.lrtt.pulsed_update_(*columns, [], x_top, d_top)
            found[name] += w.abs()
    return found


@torch.no_grad()
def transfer_pulses(tile: TileModule) -> dict[str, Tensor]:
    """Pulses that a transfer of the factors as they are would send to each cell of C ``[d, k]``."""
    config = tile.config
    if config.visible_device is None or not config.mode.startswith("pulsed"):
        return {}
    total = torch.zeros_like(tile.matrix)
    for counter in _counters(config.visible_device):
        counting: LRTTConfig = dataclasses.replace(
            config, fast_device=None, visible_device=counter, pulse=PulseConfig(), reinit_gain=1.0
        )
        a, b = (factor.clone() for factor in tile.factors())
        c = torch.zeros_like(total)
        torch.ops.lrtt.transfer_(
            [a],
            [b],
            [c],
            [tile.tile_state.clone()],
            [tile.tile_counts.clone()],
            [counting.pack(tile.tile_shape[1])],
            [0],
            True,
            [],
        )
        total += c.abs()
    return {"C": total}
