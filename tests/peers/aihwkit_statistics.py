"""Statistics of IBM's aihwkit that `tests/test_agreement.py` compares this package with.

Runs in an environment that has aihwkit, not this package, in about two minutes on one core:

    OMP_NUM_THREADS=1 python tests/peers/aihwkit_statistics.py tests/peers/aihwkit_statistics.json

Names of sections behind it (``made grid updates exact``) make those anew and leave the others as they are.

aihwkit 1.2.0 is a source distribution. On Debian, with libopenblas-dev installed:

    python -m venv aihw && export PATH=$PWD/aihw/bin:$PATH
    pip install torch==2.13.0 numpy scipy requests tqdm protobuf pydantic pybind11 scikit-build cmake ninja mypy
    pip install --no-build-isolation --no-deps aihwkit==1.2.0

Cells are drawn from ``construction_seed``. Pulses are not reproducible: a tile on the CPU seeds their generator from
the clock and Python cannot reach it. That generator picks its normals from a list of 32768, drawn once for each tile;
many tiles are used here so that the list's own mean and variance average out, and what is left is part of the standard
errors.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aihwkit
import numpy as np
import torch
from aihwkit.simulator.configs import SingleRPUConfig, UnitCellRPUConfig, UpdateParameters, devices
from aihwkit.simulator.configs.compounds import OneSidedUnitCell
from aihwkit.simulator.parameters.enums import PulseType
from aihwkit.simulator.presets import devices as presets
from aihwkit.simulator.tiles.analog import AnalogTile

# name -> (model, parameters); the model's class there is called <model>Device; of OneSided, parameters are those of the
# SoftBounds that make up the pairs. Bounds of soft models spread by 15% at
# most: at 30% a bound near 0 makes 1 / b_max, and with it the step, a quantity without a variance.
_TIGHT = {"w_max_dtod": 0.15, "w_min_dtod": 0.15}
# Models with a reference keep away from the bounds, to which aihwkit clips a weight that is set without the reference.
_WIDE = {"w_max": 1.0, "w_min": -1.0, "w_max_dtod": 0.1, "w_min_dtod": 0.1, "dw_min_dtod": 0.1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ("ConstantStep", {"dw_min": 0.01, "up_down": 0.1, "up_down_dtod": 0.05}),
    "constant_log_normal_corrupt": (
        "ConstantStep",
        {
            "dw_min": 0.01,
            "dw_min_dtod": 0.5,
            "dw_min_dtod_log_normal": True,
            "corrupt_devices_prob": 0.1,
            "corrupt_devices_range": 0.3,
        },
    ),
    "linear": ("LinearStep", {"dw_min": 0.01, "gamma_up": 0.3, "gamma_down": 0.5, "up_down": -0.2}),
    "linear_additive": (
        "LinearStep",
        {"dw_min": 0.01, "gamma_up": 0.3, "gamma_down": 0.5, "mult_noise": False, "mean_bound_reference": False}
        | _TIGHT,
    ),
    "soft_bounds": ("SoftBounds", {"dw_min": 0.01} | _TIGHT),
    "soft_bounds_additive": ("SoftBounds", {"dw_min": 0.01, "mult_noise": False, "dw_min_std": 1.0} | _TIGHT),
    "soft_bounds_pmax": ("SoftBoundsPmax", {"p_max": 300, "alpha": 0.005} | _TIGHT),
    "soft_bounds_reference": (
        "SoftBoundsReference",
        {
            "dw_min": 0.01,
            "dw_min_std": 1.0,
            "up_down_dtod": 0.05,
            "slope_up_dtod": 0.05,
            "slope_down_dtod": 0.03,
            "reference_mean": 0.05,
            "reference_std": 0.03,
            "subtract_symmetry_point": True,
        }
        | _WIDE,
    ),
    "soft_bounds_reference_mult": (
        "SoftBoundsReference",
        {"dw_min": 0.01, "mult_noise": True, "reference_mean": -0.1, "reference_std": 0.05} | _WIDE,
    ),
    "exp": ("ExpStep", {"dw_min": 0.01}),
    "exp_reram": (
        "ExpStep",
        {
            "dw_min": 0.00135,
            "up_down": 0.259359,
            "w_max": 1.0,
            "w_min": -1.0,
            "gamma_up": 5.0,
            "gamma_down": 5.0,
            "a": -0.5,
            "b": -0.5,
            "A_up": -1.18445,
            "A_down": -0.081404,
            "dw_min_dtod": 0.2,
            "up_down_dtod": 0.05,
            "dw_min_std": 5.0,
        },
    ),
    "pow": ("PowStep", {"dw_min": 0.01, "pow_gamma": 1.7, "pow_up_down": 0.2, "pow_up_down_dtod": 0.1}),
    "pow_reference": ("PowStepReference", {"dw_min": 0.01, "reference_mean": -0.1, "reference_std": 0.05} | _WIDE),
    "piecewise": (
        "PiecewiseStep",
        {"dw_min": 0.01, "piecewise_up": [1.0, 0.7, 0.4, 0.1], "piecewise_down": [0.1, 0.5, 1.2, 0.9]},
    ),
    "piecewise_one": ("PiecewiseStep", {"dw_min": 0.01, "piecewise_up": [0.5], "piecewise_down": [1.5]}),
    "soft_bounds_write_noise": ("SoftBounds", {"dw_min": 0.01, "write_noise_std": 3.0} | _TIGHT),
    "one_sided": ("OneSided", {"dw_min": 0.01} | _TIGHT),
}
PRESETS = {
    "capacitor": "Capacitor",
    "ecram": "EcRam",
    "ecram_mo": "EcRamMO",
    "idealized": "Idealized",
    "gokmen_vlasov": "GokmenVlasov",
    "reram_es": "ReRamES",
    "reram_sb": "ReRamSB",
    "reram_array_om": "ReRamArrayOM",
    "reram_array_hfo2": "ReRamArrayHfO2",
}
LEAKY = {
    "dw_min": 0.01,
    "lifetime": 20.0,
    "lifetime_dtod": 0.3,
    "reset": 0.1,
    "reset_dtod": 0.05,
    "diffusion": 0.01,
    "diffusion_dtod": 0.3,
}
RESET = {"dw_min": 0.01, "reset": 0.1, "reset_dtod": 0.05, "reset_std": 0.03}
RESET_PROBABILITY = 0.7

WEIGHTS = (-0.4, -0.2, 0.0, 0.2, 0.4)
TILES, SIDE = 16, 128  # 262144 pulses for each weight and direction
LIST = 32768  # normals in the list of a tile's generator
WEIGHT_QUANTILES, CELL_QUANTILES = 199, 19
X, D = (1.0, 0.5, 0.2, -0.7), (1.0, -0.5, 0.2)
KAPPAS = {"light": 3.2, "medium": 20.0, "saturated": 80.0}
# Other trains, by the names of UpdateParameters; managements are on unless said. Neither these operands nor the grids put
# a probability or a count on a half, where one ulp would decide about a pulse.
X_OTHER, D_OTHER = (1.0, 0.45, 0.2, -0.7), (1.0, -0.45, 0.2)
_UNFIXED = {"fixed_bl": False, "update_bl_management": False}
UPDATES: dict[str, dict[str, Any]] = {
    "stochastic": {"pulse_type": "Stochastic"},
    "long": {"desired_bl": 100},
    "grid": {"res": 1 / 7},
    "grid_random": {"res": 1 / 7, "sto_round": True},
    "early_cut": {"um_grad_scale": 0.3},
    "late_cut": {"um_grad_scale": 2.0, "update_bl_management": False},
    "unfixed": {**_UNFIXED, "update_management": False},
    "unfixed_um": _UNFIXED,
    "mean_count": {"pulse_type": "MeanCount"},
    "mean_count_no_ublm": {"pulse_type": "MeanCount", "update_bl_management": False},
    "mean_count_unfixed": {"pulse_type": "MeanCount", **_UNFIXED, "update_management": False},
    "mean_count_grid": {"pulse_type": "MeanCount", "res": 1 / 7},
    "mean_count_random": {"pulse_type": "MeanCount", "res": 1 / 7, "sto_round": True},
    "implicit": {"pulse_type": "DeterministicImplicit"},
    "implicit_no_um": {
        "pulse_type": "DeterministicImplicit",
        "update_management": False,
        "update_bl_management": False,
    },
    "implicit_grid": {"pulse_type": "DeterministicImplicit", "x_res_implicit": 1 / 7, "d_res_implicit": 1 / 6},
    "implicit_random": {
        "pulse_type": "DeterministicImplicit",
        "x_res_implicit": 1 / 7,
        "d_res_implicit": 1 / 6,
        "sto_round": True,
    },
}
# Floating point on a device: the operands' exact product, once inside the bounds and once beyond most of them.
EXACT_RATES = {"inside": 0.05, "beyond": 1.5}
TRAINS = 10_000


def make(name: str, quiet: bool = False, seed: int = 1) -> Any:
    """Device of a case or preset; ``quiet``: without any spread from device to device."""
    if name in PRESETS:
        device = getattr(presets, PRESETS[name] + "PresetDevice")(construction_seed=seed)
    else:
        kind, parameters = CASES[name]
        kind = "SoftBounds" if kind == "OneSided" else kind
        device = getattr(devices, kind + "Device")(construction_seed=seed, **parameters)
    if quiet:
        for field in dataclasses.fields(device):
            if field.name.endswith("_dtod") or field.name == "reference_std":
                setattr(device, field.name, 0.0)
    if name in CASES and CASES[name][0] == "OneSided":
        return OneSidedUnitCell(construction_seed=seed, unit_cell_devices=[device])
    return device


def tile(
    device: Any, rows: int, columns: int, bl: int = 1, um: bool = False, ublm: bool = False, **other: Any
) -> AnalogTile:
    """A tile; by default every update with |x| = |d| = 1 is one pulse: one slot, and lr = 1 makes p_x, p_d > 1."""
    parameters = {"desired_bl": bl, "fixed_bl": True, "update_management": um, "update_bl_management": ublm} | other
    parameters["pulse_type"] = PulseType(parameters.get("pulse_type", "StochasticCompressed"))
    config = UnitCellRPUConfig if isinstance(device, OneSidedUnitCell) else SingleRPUConfig
    analog = AnalogTile(rows, columns, config(device=device, update=UpdateParameters(**parameters)))
    analog.set_learning_rate(1.0)
    return analog


def weights(analog: AnalogTile) -> np.ndarray:
    """A copy of the tile's weights in float64; with write noise the persistent ones, on which pulses act."""
    if getattr(analog.rpu_config.device, "write_noise_std", 0.0) > 0:
        return analog.get_hidden_parameters()["persistent_weights"].numpy().astype(np.float64)
    return seen(analog)


