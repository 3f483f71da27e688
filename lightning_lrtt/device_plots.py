"""What a device does, measured on simulated cells: pulse responses, steps, number of states, symmetry point.

The curves come from the same operators that train, so a figure shows what a tile meets. ``lrtt device NAME --plot
FILE`` draws it from the command line, ``TileMonitor(device_plots=True)`` in TensorBoard. Figures need matplotlib.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_lrtt import _check, devices
from lightning_lrtt._files import replacing
from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.ops import COUNTS, KEY, STATE_SIZE, STEP, C

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Characteristics", "characteristics", "mean_cell", "plot_response", "response", "save_plot", "steps"]

_POINTS = 41  # weights at which steps are measured
_RECORDS = 200  # points of a plotted response, at most, for each direction
_SUFFIXES = (".png", ".pdf", ".svg")


class _Cells:
    """A row of cells of one device."""

    def __init__(self, device: devices.Device, count: int, seed: int) -> None:
        self.device = device
        self.hyper = LRTTConfig(rank=1, reinit_gain=1.0, visible_device=device).pack(count)
        self.w = torch.zeros(1, count)
        self.held = [torch.zeros(device.planes, 1, count)] if device.planes else []
        self.state = torch.zeros(STATE_SIZE, dtype=torch.int64)
        self.state[KEY] = seed
        self.counts = torch.zeros(len(COUNTS), dtype=torch.int64)

    def write(self, value: float) -> None:
        """Program all cells to ``value``, as far as their bounds allow."""
        self.w.fill_(value)
        torch.ops.lrtt.clip_(self.w, self.state, self.hyper, C, True, self.held)

    def pulse(self, up: bool, count: int = 1) -> None:
        """``count`` pulses on every cell: kappa = lr max|x| max|d| / granularity = 1, one slot that always fires."""
        torch.ops.lrtt.pulsed_update_(
            [self.w],
            [torch.ones(count, self.w.shape[1])],
            [torch.full((count, 1), -1.0 if up else 1.0)],
            [torch.tensor(self.device.granularity)],
            [self.state],
            [self.counts],
            [self.hyper],
            [C],
            [0],
            self.held,
        )
        self.state[STEP] += 1


def response(
    device: devices.Device,
    pulses: int,
    cells: int = 200,
    cycles: int = 1,
    every: int = 1,
    start: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Weights as they are read during trains of ``pulses`` up and ``pulses`` down pulses.

    Args:
        device: The model.
        pulses: Length of a train.
        cells: How many cells are drawn.
        cycles: How many times up and down.
        every: Read after every so many pulses.
        start: Weight at the start; None: each cell's lower bound, or 0 for pairs.
        seed: Of the draws and the noise.

    Returns:
        float32 ``[1 + 2 cycles ceil(pulses / every), cells]``.

    Raises:
        ValueError: If a count is below 1.

    Example:
        >>> from lightning_lrtt import devices
        >>> response(devices.Ideal(dw_min=0.125), pulses=2, cells=1, start=0.0).flatten().tolist()
        [0.0, 0.125, 0.25, 0.125, 0.0]
    """
    for name, value in (("pulses", pulses), ("cells", cells), ("cycles", cycles), ("every", every)):
        _check.integer("response", name, value, low=1)
    row = _Cells(device, cells, seed)
    row.write((0.0 if device.planes == 2 else -1e6) if start is None else start)
    trace = [row.w[0].clone()]
    for train in range(2 * cycles):
        for first in range(0, pulses, every):
            row.pulse(train % 2 == 0, min(every, pulses - first))
            trace.append(row.w[0].clone())
    return torch.stack(trace)


