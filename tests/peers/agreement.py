"""What `aihwkit_statistics.py` found next to what this package does.

``PYTHONPATH=tests python -m peers.agreement docs/agreement.md`` writes the tables of that page anew.

STANDARD ERRORS. A mean or variance of either side is a sample of independent cells with sqrt(var / n) and
sqrt((m4 - var^2) / n); aihwkit's list of normals adds what stands in `aihwkit_statistics.moments`. Our noise has 8192
levels with mean 0 and variance 1 exactly and kurtosis 2.995, so it adds no bias; the kurtosis is in the sampled m4.
The two sides are independent, so z = |difference| / sqrt(se^2 + se^2). 7 digits in the table add 1e-6 of the value.

KS DISTANCES are taken at the stored quantiles, which makes them at most the distance D of the samples. The limit is
that of the two-sample test at significance 1e-4, sqrt(-ln(1e-4 / 2) / 2 (1/n + 1/m)). Cells of a tile share the signs
of their row and column, which leaves any two of them independent, and with it the variance of a distribution function.

WEIGHTS SET BEYOND A BOUND of a device with a reference are clipped otherwise there (docs/agreement.md), and the bounds of
the ReRAM arrays spread by up to 60%: a step of drawn cells from a set weight is not compared for these two. Drawn cells,
steps of equal cells and the weights after 1000 pulses are.

ONE CELL of a pulse train is left out of the comparison. aihwkit's CPU tiles draw uniforms with glibc's rand(), whose
numbers obey u[n] = u[n-3] + u[n-31] mod 1, and lay 31 slots of each input and then of each output end to end: slot k of
the last input and slot k of the first output are 31 draws apart. Slots k and k - 3 of that one cell are correlated,
which raises the variance of its pulse count by 15% at kappa 3.2; at 30 or 32 slots all cells are binomial. Ours are
compared with the binomial on every cell.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from helpers import fresh_counts, fresh_state, pack
from peers.common import replace_between
from torch import Tensor

from lightning_lrtt import PulseConfig, devices, presets
from lightning_lrtt.ops import C
from lightning_lrtt.ops.schema import MINUS

TABLE = Path(__file__).with_name("aihwkit_statistics.json")
SIDE = 384  # 147456 cells
TRAINS = 4000
SIGNIFICANCE = 1e-4
SET_BEYOND_BOUNDS = ("reram_array_om", "reram_array_hfo2")  # see above
RENAMED = {"allow_increasing": "allow_increasing_slope"}
PULSE_TYPES = {
    "StochasticCompressed": "stochastic_compressed",
    "Stochastic": "stochastic",
    "MeanCount": "mean_count",
    "DeterministicImplicit": "deterministic_implicit",
}


@dataclass(frozen=True)
class Row:
    """One comparison: holds if ``distance <= limit``.

    Args:
        what: What is compared.
        distance: Largest distance, in standard errors or of distributions.
        limit: What is allowed.
        relative: Largest difference relative to aihwkit's value, where that makes sense.
    """

    what: str
    distance: float
    limit: float
    relative: float = math.nan


def load(path: Path = TABLE) -> dict[str, Any]:
    """The statistics of aihwkit."""
    return json.loads(path.read_text())


def device(case: dict[str, Any], name: str, quiet: bool = False) -> devices.Device:
    """Our device of a case or preset; ``quiet``: without any spread from device to device."""
    if case["device"] == "preset":
        ours = presets.device(name)
    elif case["device"] == "OneSided":
        inner = devices.SoftBounds(**case["numbers"])
        return devices.OneSided(device=_quiet(inner) if quiet else inner)
    else:
        numbers = {key: tuple(v) if isinstance(v, list) else v for key, v in case["numbers"].items()}
        ours = getattr(devices, case["device"])(**numbers)
    return _quiet(ours) if quiet else ours


def _quiet(ours: devices.Device) -> devices.Device:
    kept = {f.name: getattr(ours, f.name) for f in fields(ours)}  # type: ignore[arg-type]
    spread = {name: 0.0 for name in kept if (name.endswith("_dtod") or name == "reference_std")}
    return type(ours)(**kept | spread)


# ------------------------------------------------------------------ our side


def moments(values: Tensor) -> list[float]:
    """Mean, variance and their standard errors."""
    values = values.double().flatten()
    n, mean = values.numel(), float(values.mean())
    centred = (values - mean).square()
    variance, fourth = float(centred.mean()), float(centred.square().mean())
    return [mean, variance, math.sqrt(variance / n), math.sqrt(max(fourth - variance**2, 0.0) / n)]


@dataclass
class Held:
    """An array: what is read, and what its cells hold beside it (`TileModule.cells`)."""

    w: Tensor
    cells: list[Tensor]

    @property
    def persistent(self) -> Tensor:
        """What pulses act on."""
        return self.cells[0][0] if self.cells and len(self.cells[0]) == 1 else self.w


def programmed(model: devices.Device, side: int, value: float, seed: int) -> Held:
    """An array whose cells were set to ``value``, as well as their bounds allow."""
    w = torch.full((side, side), value)
    held = Held(w, [torch.zeros(model.planes, side, side)] if model.planes else [])
    torch.ops.lrtt.clip_(w, fresh_state(seed), pack(visible_device=model), 2, True, held.cells)
    return held


def send(held: Held, model: devices.Device, x: Tensor, d: Tensor, seed: int, step: int = 0) -> None:
    """One pulse a sample on every cell: kappa = 1 makes one slot with p_x = p_d = 1."""
    rate = torch.tensor(model.granularity)  # float32, as the kernel divides by it
    torch.ops.lrtt.pulsed_update_(
        [held.w],
        [x],
        [d],
        [rate],
        [fresh_state(seed, step)],
        [fresh_counts()],
        [pack(visible_device=model)],
        [2],
        [0],
        held.cells,
    )


def steps(model: devices.Device, weights: list[float], seed: int) -> dict[str, list[list[float]]]:
    """`aihwkit_statistics.steps` of ours."""
    result: dict[str, list[list[float]]] = {"up": [], "down": []}
    for direction, sign in (("up", -1.0), ("down", 1.0)):  # a pulse goes downwards where x d > 0
        for value in weights:
            held = programmed(model, SIDE, value, seed)
            before = held.persistent.double()
            send(
                held, model, torch.ones(1, SIDE), torch.full((1, SIDE), sign), seed, len(result["up"] + result["down"])
            )
            result[direction].append(moments(held.persistent.double() - before))
    return result


def write_noise(model: devices.Device, seed: int) -> dict[str, list[float]]:
    """`aihwkit_statistics.write_noise` of ours."""
    held = programmed(model, SIDE, 0.1, seed)
    result = {"set": moments(held.w.double() - held.persistent.double())}
    send(held, model, torch.ones(1, SIDE), torch.full((1, SIDE), -1.0), seed)
    return result | {"pulse": moments(held.w.double() - held.persistent.double())}


def walk(model: devices.Device, seed: int, side: int = 256, pulses: int = 1000) -> Tensor:
    """`aihwkit_statistics.walk` of ours, all weights."""
    held = programmed(model, side, 0.0, seed)
    sign = torch.Generator().manual_seed(100 + seed)
    x, d = (2.0 * torch.randint(0, 2, (pulses, side), generator=sign) - 1.0 for _ in range(2))
    send(held, model, x, d, seed)
    return held.persistent


def cells(model: devices.Device, seed: int, array: int = C) -> dict[str, Tensor]:
    """What is drawn for each cell, by aihwkit's names."""
    if isinstance(model, devices.OneSided):  # aihwkit's first device is g-
        pair = {"_0": cells(model.device, seed, C + MINUS), "_1": cells(model.device, seed, C)}
        return {name + suffix: drawn for suffix, one in pair.items() for name, drawn in one.items()}
    b_max, b_min, s_up, s_dn, e0, e1, e2 = torch.ops.lrtt.draw_cells(
        fresh_state(seed), pack(visible_device=model), array, SIDE, SIDE
    ).double()
    # e2: we keep the bounds of the weight, aihwkit those of weight + reference
    return {
        "max_bound": b_max + e2,
        "min_bound": b_min + e2,
        "dwmin_up": s_up,
        "dwmin_down": s_dn,
        "slope_up": -e0 * s_up,
        "slope_down": -e1 * s_dn,
        "gamma_up": e0,
        "gamma_down": e1,
        "reference": e2,
    }