def seen(analog: AnalogTile) -> np.ndarray:
    """A copy of what is read, in float64."""
    return analog.get_weights()[0].detach().numpy().astype(np.float64).copy()


def moments(values: np.ndarray, tiles: float = np.inf) -> list[float]:
    """Mean, variance and their standard errors.

    ``tiles`` lists of normals gave the noise; what they add is bounded by giving the whole variance to the noise.
    """
    n, variance = values.size, float(values.var())
    fourth = float(((values - values.mean()) ** 4).mean())
    listed = 1.0 / (LIST * tiles)
    return [
        float(values.mean()),
        variance,
        (variance * (1.0 / n + listed)) ** 0.5,
        ((fourth - variance**2) / n + 2.0 * variance**2 * listed) ** 0.5,
    ]


def quantiles(values: np.ndarray, count: int) -> list[float]:
    """``count`` quantiles at k / (count + 1)."""
    return np.quantile(values, np.arange(1, count + 1) / (count + 1)).tolist()


def steps(name: str, quiet: bool) -> dict[str, list[list[float]]]:
    """Change of the weight by one pulse, at each of `WEIGHTS`: moments, up and down."""
    change: dict[str, list[list[np.ndarray]]] = {"up": [[] for _ in WEIGHTS], "down": [[] for _ in WEIGHTS]}
    for seed in range(1, TILES + 1):
        analog = tile(make(name, quiet, seed), SIDE, SIDE)
        for direction, sign in (("up", 1.0), ("down", -1.0)):
            for i, w in enumerate(WEIGHTS):
                analog.set_weights(torch.full((SIDE, SIDE), w))  # clips to each cell's bounds
                before = weights(analog)
                analog.update(-torch.ones(1, SIDE), torch.full((1, SIDE), sign))
                change[direction][i].append(weights(analog) - before)
    return {key: [moments(np.stack(c), TILES) for c in value] for key, value in change.items()}