def steps(device: devices.Device, weights: Sequence[float], cells: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean change of the weight by one pulse up and one down, at each of ``weights``, without cycle-to-cycle noise.

    Args:
        device: The model.
        weights: Where the cells are put before the pulse, as far as their bounds allow.
        cells: How many cells are drawn; the same for every weight.
        seed: Of the draws.

    Returns:
        Two float32 ``[len(weights), cells]``: up steps and down steps.

    Example:
        >>> from lightning_lrtt import devices
        >>> up, down = steps(devices.Ideal(dw_min=0.125), [0.0, 1.0], cells=1)
        >>> up.flatten().tolist(), down.flatten().tolist()
        ([0.125, 0.0], [-0.125, -0.125])
    """
    row, changes = _Cells(_with(device, dw_min_std=0.0, write_noise_std=0.0), cells, seed), []
    for up in (True, False):
        for weight in weights:
            row.write(weight)
            before = row.w[0].clone()
            row.pulse(up)
            changes.append(row.w[0] - before)
    both = torch.stack(changes).view(2, len(weights), cells)
    return both[0], both[1]


@dataclass(frozen=True)
class Characteristics:
    """What papers tabulate of a device, cell by cell.

    Args:
        weights: ``[points]``, where steps were measured: from the lower to the upper bound of the mean cell.
        up: ``[points, cells]`` up steps there.
        down: ``[points, cells]`` down steps there.
        states: ``[cells]`` number of states: width of the cell's range by the mean size of its steps within.
        symmetry_point: ``[cells]`` weight at which up and down steps are equal; NaN where they nowhere are.
    """

    weights: Tensor
    up: Tensor
    down: Tensor
    states: Tensor
    symmetry_point: Tensor

    def __str__(self) -> str:
        """Medians and the range of 80% of the cells."""
        crossing = self.symmetry_point[self.symmetry_point.isfinite()]
        share = len(crossing) / len(self.symmetry_point)
        symmetry = f"{_three(crossing)} (in {share:.0%} of the cells)" if len(crossing) else "none"
        return f"number of states {_three(self.states)}; symmetry point {symmetry}"


def characteristics(device: devices.Device, cells: int = 200, seed: int = 0) -> Characteristics:
    """Measure a device.

    Args:
        device: The model.
        cells: How many cells are drawn.
        seed: Of the draws.

    Example:
        >>> from lightning_lrtt import devices
        >>> found = characteristics(devices.Ideal(dw_min=0.0078125), cells=2)
        >>> found.states.tolist()
        [256.0, 256.0]
    """
    numbers = device.numbers()
    low = -numbers["w_max"] if device.planes == 2 else numbers["w_min"]
    weights = torch.linspace(low, numbers["w_max"], _POINTS)
    up, down = steps(device, weights.tolist(), cells, seed)
    row = _Cells(_with(device, dw_min_std=0.0, write_noise_std=0.0), cells, seed)
    row.write(1e6)
    upper = row.w[0].clone()
    row.write(-1e6)
    lower = row.w[0].clone()
    inside = ((weights[:, None] >= lower) & (weights[:, None] <= upper)).float()
    # Where a pulse is cut by the bound it shows less than the step, so these two are left out of the mean.
    size = ((up * (weights[:, None] < upper) - down * (weights[:, None] > lower)) * inside).sum(0)
    count = ((weights[:, None] < upper).float() * inside + (weights[:, None] > lower).float() * inside).sum(0)
    states = (upper - lower) / (size / count)
    room = torch.minimum(upper - weights[:, None], weights[:, None] - lower)
    whole = room > torch.maximum(up, -down)  # neither step is cut by a bound, which would look like a crossing
    balance = torch.where(
        (up + down).abs() > 2.0**-22 * (upper - lower), up + down, 0.0
    )  # else it is rounding of w + dw
    return Characteristics(weights, up, down, states, _crossing(weights, torch.where(whole, balance, torch.nan)))


def _crossing(weights: Tensor, balance: Tensor) -> Tensor:
    """Where the balance first goes from positive to not positive, linearly between the points; NaN without that."""
    falls = (balance[:-1] > 0) & (balance[1:] <= 0)
    at = falls.float().argmax(0)
    one, two = (balance.gather(0, (at + i)[None])[0] for i in (0, 1))
    point = weights[at] + (weights[1] - weights[0]) * one / (one - two)
    return torch.where(falls.any(0), point, torch.nan)


def _with(device: devices.Device, **numbers: float) -> devices.Device:
    """The device with other numbers; of a pair, its cells'."""
    if isinstance(device, devices.OneSided):
        return replace(device, device=_with(device.device, **numbers))
    return replace(device, **numbers)  # type: ignore[type-var]  # devices are dataclasses


def mean_cell(device: devices.Device) -> devices.Device:
    """The device without any spread from cell to cell.

    Args:
        device: The model; of a pair, its cells lose their spread.

    Example:
        >>> mean_cell(devices.SoftBounds(dw_min=0.01)).w_max_dtod
        0.0
    """
    inner = device.device if isinstance(device, devices.OneSided) else device
    names = {f.name for f in fields(inner)}  # type: ignore[arg-type]  # devices are dataclasses
    spread = [name for name in names if name.endswith("_dtod") or name in ("reference_std", "corrupt_devices_prob")]
    return _with(device, **dict.fromkeys(spread, 0.0))


def plot_response(
    device: devices.Device, name: str = "", pulses: int | None = None, cells: int = 200, seed: int = 0
) -> Figure:
    """The figure of a device, as papers show it.

    Four panels: weight against pulse number, up and down, with the band of 80% of the cells, that of 80% of the
    repetitions on the mean cell (cycle to cycle, write noise included), and five single cells; step against weight,
    with the band of 80% of the cells; and the distributions of the number of states and of the symmetry point.

    Args:
        device: The model.
        name: Title.
        pulses: Length of the trains; None: one and a half times the mean number of states.
        cells: How many cells are drawn, and how often the mean cell is repeated.
        seed: Of the draws and the noise.

    Returns:
        A figure that belongs to no window; ``figure.savefig(...)``.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = plot_response(devices.SoftBounds(dw_min=0.05), pulses=40, cells=20)
        >>> len(figure.axes)
        4
    """
    figure_type = _matplotlib()
    found = characteristics(device, cells, seed)
    if pulses is None:
        pulses = max(math.ceil(1.5 * float(found.states.nanmedian())), 10)
    every = -(-pulses // _RECORDS)
    drawn = response(device, pulses, cells, every=every, seed=seed)
    repeated = response(mean_cell(device), pulses, cells, every=every, seed=seed)
    number = torch.cat(
        [torch.arange(0, pulses, every), pulses + torch.arange(0, pulses, every), torch.tensor([2 * pulses])]
    )

    figure = figure_type(figsize=(8.4, 6.0), layout="constrained")
    axes = figure.subplots(2, 2)
    panel = axes[0, 0]
    panel.fill_between(number, *_band(drawn), color="tab:blue", alpha=0.2, label="80% of cells")
    panel.fill_between(number, *_band(repeated), color="tab:orange", alpha=0.5, label="80% of repetitions")
    panel.plot(number, drawn[:, :5], color="0.5", linewidth=0.5)
    panel.plot(number, repeated.median(1).values, color="black", linewidth=1.2, label="mean cell, median")
    panel.set(xlabel=f"pulse: {pulses} up, {pulses} down", ylabel="weight read")
    panel.legend(fontsize=7)
    panel = axes[0, 1]
    for change, color, label in ((found.up, "tab:red", "up"), (-found.down, "tab:green", "down")):
        panel.fill_between(found.weights, *_band(change), color=color, alpha=0.2)
        panel.plot(found.weights, change.median(1).values, color=color, label=label)
    panel.set(xlabel="weight", ylabel="size of one step")
    panel.legend(fontsize=7)
    crossing = found.symmetry_point[found.symmetry_point.isfinite()]
    axes[1, 0].hist(found.states.clamp(max=float(found.states.quantile(0.98))), bins=30, color="tab:blue")
    axes[1, 0].set(xlabel="number of states", ylabel="cells", title=_three(found.states))
    if len(crossing):
        axes[1, 1].hist(crossing, bins=30, color="tab:purple")
        title = f"{_three(crossing)}, in {len(crossing) / cells:.0%} of the cells"
    else:
        title = "up and down steps are equal nowhere in the range, or everywhere"
    axes[1, 1].set(xlabel="symmetry point", ylabel="cells", title=title)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.title.set_fontsize(8)
    figure.suptitle(name or type(device).__name__)
    return figure


def _matplotlib() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "plot_response: matplotlib must be installed for figures, but it is not; pip install matplotlib, or "
            "pip install 'lightning-lrtt[plot]'"
        ) from None
    return Figure


def _band(values: Tensor) -> tuple[Tensor, Tensor]:
    low, high = values.quantile(torch.tensor([0.1, 0.9]), dim=1)
    return low, high


def _three(values: Tensor) -> str:
    low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def save_plot(
    device: devices.Device,
    path: str | os.PathLike[str],
    name: str = "",
    pulses: int | None = None,
    cells: int = 200,
    seed: int = 0,
) -> None:
    """Write the figure of `plot_response`; the file appears whole or not at all.

    Args:
        device: The model.
        path: ``*.png``, ``*.pdf`` or ``*.svg``.
        name: Title.
        pulses: See `plot_response`.
        cells: See `plot_response`.
        seed: See `plot_response`.

    Raises:
        ValueError: If the suffix is unknown.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_plot(devices.Ideal(dw_min=0.05), Path(folder) / "ideal.svg", pulses=20, cells=10)
        ...     [file.name for file in Path(folder).iterdir()]
        ['ideal.svg']
    """
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise _check.fail("save_plot", "path", f"a file named *{', *'.join(_SUFFIXES)}", str(path))
    figure = plot_response(device, name, pulses, cells, seed)
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:], dpi=100)
