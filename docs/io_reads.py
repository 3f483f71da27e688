"""Draws docs/io_reads.png: ``python docs/io_reads.py`` (needs matplotlib)."""

from __future__ import annotations

import matplotlib
import torch
from figures import save

from lightning_lrtt import IOConfig, LRTTConfig
from lightning_lrtt.nn import LRTTLinear

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INPUTS, SAMPLES = 128, 600
READS = {
    "4-bit inputs, 4-bit outputs, no noise": IOConfig(
        inp_bits=4, out_bits=4, out_noise=0.0, bound_management="none", out_bound=8.0
    ),
    "defaults, no bound management": IOConfig(bound_management="none"),
    "iterative": IOConfig(),
    "iterative_worst_case": IOConfig(bound_management="iterative_worst_case"),
}


def read(io: IOConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact and read outputs of one output line, for inputs in [-1, 1] from mixed to all of one sign."""
    layer = LRTTLinear(INPUTS, 1, bias=False, config=LRTTConfig(rank=1, io=io, reinit_gain=0.01), tile=0)
    generator = torch.Generator().manual_seed(0)
    layer.write_visible(0.6 * torch.rand(1, INPUTS, generator=generator))
    signs = torch.rand(SAMPLES, INPUTS, generator=generator) < torch.linspace(0, 1, SAMPLES)[:, None]
    x = torch.rand(SAMPLES, INPUTS, generator=generator) * torch.where(signs, 1.0, -1.0)
    with torch.no_grad():
        return (x @ layer.matrix.t()).flatten(), layer(x).flatten()


def main() -> None:
    """Draws all reads."""
    figure, axes = plt.subplots(1, len(READS), figsize=(10, 2.9), sharex=True, sharey=True, layout="constrained")
    for (name, io), axis in zip(READS.items(), axes, strict=True):
        exact, y = read(io)
        axis.plot([-22, 22], [-22, 22], color="0.75", linewidth=0.8)
        axis.plot(exact, y, ".", color="tab:blue", markersize=2)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=8)
    figure.supxlabel("exact output", fontsize=9)
    figure.supylabel("output read", fontsize=9)
    save(figure, "io_reads.png", dpi=72)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