def walk(name: str, side: int = 256, pulses: int = 1000) -> list[float]:
    """Quantiles of a tile's weights after ``pulses`` pulses of random direction on every cell, from 0."""
    analog = tile(make(name), side, side)
    analog.set_weights(torch.zeros(side, side))
    sign = torch.Generator().manual_seed(1)
    x, d = (2.0 * torch.randint(0, 2, (pulses, side), generator=sign) - 1.0 for _ in range(2))
    analog.update(x, d)
    return quantiles(weights(analog), WEIGHT_QUANTILES)


def write_noise(name: str) -> dict[str, Any]:
    """What is read less the persistent weight: moments after setting weights, and after a pulse on every cell."""
    noise: dict[str, list[np.ndarray]] = {"set": [], "pulse": []}
    for seed in range(1, TILES + 1):
        analog = tile(make(name, seed=seed), SIDE, SIDE)
        analog.set_weights(torch.full((SIDE, SIDE), 0.1))
        noise["set"].append(seen(analog) - weights(analog))
        analog.update(-torch.ones(1, SIDE), torch.ones(1, SIDE))
        noise["pulse"].append(seen(analog) - weights(analog))
    return {key: moments(np.stack(value), TILES) for key, value in noise.items()}


def cells(name: str) -> dict[str, dict[str, Any]]:
    """Moments and quantiles of what is drawn for each cell."""
    drawn: dict[str, list[np.ndarray]] = {}
    for seed in range(1, TILES + 1):
        for key, value in tile(make(name, seed=seed), SIDE, SIDE).get_hidden_parameters().items():
            drawn.setdefault(key, []).append(value.numpy().astype(np.float64))
    keep = (
        "max_bound",
        "min_bound",
        "dwmin_up",
        "dwmin_down",
        "slope_up",
        "slope_down",
        "gamma_up",
        "gamma_down",
        "reference",
    )
    return {
        key: {"moments": moments(np.stack(drawn[key])), "quantiles": quantiles(np.stack(drawn[key]), CELL_QUANTILES)}
        for key in drawn
        if key.removesuffix("_0").removesuffix("_1") in keep  # of a pair, g- and g+
    }


