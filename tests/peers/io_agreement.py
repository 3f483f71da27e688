"""What `aihwkit_io.py` found next to what reads through this package's converters do.

``PYTHONPATH=tests python -m peers.io_agreement docs/agreement.md`` writes the table of that page anew.

STANDARD ERRORS are those of `agreement.py`: z = |difference| / sqrt(se^2 + se^2) of the means and variances of every
output of every vector. To both are added float32 roundings, 2e-6 of the largest mean and its square: reads without
noise agree to that, not exactly, since the two sides divide and multiply in another order.

THE ZERO VECTOR of cases with input noise is left out: aihwkit reads it then, here a zero input gives a zero output.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from peers.agreement import Row, moments
from peers.common import replace_between

from lightning_lrtt import IOConfig, LRTTConfig
from lightning_lrtt.nn.analog import _Reader
from lightning_lrtt.nn.linear import LRTTLinear
from lightning_lrtt.ops import C

TABLE = Path(__file__).with_name("aihwkit_io.json")
REPEATS = 32768
ROUNDING = 2e-6


def load(path: Path = TABLE) -> dict[str, Any]:
    """The statistics of aihwkit."""
    return json.loads(path.read_text())


def reads(table: dict[str, Any], case: dict[str, Any], direction: str, seed: int) -> list[list[list[float]]]:
    """Moments of every output, vector by vector, of C alone, read as the layers read it."""
    w = torch.tensor(table["weights"])
    d, k = w.shape
    tile = LRTTLinear(k, d, bias=False, config=LRTTConfig(rank=1, io=IOConfig(**case["io"]), seed=seed), tile=0)
    tile.write_visible(w)
    found = []
    for vector in table["vectors"][direction]:
        reader = _Reader(tile, direction == "backward", False, torch.float32)
        rows = torch.tensor(vector).expand(REPEATS, -1)
        y = reader.read(rows, w if direction == "forward" else w.t(), C, 0)
        found.append([moments(column) for column in y.unbind(1)])
    return found


def _distance(theirs: list[float], ours: list[float], which: int, size: float) -> float:
    rounding = ROUNDING * size ** (1 + which)
    return abs(theirs[which] - ours[which]) / math.sqrt(theirs[2 + which] ** 2 + ours[2 + which] ** 2 + rounding**2)


def compare(table: dict[str, Any], name: str, limit: float = 4.0) -> list[Row]:
    """The worst mean and the worst variance of a case, forward and backward."""
    case, rows = table["cases"][name], []
    for direction in ("forward", "backward"):
        ours = reads(table, case, direction, 1 + list(table["cases"]).index(name))
        skipped = 3 if case["io"].get("inp_noise") else 4
        pairs = [
            (t, o, max(abs(m[0]) for m in theirs) + 1e-30)
            for theirs, mine in list(zip(case[direction], ours, strict=True))[:skipped]
            for t, o in zip(theirs, mine, strict=True)
        ]
        for which, what in enumerate(("mean", "variance")):
            rows.append(Row(f"{direction}: {what}", max(_distance(t, o, which, size) for t, o, size in pairs), limit))
    return rows


def report(table: dict[str, Any]) -> str:
    """The table of docs/agreement.md."""
    lines = ["| reads | forward: mean, variance | backward: mean, variance |", "|---|---|---|"]
    for name, case in table["cases"].items():
        forward_mean, forward, backward_mean, backward = (f"{r.distance:.1f}" for r in compare(table, name))
        numbers = ", ".join(f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in case["io"].items())
        lines.append(
            f"| {name}{f' ({numbers})' if numbers else ''} | {forward_mean}, {forward} | {backward_mean}, {backward} |"
        )
    made = table["made"]
    return "\n".join(
        [
            *lines,
            "",
            f"aihwkit {made['aihwkit']}, torch {made['torch']}, {made['reads']} reads of each vector there, "
            f"{REPEATS} here.",
        ]
    )


def main(page: Path) -> None:
    """Replaces what stands between the page's two marks."""
    replace_between(page, "<!-- generated: converters -->", "<!-- end: converters -->", report(load()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
