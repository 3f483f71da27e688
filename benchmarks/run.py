"""Benchmarks by name. Every figure comes with the floors that this machine sets, measured in the same run.

    python benchmarks/run.py --list
    python benchmarks/run.py --op step mlp24 --json out.json
    python benchmarks/run.py --op step --set samples=128
    python benchmarks/run.py --op update transfer --base HEAD~5     # beside another revision's kernels
    python benchmarks/run.py --op step --device cpu --quick         # tiny: shows that it works, says nothing about speed

Times are medians over windows of steps that the contenders take in turn; `worst` is the slowest single step. The memory
floor is bytes that must move over the bandwidth of a copy, the matrix floor is operations over the rate of a bf16 product.
Exit status 1: a check did not hold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Op:
    """Function ``name`` of ``module``, what it times, and its sizes in full and in quick runs."""

    module: str
    name: str
    what: str
    full: dict[str, int]
    quick: dict[str, int]


def _layer(size: int, samples: int, rank: int, **more: int) -> dict[str, int]:
    return {"size": size, "samples": samples, "rank": rank, **more}


OPS: dict[str, Op] = {
    "update": Op(
        "op_kernels",
        "update",
        "the pulsed update of A and B alone, light and heavy pulses",
        _layer(4096, 4096, 16),
        _layer(48, 40, 4),
    ),
    "transfer": Op(
        "op_kernels",
        "transfer",
        "the transfer into C alone, few and many pulses a cell",
        {"size": 4096, "rank": 16},
        {"size": 48, "rank": 4},
    ),
    "step": Op(
        "op_step",
        "step",
        "one training step of a layer beside dense AdamW, LoRA and plain PyTorch; pulse counts, memory",
        _layer(4096, 4096, 16, transfer_every=32, ring=16),
        _layer(48, 40, 4, transfer_every=4, ring=2),
    ),
    "mlp24": Op(
        "op_graphs",
        "small",
        "a deep narrow MLP: captured, eager, plain PyTorch, torch.compile, AdamW, LoRA; bare and through the Trainer",
        {"layers": 24, "width": 512, "batch": 64, "rank": 8, "transfer_every": 32},
        {"layers": 3, "width": 16, "batch": 8, "rank": 4, "transfer_every": 4},
    ),
    "large": Op(
        "op_graphs",
        "large",
        "large layers: captured beside eager",
        {"layers": 2, "width": 4096, "batch": 4096, "rank": 16, "transfer_every": 32},
        {"layers": 2, "width": 16, "batch": 8, "rank": 4, "transfer_every": 4},
    ),
    "llama": Op(
        "op_llama",
        "llama",
        "a Llama-shaped 1.1B model on pulsed tiles beside dense AdamW: tokens a second, memory, what fits into less",
        {"hidden": 2048, "layers": 22, "intermediate": 5632, "heads": 32, "kv_heads": 4, "vocab": 32000}
        | {"rows": 8, "tokens": 1024, "rank": 16, "transfer_every": 32, "limit_GiB": 16},
        {"hidden": 32, "layers": 2, "intermediate": 48, "heads": 4, "kv_heads": 2, "vocab": 64}
        | {"rows": 2, "tokens": 8, "rank": 4, "transfer_every": 2, "limit_GiB": 16},
    ),
    "small": Op(
        "op_kernels",
        "small_layer",
        "forward and backward of a small float32 layer: one launch each beside several",
        {"samples": 64, "outputs": 512, "inputs": 512, "rank": 8},
        {"samples": 4, "outputs": 12, "inputs": 8, "rank": 4},
    ),
    "tree": Op(
        "op_kernels",
        "segment_tree",
        "the segment sum beside zero, additions, scale",
        {"floats": 10_000_000},
        {"floats": 1000},
    ),
}


def use_package(folder: str) -> None:
    """Import lightning_lrtt from ``folder``, whatever is installed."""
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
    sys.path.insert(0, folder)
    import lightning_lrtt

    found = Path(lightning_lrtt.__file__).resolve()
    if Path(folder).resolve() not in found.parents:
        sys.exit(f"run.py: lightning_lrtt must come from {folder}, got {found}")


def function_of(op: Op) -> Any:
    """The function behind an operation; imports it."""
    return getattr(importlib.import_module(op.module), op.name)


def sizes_of(op: Op, quick: bool, given: Sequence[str]) -> dict[str, int]:
    """Its sizes with those of ``--set`` in place."""
    sizes = dict(op.quick if quick else op.full)
    for setting in given:
        name, _, value = setting.partition("=")
        if name not in sizes or not value.isdigit() or int(value) < 1:
            sys.exit(
                f"run.py: --set must be one of {sorted(sizes)} = a positive integer for {op.name}, got {setting!r}"
            )
        sizes[name] = int(value)
    return sizes


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the operations here; prints their tables and returns everything as plain data."""
    from measure import Machine, Options, Row, about, as_json, say, table

    machine = Machine.measure(args.device, args.quick)
    found: dict[str, Any] = {"about": about(machine), "ops": {}}
    if not args.silent:
        print(", ".join(f"{name} {value}" for name, value in found["about"].items()), flush=True)
    for name in args.op:
        op, sizes = OPS[name], sizes_of(OPS[name], args.quick, args.set)
        say(f"{name}: {sizes}")
        rows: list[Row] = []
        try:
            for row in function_of(op)(Options(args.device, args.quick, sizes, machine)):
                rows.append(row)
        except Exception as error:  # the other operations are worth their time
            traceback.print_exc()
            rows.append(Row(f"{type(error).__name__}", missing=str(error), checks={"ran to its end": False}))
        found["ops"][name] = {"sizes": sizes, "rows": as_json(rows, machine)}
        if not args.silent:
            print(
                f"\n## {name}: {', '.join(f'{k} {v}' for k, v in sizes.items())}\n\n{table(rows, machine)}", flush=True
            )
    return found