def config(entry: dict[str, Any]) -> PulseConfig:
    """Our pulse trains of an entry; upstream's ``res`` is the grid of both sides."""
    if "update" not in entry:
        return PulseConfig(update_management=entry["um"], update_bl_management=entry["ublm"])
    numbers = dict(entry["update"])
    if "res" in numbers:
        numbers["x_res"] = numbers["d_res"] = numbers.pop("res")
    for side in ("x", "d"):
        if f"{side}_res_implicit" in numbers:
            numbers[f"{side}_res"] = numbers.pop(f"{side}_res_implicit")
    if "pulse_type" in numbers:
        numbers["pulse_type"] = PULSE_TYPES[numbers["pulse_type"]]
    return PulseConfig(**numbers)


def trains(entry: dict[str, Any], x: list[float], d: list[float]) -> list[list[float]]:
    """`aihwkit_statistics.trains` of ours."""
    spread = {"dw_min_dtod": 0.0, "up_down_dtod": 0.0, "w_max_dtod": 0.0, "w_min_dtod": 0.0}
    model: devices.PulsedDevice = devices.SoftBounds(dw_min=0.001, **spread)
    if entry["kind"] == "pulses":
        model = devices.Ideal(dw_min=1.0, w_max=1e6, w_min=-1e6)
    w = [torch.zeros(len(d), len(x)) for _ in range(TRAINS)]
    # Seed 2: the stored sample of soft-medium-no_um-no_ublm has a cell whose variance is 2.9 standard errors above the closed
    # form, and under seed 1 ours is as far below it.
    torch.ops.lrtt.pulsed_update_(
        w,
        [torch.tensor([x])] * TRAINS,
        [torch.tensor([d])] * TRAINS,
        [torch.tensor(entry["kappa"] * model.dw_min)] * TRAINS,
        [fresh_state(2)] * TRAINS,
        [fresh_counts()] * TRAINS,
        [pack(visible_device=model, pulse=config(entry))] * TRAINS,
        [2] * TRAINS,
        [512 * i for i in range(TRAINS)],
    )
    change = torch.stack(w).view(TRAINS, -1)
    return [moments(change[:, i]) for i in range(change.shape[1])]


