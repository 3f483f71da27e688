"""Draws the figures of docs/algorithm.md: ``python docs/algorithm.py`` (needs matplotlib; about ten seconds).

All weights are moved by the operators that train; only the fired slots of algorithm_pulses.png are drawn here.
"""

from __future__ import annotations

import matplotlib
import torch
from figures import save
from torch import Tensor

from lightning_lrtt import LRTT, LRTTConfig, devices
from lightning_lrtt.device_plots import steps
from lightning_lrtt.nn import LRTTLinear
from lightning_lrtt.ops import COUNTS, KEY, STATE_SIZE, STEP

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GREY, BLUE, ORANGE, GREEN = "0.75", "tab:blue", "tab:orange", "tab:green"


class Cells:
    """An array ``[d, k]`` that pulses move: one operator call is one step of pulsed SGD on it."""

    def __init__(self, device: devices.Device, d: int, k: int, start: float | Tensor = 0.0, seed: int = 0) -> None:
        self.w = torch.zeros(d, k) + start
        self.hyper = LRTTConfig(rank=1, reinit_gain=1.0, visible_device=device).pack(k)
        self.state = torch.zeros(STATE_SIZE, dtype=torch.int64)
        self.state[KEY] = seed
        self.counts = torch.zeros(len(COUNTS), dtype=torch.int64)

    def update(self, x: Tensor, d: Tensor, lr: float) -> None:
        """``w -= lr dᵀ x`` by pulses; x ``[N, k]``, d ``[N, d]``."""
        rate = torch.tensor(lr, dtype=torch.float32)
        torch.ops.lrtt.pulsed_update_([self.w], [x], [d], [rate], [self.state], [self.counts], [self.hyper], [2], [0])
        self.state[STEP] += 1