def trains(kind: str, kappa: float, x: tuple[float, ...], d: tuple[float, ...], **update: Any) -> list[list[float]]:
    """Moments of the change of every cell, row after row, by one outer product of ``x`` and ``d`` from weight 0.

    ``kind``: ``pulses``, steps of exactly 1 that count pulses; ``soft``, noisy SoftBounds without spread.
    """
    quiet = {"dw_min_dtod": 0.0, "up_down_dtod": 0.0, "w_max_dtod": 0.0, "w_min_dtod": 0.0}
    if kind == "pulses":
        device, g = devices.ConstantStepDevice(dw_min=1.0, w_max=1e6, w_min=-1e6, dw_min_std=0.0, **quiet), 1.0
    else:
        device, g = devices.SoftBoundsDevice(dw_min=0.001, **quiet), 0.001
    change = []
    for _ in range(TILES):
        analog = tile(device, len(d), len(x), **{"bl": 31, **update})
        analog.set_learning_rate(kappa * g)
        x_row, d_row, zero = torch.tensor([x]), torch.tensor([d]), torch.zeros(len(d), len(x))
        for _ in range(TRAINS // TILES):
            analog.set_weights(zero)
            analog.update(x_row, d_row)
            change.append(weights(analog))
    stacked = np.stack(change).reshape(len(change), -1)
    return [moments(stacked[:, i], np.inf if kind == "pulses" else TILES) for i in range(stacked.shape[1])]


def spelled(update: dict[str, Any]) -> dict[str, Any]:
    """``update`` with the managements by the short names of `tile`."""
    short = {"update_management": "um", "update_bl_management": "ublm", "desired_bl": "bl"}
    return {short.get(key, key): value for key, value in update.items()}


def exact(rate: float) -> dict[str, Any]:
    """Weights of SoftBounds after one update in floating point that is clipped to the bounds, and those bounds."""
    device = devices.SoftBoundsDevice(construction_seed=1, w_max_dtod=0.1, w_min_dtod=0.1)
    analog = tile(device, len(D_OTHER), len(X_OTHER), pulse_type="NoneWithDevice")
    analog.set_weights(torch.zeros(len(D_OTHER), len(X_OTHER)))
    analog.set_learning_rate(rate)
    analog.update(torch.tensor([X_OTHER]), torch.tensor([D_OTHER]))
    drawn = analog.get_hidden_parameters()
    return {
        "rate": rate,
        "weights": weights(analog).flatten().tolist(),
        "max_bound": drawn["max_bound"].flatten().tolist(),
        "min_bound": drawn["min_bound"].flatten().tolist(),
    }


def relaxation() -> list[float]:
    """Quantiles of weights after five times decay and diffusion, from 0.3."""
    analog = tile(devices.LinearStepDevice(construction_seed=1, **LEAKY), 256, 256)
    analog.set_weights(torch.full((256, 256), 0.3))
    for _ in range(5):
        analog.decay_weights()
        analog.diffuse_weights()
    return quantiles(weights(analog), WEIGHT_QUANTILES)


def reset() -> list[float]:
    """Quantiles of weights after a reset with a probability, from 0.3."""
    analog = tile(devices.LinearStepDevice(construction_seed=1, **RESET), 256, 256)
    analog.set_weights(torch.full((256, 256), 0.3))
    analog.reset_columns(0, 256, RESET_PROBABILITY)
    return quantiles(weights(analog), WEIGHT_QUANTILES)


def defaults(device: Any) -> dict[str, Any]:
    """A device's own numbers by name."""
    return {
        f.name: getattr(device, f.name)
        for f in dataclasses.fields(device)
        if isinstance(getattr(device, f.name), (bool, int, float, list)) and f.name != "construction_seed"
    }


def made() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "by": "python tests/peers/aihwkit_statistics.py tests/peers/aihwkit_statistics.json",
        "aihwkit": aihwkit.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "construction_seed": f"1 to {TILES}; weights, relaxation and exact: 1",
        "pulse_seed": "the clock",
        "pulses": TILES * SIDE**2,
        "cells": 256**2,
        "trains": TRAINS // TILES * TILES,
    }