# ---------------------------------------------------------------- another revision


def build(ref: str, folder: Path) -> Path:
    """Install revision ``ref`` of this repository into a folder; takes as long as its build."""
    source, target = folder / "source", folder / "package"
    source.mkdir()
    archive = subprocess.run(["git", "archive", ref], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Time the installed package and ``args.base`` in turn, a fresh process each; prints and returns their ratios."""
    from measure import say

    rounds: dict[str, list[dict[str, Any]]] = {"here": [], "base": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"building {args.base}")
        package = build(args.base, folder)
        for turn in range(args.rounds):
            for side in rounds:
                out = folder / "out.json"
                command = [
                    sys.executable,
                    __file__,
                    "--silent",
                    "--json",
                    str(out),
                    "--device",
                    args.device,
                    "--op",
                    *args.op,
                ]
                command += ["--quick"] * args.quick + [f"--set={setting}" for setting in args.set]
                command += ["--package", str(package)] * (side == "base")
                say(f"{side}, round {turn + 1} of {args.rounds}")
                done = subprocess.run(command, check=False).returncode
                if not out.exists():
                    sys.exit(f"run.py: the run of {side} failed with exit status {done}")
                rounds[side].append(json.loads(out.read_text()))
                out.unlink()
    print(f"\n| op | | here, ms | {args.base}, ms | here / {args.base} |\n|---|---|---|---|---|")
    table = []
    for op in args.op:
        times = {side: [_times(one, op) for one in found] for side, found in rounds.items()}
        for row in times["here"][0]:
            pairs = [
                (h[row] or 0.0, b[row] or 0.0)
                for h, b in zip(times["here"], times["base"], strict=True)
                if h.get(row) and b.get(row)
            ]
            if pairs:
                here, base = (statistics.median(side) for side in zip(*pairs, strict=True))
                table.append({"op": op, "row": row, "here": here, "base": base})
                table[-1]["ratio"] = statistics.median(h / b for h, b in pairs)
                print(f"| {op} | {row} | {here:.4g} | {base:.4g} | {table[-1]['ratio']:.3f} |", flush=True)
    for found in rounds["here"]:  # what the other revision gets wrong is its own affair
        for op, row, check in failed(found):
            print(f"{op}, {row}: {check} did not hold here")
    return {"base": args.base, "ratios": table, "rounds": rounds}


def _times(found: dict[str, Any], op: str) -> dict[str, float | None]:
    return {row["name"]: row["ms"] for row in found["ops"][op]["rows"]}


# ---------------------------------------------------------------- command line


def failed(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Checks that did not hold: operation, row and name."""
    return [
        (op, row["name"], check)
        for op, result in found["ops"].items()
        for row in result["rows"]
        for check, holds in row["checks"].items()
        if not holds
    ]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="names, what they time and their sizes")
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=[], metavar="NAME")
    parser.add_argument("--set", nargs="+", default=[], metavar="SIZE=N", help="other sizes than those of --list")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--base", metavar="REF", help="time this git revision's package too, and print ratios")
    parser.add_argument("--rounds", type=int, default=3, help="with --base: processes of each side")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few windows")
    parser.add_argument("--package", help=argparse.SUPPRESS)  # a folder that holds another lightning_lrtt
    parser.add_argument("--silent", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for name, op in OPS.items():
            print(f"{name:9} {op.what}\n{'':9} {' '.join(f'{k}={v}' for k, v in op.full.items())}")
        return 0
    if not args.op:
        parser.error("--op must name operations of --list")
    for name in args.op:
        sizes_of(OPS[name], args.quick, args.set)  # refuses before anything takes time
    if args.package:
        use_package(args.package)
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda must have a CUDA device, and torch sees none")
    found = compare(args) if args.base else measure(args)
    if args.json:
        partial = args.json.with_name(args.json.name + ".part")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(partial, args.json)
    measured = found["rounds"]["here"] if args.base else [found]
    return 1 if any(failed(one) for one in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
