"""Statistics of reads through aihwkit's converters, that `tests/test_io_agreement.py` compares this package's with.

Runs where aihwkit is (`aihwkit_statistics.py` says how to build it), not this package, in about a minute on one core:

    OMP_NUM_THREADS=1 python tests/peers/aihwkit_io.py tests/peers/aihwkit_io.json

Reads are not reproducible: a tile on the CPU seeds their generator from the clock. It picks its normals from a list of
32768, drawn once for each tile; many tiles are used, and what is left is part of the standard errors.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import aihwkit
import numpy as np
import torch
from aihwkit.simulator.configs import SingleRPUConfig, devices
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType, WeightNoiseType
from aihwkit.simulator.parameters.io import IOParameters
from aihwkit.simulator.tiles.analog import AnalogTile

# name -> fields of lightning_lrtt.IOConfig; those of aihwkit's IOParameters have the same names. There a resolution of
# 0 is -1, w_noise needs a type, and the enumerations are spelled in capitals.
QUIET = {"out_noise": 0.0, "bound_management": "none"}
OPEN = QUIET | {"inp_res": 0.0, "out_res": 0.0, "out_bound": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "quantised": {"inp_res": 1 / 14, "out_res": 1 / 62, "out_bound": 4.0} | QUIET,
    "output noise": OPEN | {"out_noise": 0.1},
    "input noise": OPEN | {"inp_noise": 0.1},
    "weight noise": OPEN | {"w_noise": 0.05},
    "all noise, converters": {
        "inp_noise": 0.1,
        "w_noise": 0.05,
        "out_noise": 0.1,
        "inp_res": 1 / 14,
        "out_res": 1 / 62,
    },
    "stochastic rounding": {"inp_sto_round": True, "out_sto_round": True, "inp_res": 1 / 14, "out_res": 1 / 62} | QUIET,
    "clipping": {"out_bound": 1.0, "bound_management": "none"},
    "no noise management": {"noise_management": "none", "bound_management": "none", "inp_bound": 1.5},
    "constant": {"noise_management": "constant", "nm_thres": 2.0},
    "threshold": {"nm_thres": 0.5},
    # 128 steps: with 126 the largest input, once halved, is a tie between 31 and 32, which float32 decides.
    "iterative": {"out_bound": 0.4, "out_noise": 0.02, "inp_res": 1 / 128},
    "iterative, quiet": {"out_bound": 0.4, "out_noise": 0.0, "inp_res": 1 / 128},
    "worst case": {"out_bound": 0.4, "out_noise": 0.02, "bound_management": "iterative_worst_case"},
    "worst case, tight": {"out_bound": 0.1, "out_noise": 0.01, "bound_management": "iterative_worst_case"},
    "iterative, exhausted": {"out_bound": 0.02, "out_noise": 0.002},
}
OUTPUTS, INPUTS = 6, 20
TILES, REPEATS = 16, 4096  # 65536 reads of each vector
LIST = 32768  # normals in the list of a tile's generator


def weights() -> torch.Tensor:
    """Fixed numbers within 0.6."""
    return (
        0.6 * torch.sin(1.7 * torch.arange(OUTPUTS * INPUTS, dtype=torch.float64) ** 1.3).view(OUTPUTS, INPUTS).float()
    )


def vectors(size: int) -> torch.Tensor:
    """A mixed vector, one of equal signs, one with a single large element, and zero: ``[4, size]``."""
    i = torch.arange(size, dtype=torch.float64)
    large = 0.1 * torch.cos(2.3 * i)
    large[3] = 3.0
    return torch.stack([torch.sin(1.1 * i + 0.3), 0.4 + 0.5 * torch.sin(i) ** 2, large, torch.zeros(size)]).float()


def parameters(case: dict[str, Any]) -> IOParameters:
    """aihwkit's parameters of a case."""
    changed: dict[str, Any] = {}
    for key, value in case.items():
        if key.endswith("_res"):
            changed[key] = value or -1.0
        elif key == "noise_management":
            changed[key] = NoiseManagementType[value.upper()]
        elif key == "bound_management":
            changed[key] = BoundManagementType[value.upper()]
        else:
            changed[key] = value
    if "w_noise" in case:
        changed["w_noise_type"] = WeightNoiseType.ADDITIVE_CONSTANT
    return IOParameters(**changed)