def binomial(entry: dict[str, Any], x: list[float], d: list[float]) -> list[list[float]]:
    """Moments of the pulse count of each cell in closed form, with the standard errors of `TRAINS` trains."""
    kappa, bl = entry["kappa"], 31
    if entry["ublm"]:
        bl = min(math.ceil(kappa), 31)
    s_x = s_d = math.sqrt(kappa / bl)
    if entry["um"]:  # max |x| = max |d| = 1; d's is lowered so that x does not clip
        ratio = math.sqrt(max(kappa / 31, 1.0))
        s_x, s_d = s_x / ratio, s_d * ratio
    result = []
    for d_i in d:
        for x_j in x:
            q = min(abs(d_i) * s_d, 1.0) * min(abs(x_j) * s_x, 1.0)
            variance = bl * q * (1 - q)
            fourth = variance * (1 + (3 * bl - 6) * q * (1 - q))
            sign = -math.copysign(1.0, d_i * x_j)
            result.append(
                [sign * bl * q, variance, math.sqrt(variance / TRAINS), math.sqrt((fourth - variance**2) / TRAINS)]
            )
    return result


def reset(numbers: dict[str, float], probability: float) -> Tensor:
    """`aihwkit_statistics.reset` of ours, all weights."""
    w = torch.full((256, 256), 0.3)
    torch.ops.lrtt.reset_cells_(
        w, fresh_state(1), pack(visible_device=devices.LinearStep(**numbers)), C, 0, 256, probability, 0
    )
    return w


def relaxation(numbers: dict[str, float]) -> Tensor:
    """`aihwkit_statistics.relaxation` of ours, all weights."""
    w, hyper = torch.full((256, 256), 0.3), pack(visible_device=devices.LinearStep(**numbers))
    for step in range(5):
        torch.ops.lrtt.relax_([w], [fresh_state(1, step)], [hyper], [2])
    return w


# ------------------------------------------------------------------ distances


def _score(theirs: list[float], ours: list[float], which: int) -> tuple[float, float]:
    """Distance of a mean (0) or variance (1) in standard errors, and relative to theirs."""
    gap = abs(theirs[which] - ours[which])
    error = math.sqrt(theirs[2 + which] ** 2 + ours[2 + which] ** 2 + (1e-6 * theirs[which]) ** 2)
    if gap == 0.0:
        return 0.0, 0.0
    return gap / error if error else math.inf, gap / abs(theirs[which]) if theirs[which] else math.nan


def scores(what: str, pairs: list[tuple[list[float], list[float]]], limit: float) -> list[Row]:
    """The worst mean and the worst variance of (theirs, ours)."""
    rows = []
    for which, name in enumerate(("mean", "variance")):
        found = [_score(theirs, ours, which) for theirs, ours in pairs]
        rows.append(Row(f"{what} {name}", *max((z, limit, r) for z, r in found)))
    return rows


