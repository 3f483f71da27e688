"""How many pulses a tile should have counted, in closed form from the operands of every step (docs/pulses.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lrtt import LRTT
from lightning_lrtt.nn.tile import TileModule
from lightning_lrtt.ops import COUNTER

ARRAYS = ("A", "B", "C")


def trains(eta: Tensor, x_max: Tensor, d_max: Tensor, granularity: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """BL, S_x and S_d of every sample under both managements, float64 ``[N]``."""
    kappa = eta * x_max * d_max / granularity
    slots = kappa.ceil().clamp(max=most)
    s = (eta / (granularity * slots.clamp(min=1))).sqrt()
    ratio = (x_max / (d_max * (most / kappa).clamp(max=1))).sqrt()
    live = slots > 0
    zero = torch.zeros_like(s)
    return torch.where(live, slots, zero), torch.where(live, s / ratio, zero), torch.where(live, s * ratio, zero)


def moments(x: Tensor, d: Tensor, slots: Tensor, sx: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the number of coincidences of all samples, float64 scalars.

    A slot of one sample has X Y pulses, with X and Y the numbers of inputs and outputs that fire in it: independent sums of
    Bernoulli variables, so ``E = E[X] E[Y]`` and ``Var = E[X^2] E[Y^2] - E^2``. Slots are independent.
    """
    means, squares = [], []
    for v, scale in ((x, sx), (d, sd)):
        p = (v.float().abs() * scale.float()[:, None]).clamp(max=1.0)
        mean = p.sum(1, dtype=torch.float64)
        means.append(mean)
        squares.append(mean.square() + (p * (1 - p)).sum(1, dtype=torch.float64))
    product = means[0] * means[1]
    return (slots * product).sum(), (slots * (squares[0] * squares[1] - product.square())).sum()


class PulseExpectation:
    """An observer of `LRTT` that adds up mean and variance of the pulses of one linear tile with default trains.

    It reads from the device, so it belongs into eager steps that are not timed.

    Args:
        tile: The tile; ``pulse`` and ``transfer_pulse`` of its config at their defaults.
        lr: Of the tile.
    """

    def __init__(self, tile: TileModule, lr: float) -> None:
        self.tile, config = tile, tile.config
        assert config.fast_device is not None and config.visible_device is not None
        self.eta = lr * abs(config.alpha) * config.factor_scale
        self.fast = config.fast_device.numbers()["granularity"]
        self.visible = config.visible_device.numbers()["granularity"]
        self.mean, self.variance = (torch.zeros(3, dtype=torch.float64, device=tile.A.device) for _ in range(2))
        self.slots, self.samples = torch.zeros_like(self.mean), 0

    def attach(self, optimizer: LRTT) -> None:
        """Watch the optimizer's steps."""
        optimizer.observer = self

    def __call__(self, event: str, modules: Any) -> None:
        """Called by the optimizer around the update and the transfer."""
        if event == "before_update":
            (call,) = self.tile.latch.merged()
            samples = self.tile.samples
            self._add(0, samples(call.xb), samples(call.d), self.eta, self.fast, self.tile.config.pulse.desired_bl)
            self._add(1, samples(call.x), samples(call.da), self.eta, self.fast, self.tile.config.pulse.desired_bl)
            self.samples += samples(call.d).shape[0]
        elif event == "before_transfer" and int(self.tile.tile_state[COUNTER]) + 1 >= self.tile.config.transfer_every:
            self._transfer()

    def _add(self, array: int, x: Tensor, d: Tensor, eta: float | Tensor, granularity: float, most: int) -> None:
        x_max, d_max = (v.float().abs().amax(1).double() for v in (x, d))
        slots, sx, sd = trains(torch.as_tensor(eta, dtype=torch.float64).to(x_max), x_max, d_max, granularity, most)
        self._sum(array, x, d, slots, sx, sd)

    def _sum(self, array: int, x: Tensor, d: Tensor, slots: Tensor, sx: Tensor, sd: Tensor) -> None:
        mean, variance = moments(x, d, slots, sx, sd)
        self.mean[array] += mean
        self.variance[array] += variance
        self.slots[array] += slots.sum()

    def _transfer(self) -> None:
        """Each of the r terms in ``min(ceil(kappa / BL), cap)`` words, every word a train at tau / words."""
        config, (a, b) = self.tile.config, self.tile.factors()
        most = config.transfer_pulse.desired_bl
        x_max, d_max = b.abs().amax(1).double(), a.abs().amax(0).double()
        words = (abs(config.tau) * x_max * d_max / self.visible / most).ceil().clamp(1, config.transfer_max_words)
        slots, sx, sd = trains(abs(config.tau) / words, x_max, d_max, self.visible, most)
        self._sum(2, b, a.t(), words * slots, sx, sd)
