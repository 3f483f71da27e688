"""Draws docs/device_responses.png: ``python docs/device_responses.py`` (needs matplotlib).

For every model, 8 cells in grey and the mean of 400 in colour: 300 pulses up and 300 down, twice, from weight 0.
The ReRAM presets, with write noise and more states, stand below: 1200 up and 1200 down (of the coarse arrays 60 and 60).
"""

from __future__ import annotations

import matplotlib
import torch
from figures import save

from lightning_lrtt import devices, presets
from lightning_lrtt.device_plots import response

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PULSES, CELLS = 300, 400
MODELS: dict[str, devices.Device] = {
    "ConstantStep": devices.ConstantStep(dw_min=0.004),
    "LinearStep, gamma 0.5": devices.LinearStep(dw_min=0.005, gamma_up=0.5, gamma_down=0.5),
    "SoftBounds": devices.SoftBounds(dw_min=0.01),
    "SoftBoundsPmax": devices.SoftBoundsPmax(p_max=300, alpha=0.01, range_min=-0.6, range_max=0.6),
    "SoftBoundsReference": devices.SoftBoundsReference(
        dw_min=0.01, up_down_dtod=0.1, subtract_symmetry_point=True, reference_std=0.05
    ),
    "ExpStep": devices.ExpStep(dw_min=0.01),
    "PowStep, pow_gamma 2": devices.PowStep(dw_min=0.02, pow_gamma=2.0),
    "PowStepReference": devices.PowStepReference(dw_min=0.02, reference_mean=0.2, reference_std=0.05),
    "PiecewiseStep": devices.PiecewiseStep(
        dw_min=0.01, piecewise_up=(1.0, 1.0, 0.2, 0.0), piecewise_down=(0.0, 0.2, 1.0, 1.0)
    ),
    "OneSided, of SoftBounds": devices.OneSided(device=devices.SoftBounds(dw_min=0.01)),
    "reram_es": presets.device("reram_es"),
    "reram_sb": presets.device("reram_sb"),
    "reram_array_om": presets.device("reram_array_om"),
    "reram_array_hfo2": presets.device("reram_array_hfo2"),
}
LENGTHS = {"reram_es": 1200, "reram_sb": 1200, "reram_array_om": 60, "reram_array_hfo2": 60}


def main() -> None:
    """Draws all models."""
    figure, axes = plt.subplots(5, 3, figsize=(9, 10.5), sharey=True, layout="constrained")
    axes.flat[-1].axis("off")
    for (name, device), axis in zip(MODELS.items(), axes.flat, strict=False):
        pulses = LENGTHS.get(name, PULSES)
        traces = response(device, pulses, CELLS, cycles=2, start=0.0, every=-(-pulses // PULSES))
        number = torch.linspace(0, 4 * pulses, len(traces))
        axis.plot(number, traces[:, :8], color="0.75", linewidth=0.5)
        axis.plot(number, traces.mean(1), color="tab:blue", linewidth=1.5)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_ylim(-1.3, 1.3)
    figure.supxlabel("pulse", fontsize=9)
    figure.supylabel("weight", fontsize=9)
    save(figure, "device_responses.png", dpi=64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