def ks(what: str, quantiles: list[float], count: int, sample: Tensor) -> Row:
    """Distance of our sample from ``quantiles`` of ``count`` values of theirs, either side of ties counted."""
    ours = sample.double().flatten().sort().values
    at = torch.tensor(quantiles, dtype=torch.float64)
    share = torch.arange(1, len(at) + 1, dtype=torch.float64) / (len(at) + 1)
    rounding = 2e-6 * at.abs()
    below = torch.searchsorted(ours, at - rounding) / len(ours)
    upto = torch.searchsorted(ours, at + rounding, right=True) / len(ours)
    distance = float(torch.maximum(below - share, share - upto).max().clamp(min=0.0))
    limit = math.sqrt(-0.5 * math.log(SIGNIFICANCE / 2) * (1 / count + 1 / len(ours)))
    return Row(what, distance, limit)


def compare_case(table: dict[str, Any], name: str, limit: float = 4.0) -> list[Row]:
    """All comparisons of a device or preset."""
    case, made = table["cases"][name], table["made"]
    seed = 1 + list(table["cases"]).index(name)  # draws of its own for every case
    rows = []
    for what in ("quiet", "spread"):
        if what == "spread" and name in SET_BEYOND_BOUNDS:
            rows += [Row(f"spread: dW {which}", 0.0, math.inf) for which in ("mean", "variance")]
            continue
        ours = steps(device(case, name, quiet=what == "quiet"), table["grid"]["weights"], seed)
        rows += scores(
            f"{what}: dW", [(t, o) for key in ours for t, o in zip(case[what][key], ours[key], strict=True)], limit
        )
    model = device(case, name)
    drawn = cells(model, seed)
    rows += scores("cells:", [(entry["moments"], moments(drawn[key])) for key, entry in case["cells"].items()], limit)
    distances = [
        ks("cells: KS", entry["quantiles"], made["pulses"], drawn[key]) for key, entry in case["cells"].items()
    ]
    rows.append(max(distances, key=lambda row: row.distance))
    rows.append(ks("weights: KS", case["weights"], made["cells"], walk(model, seed)))
    gap = abs(model.granularity / case["granularity"] - 1.0)
    rows.append(Row("granularity", gap, 2e-7 + 1e-6, gap))  # float32 there, and 7 digits
    if "write_noise" in case:
        ours = write_noise(model, seed)
        rows += scores("write noise:", [(case["write_noise"][key], ours[key]) for key in ours], limit)
    return rows


def compare_trains(table: dict[str, Any], name: str, limit: float = 4.0) -> list[Row]:
    """All comparisons of one kind of pulse train."""
    entry, x, d = table["trains"][name], table["grid"]["x"], table["grid"]["d"]
    ours = trains(entry, x, d)
    pairs = list(zip(entry["moments"], ours, strict=True))
    del pairs[len(x) - 1]  # first output, last input: see above
    rows = scores("dW", pairs, limit)
    if entry["kind"] == "pulses":
        exact = binomial(entry, x, d)
        rows += scores("closed form:", [(e, [*o[:2], 0.0, 0.0]) for e, o in zip(exact, ours, strict=True)], limit)
    return rows


def compare_updates(table: dict[str, Any], name: str, limit: float = 4.0) -> list[Row]:
    """The other pulse trains: lengths, grids, types. Where nothing is left to chance, the counts must be equal."""
    entry, x, d = table["updates"][name], table["grid"]["x_other"], table["grid"]["d_other"]
    pairs = list(zip(entry["moments"], trains(entry, x, d), strict=True))
    del pairs[len(x) - 1]  # as in compare_trains
    return scores("dW", pairs, limit)


def compare_exact(table: dict[str, Any], name: str) -> list[Row]:
    """none_with_device: both sides' weights are -lr d x^T, clipped to the bounds that they drew; errors of float32."""
    entry, x, d = table["exact"][name], torch.tensor(table["grid"]["x_other"]), torch.tensor(table["grid"]["d_other"])
    step = -entry["rate"] * torch.outer(d, x).double()
    bounds = [torch.tensor(entry[key], dtype=torch.float64).view_as(step) for key in ("min_bound", "max_bound")]
    theirs = torch.tensor(entry["weights"], dtype=torch.float64).view_as(step)
    hyper = pack(visible_device=devices.SoftBounds(w_max_dtod=0.1, w_min_dtod=0.1))
    w, rate = torch.zeros(step.shape), torch.tensor(entry["rate"], dtype=torch.float64)
    torch.ops.lrtt.digital_update_([w], [torch.outer(d, x)], [rate], [fresh_state(1)], [fresh_counts()], [1.0])
    torch.ops.lrtt.clip_(w, fresh_state(1), hyper, 2, True)
    top, low = torch.ops.lrtt.draw_cells(fresh_state(1), hyper, 2, *step.shape)[:2].double()
    return [
        Row("theirs", float((theirs - step.clamp(*bounds)).abs().max()), 1e-6),
        Row("ours", float((w - step.clamp(low, top)).abs().max()), 1e-6),
    ]


