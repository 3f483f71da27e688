"""Draws docs/device_responses.png: ``python docs/device_responses.py`` (needs matplotlib).

For every model, 8 cells in grey and their mean in colour: 300 pulses up and 300 down, twice, from weight 0.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from lightning_lrtt import LRTTConfig, devices
from lightning_lrtt.ops import COUNTS, KEY, STATE_SIZE, STEP

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
}


def response(device: devices.Device) -> torch.Tensor:
    """Weights of `CELLS` cells after each pulse, ``[4 PULSES + 1, CELLS]``."""
    hyper = LRTTConfig(rank=1, reinit_gain=1.0, visible_device=device).pack(CELLS)
    w, traces = torch.zeros(1, CELLS), [torch.zeros(CELLS)]
    state = torch.zeros(STATE_SIZE, dtype=torch.int64)
    state[KEY] = 1
    for pulse in range(4 * PULSES):
        state[STEP] = pulse
        up = (pulse // PULSES) % 2 == 0
        counts = torch.zeros(len(COUNTS), dtype=torch.int64)
        # kappa = lr max|x| max|d| / granularity = 1: one slot that always fires, so one pulse
        torch.ops.lrtt.pulsed_update_(
            [w],
            [torch.ones(1, CELLS)],
            [torch.full((1, 1), -1.0 if up else 1.0)],
            [torch.tensor(device.granularity)],
            [state],
            [counts],
            [hyper],
            [2],
            [0],
        )
        traces.append(w[0].clone())
    return torch.stack(traces)


def main() -> None:
    """Draws all models."""
    figure, axes = plt.subplots(3, 3, figsize=(9, 6.5), sharex=True, sharey=True, layout="constrained")
    for (name, device), axis in zip(MODELS.items(), axes.flat, strict=True):
        traces = response(device)
        axis.plot(traces[:, :8], color="0.75", linewidth=0.5)
        axis.plot(traces.mean(1), color="tab:blue", linewidth=1.5)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_ylim(-1.1, 1.1)
    figure.supxlabel("pulse", fontsize=9)
    figure.supylabel("weight", fontsize=9)
    figure.savefig(Path(__file__).with_name("device_responses.png"), dpi=72, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