def moments(values: np.ndarray) -> list[float]:
    """Mean, variance and their standard errors; the lists of normals are bounded by giving them the whole variance."""
    n, variance = values.size, float(values.var())
    fourth = float(((values - values.mean()) ** 4).mean())
    listed = 1.0 / (LIST * TILES)
    return [
        float(values.mean()),
        variance,
        math.sqrt(variance * (1.0 / n + listed)),
        math.sqrt(max(fourth - variance**2, 0.0) / n + 2.0 * variance**2 * listed),
    ]


def reads(case: dict[str, Any]) -> dict[str, list[list[list[float]]]]:
    """Moments of every output, vector by vector, of forward and backward reads."""
    found: dict[str, list[np.ndarray]] = {"forward": [], "backward": []}
    io = parameters(case)
    for _ in range(TILES):
        config = SingleRPUConfig(device=devices.IdealDevice(), forward=io, backward=io)
        analog = AnalogTile(OUTPUTS, INPUTS, config)
        analog.set_weights(weights())
        for name, size, call in (("forward", INPUTS, analog.forward), ("backward", OUTPUTS, analog.backward)):
            rows = vectors(size).repeat_interleave(REPEATS, 0)
            y = call(rows).detach().numpy().astype(np.float64)
            found[name].append(y.reshape(4, REPEATS, -1))
    result = {}
    for name, parts in found.items():
        values = np.concatenate(parts, axis=1)
        result[name] = [[moments(values[v, :, j]) for j in range(values.shape[2])] for v in range(values.shape[0])]
    return result


def defaults() -> dict[str, Any]:
    """aihwkit's own defaults of the fields that we have, as we spell them."""
    io = IOParameters()
    names = {"NONE": "none", "ABS_MAX": "abs_max", "ITERATIVE": "iterative"}
    fields = (
        "is_perfect",
        "inp_bound",
        "inp_res",
        "inp_noise",
        "inp_sto_round",
        "out_bound",
        "out_res",
        "out_noise",
        "out_sto_round",
        "w_noise",
        "nm_thres",
        "max_bm_res",
    )
    enumerations = {key: names[getattr(io, key).name] for key in ("noise_management", "bound_management")}
    return {key: getattr(io, key) for key in fields} | enumerations


def table() -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(1)
    cases = {}
    for name, case in CASES.items():
        sys.stderr.write(f"{name}\n")
        cases[name] = {"io": case, **reads(case)}
    return {
        "made": {
            "by": "python tests/peers/aihwkit_io.py tests/peers/aihwkit_io.json",
            "aihwkit": aihwkit.__version__,
            "torch": torch.__version__,
            "seed": "the clock",
            "reads": TILES * REPEATS,
        },
        "defaults": defaults(),
        "weights": weights().tolist(),
        "vectors": {"forward": vectors(INPUTS).tolist(), "backward": vectors(OUTPUTS).tolist()},
        "cases": cases,
    }


def compact(value: Any) -> Any:
    """Moments with seven digits; inputs and resolutions whole."""
    if isinstance(value, dict):
        return {k: v if k in ("io", "weights", "vectors", "defaults") else compact(v) for k, v in value.items()}
    if isinstance(value, list):
        return [compact(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def lines(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry down to the vectors of a case."""
    if not isinstance(value, dict) or depth == 3:
        return json.dumps(value)
    pad = " " * (depth + 1)
    return (
        "{\n" + ",\n".join(f"{pad}{json.dumps(k)}: {lines(v, depth + 1)}" for k, v in value.items()) + f"\n{pad[1:]}}}"
    )


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:
        file.write(lines(compact(table())) + "\n")