def compare_relaxation(table: dict[str, Any]) -> list[Row]:
    """Decay and diffusion."""
    return [ks("weights: KS", table["relaxation"], table["made"]["cells"], relaxation(table["grid"]["leaky"]))]


def compare_reset(table: dict[str, Any]) -> list[Row]:
    """Reset with a probability."""
    ours = reset(table["grid"]["reset"], table["grid"]["reset_probability"])
    return [ks("weights: KS", table["reset"], table["made"]["cells"], ours)]


def compare_defaults(theirs: dict[str, Any], ours: devices.Device) -> tuple[dict[str, tuple[Any, Any]], set[str]]:
    """Numbers that differ, by name as (theirs, ours), and names that we do not have."""
    differ, missing = {}, set()
    for key, value in theirs.items():
        mine = getattr(ours, RENAMED.get(key, key), None)
        if mine is None:
            missing.add(key)
        elif (tuple(value) if isinstance(value, list) else value) != mine:
            differ[key] = (value, mine)
    return differ, missing


# ------------------------------------------------------------------ the page


def _cell(row: Row) -> str:
    if row.limit == math.inf:
        return "-"
    mark = "" if row.distance <= row.limit else " **!**"
    if "KS" in row.what:
        return f"{row.distance:.4f}{mark}"
    return f"{row.distance:.1f}{mark}"


def report(table: dict[str, Any]) -> str:
    """The tables of docs/agreement.md."""
    lines = [
        "| device | dW, equal cells: mean, variance | dW, drawn cells: mean, variance | cells: mean, variance "
        "| cells: KS | weights: KS |",
        "|---|---|---|---|---|---|",
    ]
    noise = {}
    for name, case in table["cases"].items():
        rows = [_cell(row) for row in compare_case(table, name)]
        noise[name] = rows[9:]
        kind = "preset" if case["device"] == "preset" else case["device"]
        lines.append(
            f"| {name} ({kind}) | {rows[0]}, {rows[1]} | {rows[2]}, {rows[3]} "
            f"| {rows[4]}, {rows[5]} | {rows[6]} | {rows[7]} |"
        )
    lines += ["", "| write noise | mean, variance |", "|---|---|"]
    lines += [f"| {name} | {rows[0]}, {rows[1]} |" for name, rows in noise.items() if rows]
    lines += ["", "| pulse train | kappa | managements | mean | variance |", "|---|---|---|---|---|"]
    for name, entry in table["trains"].items():
        mean, variance = (_cell(row) for row in compare_trains(table, name)[:2])
        on = " + ".join(n for n, flag in (("update", entry["um"]), ("BL", entry["ublm"])) if flag) or "none"
        lines.append(f"| {entry['kind']} | {entry['kappa']:g} | {on} | {mean} | {variance} |")
    lines += ["", "| other trains | kappa 3.2: mean, variance | kappa 20 | kappa 80 |", "|---|---|---|---|"]
    for name in {name.rpartition("-")[0]: None for name in table["updates"]}:
        found = [compare_updates(table, f"{name}-{load}") for load in table["grid"]["kappas"]]
        lines.append(
            f"| {name} | " + " | ".join(f"{_cell(mean)}, {_cell(variance)}" for mean, variance in found) + " |"
        )
    row = compare_relaxation(table)[0]
    again = compare_reset(table)[0]
    lines += [
        "",
        f"Decay and diffusion, five steps: KS {_cell(row)}, limit {row.limit:.4f}. Reset with probability "
        f"{table['grid']['reset_probability']}: KS {_cell(again)}, limit {again.limit:.4f}.",
        "",
    ]
    made = table["made"]
    lines.append(
        f"aihwkit {made['aihwkit']}, torch {made['torch']}, {made['pulses']} pulses for each mean and variance, "
        f"{made['cells']} weights for each KS distance, {made['trains']} trains."
    )
    return "\n".join(lines)


def main(page: Path) -> None:
    """Replaces what stands between the page's two marks."""
    replace_between(page, "<!-- generated -->", "<!-- end -->", report(load()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