def regression(config: LRTTConfig, count: int, lr: float) -> dict[str, Tensor]:
    """A linear layer that learns a random matrix: what its arrays do, before and after each step's transfer."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(12, 16, generator=generator) / 16**0.5
    layer = LRTTLinear(16, 12, bias=False, config=config, tile=0)
    layer.write_visible(torch.zeros(12, 16))
    optimizer = LRTT(layer.parameters(), lr=lr)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("C", "AB", "error", "c", "w")}

    def note(*_: object) -> None:
        product = layer.A.detach() @ layer.B.detach()
        c = layer.matrix.detach()
        rows["C"].append(c.norm())
        rows["AB"].append(product.norm())
        rows["error"].append((c + product - target).norm() / target.norm())
        rows["c"].append(c[0, 0].clone())
        rows["w"].append((c + product)[0, 0])

    optimizer.observer = lambda event, tiles: note() if event == "before_transfer" else None
    for _ in range(count):
        x = torch.randn(32, 16, generator=generator)
        optimizer.zero_grad()
        (layer(x) - x @ target.t()).square().mul(0.5).sum(1).mean().backward()
        optimizer.step()
        note()
    return {name: torch.stack(values) for name, values in rows.items()} | {"target": target[0, 0]}


def cycles() -> None:
    """A·B and C over some cycles: norms, and one weight."""
    every, count = 25, 200
    cell = devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0)
    runs = {
        "digital": LRTTConfig(rank=4, transfer_every=every),
        "pulsed": LRTTConfig(rank=4, transfer_every=every, fast_device=cell, visible_device=cell),
    }
    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    for (name, config), column in zip(runs.items(), axes.T, strict=True):
        run = regression(config, count, 0.05)
        time = torch.arange(2 * count) / 2
        norms, one = column
        norms.plot(time, run["C"], color=BLUE, label="‖C‖")
        norms.plot(time, run["AB"], color=ORANGE, label="‖A·B‖")
        norms.plot(time, run["error"], color="black", linewidth=1, label="‖W - target‖ / ‖target‖")
        norms.set_title(name, fontsize=9)
        norms.set_ylim(-0.2, 1.3 * float(run["C"].max()))
        norms.legend(fontsize=7, ncols=3, loc="upper center")
        one.axhline(run["target"], color=GREY)
        one.plot(time, run["w"], color="black", linewidth=1, label="one weight of W = C + A·B")
        one.plot(time, run["c"], color=BLUE, label="the same of C")
        one.legend(fontsize=7)
        one.set_xlabel("step (a transfer every 25)", fontsize=9)
        for axis in column:
            axis.tick_params(labelsize=8)
    save(figure, "algorithm_cycles.png", dpi=96)


def trains() -> None:
    """One sample's pulse trains, and where they meet."""
    x, d = torch.tensor([0.9, 0.5, -0.7, 0.15]), torch.tensor([0.8, -0.4, 0.25])
    lr, g, slots = 0.03, 0.001, 31
    kappa = float(lr * x.abs().max() * d.abs().max() / g)
    slots = min(slots, -int(-kappa // 1))
    scale = (lr / (g * slots)) ** 0.5
    balance = float(x.abs().max() / d.abs().max()) ** 0.5
    p_x, p_d = (x.abs() * scale / balance).clamp(max=1), (d.abs() * scale * balance).clamp(max=1)
    generator = torch.Generator().manual_seed(3)
    bit_x, bit_d = (torch.rand(slots, len(p), generator=generator) < p for p in (p_x, p_d))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(3, 1), layout="constrained")
    lines = [(f"x{j} = {float(v):g}", bit_x[:, j], BLUE) for j, v in enumerate(x)]
    lines += [(f"d{i} = {float(v):g}", bit_d[:, i], ORANGE) for i, v in enumerate(d)]
    both = bit_x[:, 1] & bit_d[:, 1]
    lines += [("x1 and d1", both, "black")]
    for height, (_, bits, colour) in enumerate(reversed(lines)):
        left.eventplot(
            bits.nonzero().flatten().tolist(), lineoffsets=height, linelengths=0.8, colors=colour, linewidths=3
        )
    left.set_yticks(range(len(lines)), [name for name, *_ in reversed(lines)], fontsize=8)
    left.set_xlabel(f"slot of {slots}", fontsize=9)
    left.tick_params(labelsize=8)
    counts = torch.einsum("si,sj->ij", bit_d.float(), bit_x.float())
    sign = -torch.sign(d)[:, None] * torch.sign(x)
    right.imshow(sign * counts, cmap="RdBu_r", vmin=-slots, vmax=slots)
    for i in range(len(d)):
        for j in range(len(x)):
            mean = -slots * float(p_x[j] * p_d[i]) * float(torch.sign(x[j] * d[i]))
            text = f"{int(sign[i, j] * counts[i, j])}\n({mean:.1f})"
            colour = "white" if abs(mean) > 0.6 * slots else "black"
            right.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    right.set_xticks(range(len(x)), [f"x{j}" for j in range(len(x))], fontsize=8)
    right.set_yticks(range(len(d)), [f"d{i}" for i in range(len(d))], fontsize=8)
    right.set_title("pulses (expected)", fontsize=9)
    save(figure, "algorithm_pulses.png", dpi=96)


def expectation() -> None:
    """Change of cells against what SGD would do, for light and for saturated trains."""
    device = devices.Ideal(dw_min=0.001, w_max=100.0, w_min=-100.0)
    x = torch.linspace(-1, 1, 41)[None]
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for axis, lr in zip(axes, (0.003, 0.02, 0.08), strict=True):
        repeats = 400
        w = torch.empty(repeats, 41)
        for seed in range(repeats):
            cells = Cells(device, 2, 41, seed=seed)
            cells.update(x, torch.tensor([[0.5, 1.0]]), lr)  # the second row sets the largest d
            w[seed] = cells.w[0]
        ideal = -lr * 0.5 * x[0]
        axis.fill_between(ideal, *(w.quantile(q, 0) for q in (0.1, 0.9)), color=GREY, label="80% of samples")
        axis.plot(ideal, ideal, color="black", linewidth=1, label="SGD")
        axis.plot(ideal, w.mean(0), color=BLUE, label="mean of pulses")
        axis.set_title(f"kappa {lr / 0.001:g}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("-lr d x", fontsize=9)
    axes[0].legend(fontsize=7)
    figure.supylabel("change of the cell", fontsize=9)
    save(figure, "algorithm_update.png", dpi=96)


def symmetry() -> None:
    """Asymmetric cells: steps, the drift under random pulses, and where noisy SGD on them ends."""
    device = devices.SoftBounds(
        dw_min=0.02,
        up_down=0.3,
        dw_min_dtod=0.0,
        up_down_dtod=0.0,
        w_max=1.0,
        w_min=-1.0,
        w_max_dtod=0.0,
        w_min_dtod=0.0,
    )
    points = torch.linspace(-0.95, 0.95, 39)
    up, down = (step.mean(1) for step in steps(device, points.tolist(), 100))
    centre = 0.3 / 1.7  # s_up (1 - w) = s_down (1 + w) with s_down = 0.7 s_up
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    axes[0].plot(points, up, color=BLUE, label="up")
    axes[0].plot(points, -down, color=ORANGE, label="down (size)")
    axes[0].set_title("size of a step", fontsize=9)
    generator = torch.Generator().manual_seed(0)
    for start in (-0.8, 0.0, 0.8):
        cells, trace = Cells(device, 256, 1, start), []
        for _ in range(400):
            sign = torch.randint(0, 2, (1, 256), generator=generator) * 2.0 - 1.0
            trace.append(cells.w.mean())
            cells.update(torch.ones(1, 1), sign, device.granularity)
        axes[1].plot(trace, color=BLUE)
    axes[1].set_title("as many pulses up as down", fontsize=9)
    axes[1].set_xlabel("pulse", fontsize=9)
    for noise, colour in ((0.1, BLUE), (0.5, GREEN), (2.0, ORANGE)):
        cells, trace = Cells(device, 256, 1), []
        for _ in range(400):
            trace.append(cells.w.mean())
            gradient = (cells.w.t() - 0.6) + noise * torch.randn(1, 256, generator=generator)
            cells.update(torch.ones(1, 1), gradient, 0.05)
        axes[2].plot(trace, color=colour, label=f"noise {noise:g}")
    axes[2].axhline(0.6, color="black", linewidth=1)
    axes[2].set_title("SGD to 0.6, noisy gradients", fontsize=9)
    axes[2].set_xlabel("step", fontsize=9)
    axes[0].set_xlabel("weight", fontsize=9)
    axes[0].axvline(centre, color=GREY)
    for axis in axes[1:]:
        axis.axhline(centre, color=GREY)
        axis.set_ylim(-1, 1)
    for axis in axes:
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=7)
    axes[2].legend(fontsize=7)
    save(figure, "algorithm_symmetry.png", dpi=96)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for draw in (cycles, trains, expectation, symmetry):
        draw()