def grid() -> dict[str, Any]:
    """The operands of all statistics."""
    return {
        "weights": WEIGHTS,
        "x": X,
        "d": D,
        "kappas": KAPPAS,
        "leaky": LEAKY,
        "reset": RESET,
        "reset_probability": RESET_PROBABILITY,
        "x_other": X_OTHER,
        "d_other": D_OTHER,
    }


def all_defaults() -> dict[str, Any]:
    """Numbers of every model as it comes."""
    return {
        kind: defaults(OneSidedUnitCell() if kind == "OneSided" else getattr(devices, kind + "Device")())
        for kind in sorted({k for k, _ in CASES.values()})
    }


def update_defaults() -> dict[str, Any]:
    """UpdateParameters as they come."""
    update = UpdateParameters()
    return {f.name: getattr(update, f.name) for f in dataclasses.fields(update)} | {
        "pulse_type": update.pulse_type.value
    }


def all_trains() -> dict[str, Any]:
    """The common pulse train under its managements."""
    return {
        f"{kind}-{load}-{'um' if um else 'no_um'}-{'ublm' if ublm else 'no_ublm'}": {
            "kind": kind,
            "kappa": kappa,
            "um": um,
            "ublm": ublm,
            "moments": trains(kind, kappa, X, D, um=um, ublm=ublm),
        }
        for kind in ("pulses", "soft")
        for load, kappa in KAPPAS.items()
        # update_bl_management alone does not exist there: it turns update_management on
        for um, ublm in ((False, False), (True, False), (True, True))
    }


def all_updates() -> dict[str, Any]:
    """The other pulse trains."""
    noisy = ("mean_count", "implicit_random", "unfixed")
    return {
        f"{kind}-{name}-{load}": {
            "kind": kind,
            "kappa": kappa,
            "update": update,
            "moments": trains(kind, kappa, X_OTHER, D_OTHER, **{"um": True, "ublm": True, **spelled(update)}),
        }
        for name, update in UPDATES.items()
        for kind in (("pulses", "soft") if name in noisy else ("pulses",))
        for load, kappa in KAPPAS.items()
    }


def all_cases() -> dict[str, Any]:
    """Every device and preset."""
    result = {}
    for name in (*CASES, *PRESETS):
        sys.stderr.write(f"{name}\n")
        binding = make(name).as_bindings(SingleRPUConfig().runtime.data_type)
        result[name] = {
            "device": "preset" if name in PRESETS else CASES[name][0],
            "numbers": defaults(make(name)) if name in PRESETS else CASES[name][1],
            "granularity": binding.calc_weight_granularity(),
            "spread": steps(name, quiet=False),
            "quiet": steps(name, quiet=True),
            "cells": cells(name),
            "weights": walk(name),
        }
        if getattr(make(name), "write_noise_std", 0.0) > 0:
            result[name]["write_noise"] = write_noise(name)
    return result


SECTIONS: dict[str, Callable[[], Any]] = {
    "made": made,
    "grid": grid,
    "relaxation": relaxation,
    "reset": reset,
    "defaults": all_defaults,
    "update_defaults": update_defaults,
    "trains": all_trains,
    "updates": all_updates,
    "exact": lambda: {name: exact(rate) for name, rate in EXACT_RATES.items()},
    "cases": all_cases,
}


def table(old: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Everything; with ``names``, those sections anew and the others as in ``old``."""
    torch.set_num_threads(1)
    return {key: make_section() if key in names or not names else old[key] for key, make_section in SECTIONS.items()}


def compact(value: Any) -> Any:
    """Floats with seven digits: the standard errors stand in the fourth or fifth."""
    if isinstance(value, dict):
        return {key: compact(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [compact(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def lines(value: dict[str, Any], depth: int) -> str:
    """JSON with one line for each entry down to ``depth``, so that a new table is a readable difference."""
    pad = " " * (3 - depth)
    items = (
        f"{pad}{json.dumps(key)}: " + (lines(v, depth - 1) if depth and isinstance(v, dict) else json.dumps(v))
        for key, v in value.items()
    )
    return "{\n" + ",\n".join(items) + "\n" + pad[1:] + "}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    found = json.loads(path.read_text()) if sys.argv[2:] else {}
    path.write_text(lines(compact(table(found, sys.argv[2:])), 2) + "\n")
