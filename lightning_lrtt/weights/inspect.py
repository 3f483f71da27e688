"""``lrtt inspect``: what is in a checkpoint file and what would go where, problems first."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from lightning_lrtt.weights import _names
from lightning_lrtt.weights._gguf import Metadata
from lightning_lrtt.weights._transforms import ARCHITECTURES
from lightning_lrtt.weights._types import can_decode
from lightning_lrtt.weights.checkpoint import LazyCheckpoint
from lightning_lrtt.weights.errors import CheckpointFormatError
from lightning_lrtt.weights.plan import LoadPlan, make_plan


def describe(checkpoint: LazyCheckpoint, module: torch.nn.Module | None = None, values: bool = False) -> str:
    """A page about a checkpoint.

    Args:
        checkpoint: An open one.
        module: Also say what it would get; its parameters may be on the meta device.
        values: Read all tensors and check that their scales are finite.

    Returns:
        Problems, the file, its metadata, its tensors with types, sizes and where each would go.
    """
    problems, plan = [], None
    for tensor in checkpoint.values():
        if not can_decode(tensor.type):
            problems.append(f"{tensor.name}: nothing decodes {tensor.type}")
        elif values:
            try:
                tensor.verify_values()
            except CheckpointFormatError as error:
                problems.append(f"{tensor.name}: byte {error.position}: {error.problem}")
    arch = checkpoint.architecture
    if checkpoint.format == "gguf" and arch not in ARCHITECTURES:
        problems.append(
            f"architecture {arch!r}: its value transforms are unknown; give transforms= to load it by mapped names"
        )
    if module is None:
        where = _names.suggest(checkpoint)
        if arch in ARCHITECTURES:
            problems += [
                f"{name}: not in the table of {arch}, no layer takes it by mapped names"
                for name in checkpoint
                if name not in where and name not in _names.DERIVED
            ]
    else:
        try:
            plan = make_plan(module, checkpoint, strict=False)
            where = _places(plan)
            problems += [f"{name}: missing in the file" for name in plan.missing]
            problems += [f"{name}: {shapes}" for name, shapes in plan.mismatched.items()]
            problems += [f"{name}: unexpected, nothing takes it" for name in plan.unexpected]
        except ValueError as error:
            where = {}
            problems.append(str(error))
    lines = [f"problems: {len(problems) or 'none'}", *(f"  {problem}" for problem in problems), ""]
    size = sum(tensor.nbytes for tensor in checkpoint.values())
    types = Counter(str(tensor.type) for tensor in checkpoint.values())
    lines += [
        f"{checkpoint.path}",
        f"  {checkpoint.format}, {checkpoint.size} bytes, {len(checkpoint)} tensors of "
        f"{size} bytes: " + ", ".join(f"{count} {name}" for name, count in types.most_common()),
        "",
        "metadata",
    ]
    metadata: Any = checkpoint.metadata
    lines += [
        f"  {key} = {metadata.describe(key) if isinstance(metadata, Metadata) else repr(metadata[key])}"
        for key in metadata
    ]
    rows = [
        (t.name, "x".join(map(str, t.shape)) or "scalar", str(t.type), str(t.nbytes), where.get(t.name, "-"))
        for t in checkpoint.values()
    ]
    rows.insert(0, ("tensor", "shape", "type", "bytes", "goes to" if module is not None else "Hugging Face name"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines += [
        "",
        *("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _places(plan: LoadPlan) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for entry in plan.entries:
        said = f" ({entry.transform})" if str(entry.transform) else ""
        found.setdefault(entry.source.name, []).append(entry.name + said)
    for copy, name in plan.copies.items():
        found.setdefault(copy, []).append(f"{name} (a copy)")
    return {name: ", ".join(names) for name, names in found.items()}


def _build(path: str, arguments: str) -> torch.nn.Module:
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        with torch.device("meta"):
            return kind(**json.loads(arguments))  # type: ignore[no-any-return]  # kind is a class of devices
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"inspect: --module must be a class that --init-args builds, got {path!r}: {error}") from None


HELP = "Show the tensors of a GGUF or safetensors file and where they would go."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``lrtt inspect``."""
    parser.add_argument("checkpoint", help="*.gguf, *.safetensors, *.safetensors.index.json or a folder with these")
    parser.add_argument(
        "--module", metavar="CLASS", help="say what this module would get; it is built on the meta device"
    )
    parser.add_argument("--init-args", default="{}", metavar="JSON", help="keyword arguments of the module")
    parser.add_argument(
        "--verify-values", action="store_true", help="read all tensors and check that their scales are finite"
    )


def main(args: Sequence[str]) -> None:
    """The subcommand ``lrtt inspect``.

    Args:
        args: Command line after ``inspect``.
    """
    parser = argparse.ArgumentParser(
        prog="lrtt inspect",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show the tensors of a GGUF or safetensors checkpoint, their types and sizes, and what would\n"
        "go where, problems first. Only the header is read (and what a tied parameter has twice).",
        epilog="examples:\n  lrtt inspect model.gguf\n"
        "  lrtt inspect model.gguf --module examples.gguf_finetune.model.ByteLlama --init-args '{\"layers\": 2}'",
    )
    add_arguments(parser)
    given = parser.parse_args(args)
    try:
        module = None if given.module is None else _build(given.module, given.init_args)
        with LazyCheckpoint.open(given.checkpoint) as checkpoint:
            page = describe(checkpoint, module, given.verify_values)
    except (OSError, ValueError, ImportError) as error:
        kind = "problem: " if isinstance(error, CheckpointFormatError) else ""
        parser.exit(1, f"lrtt inspect: {kind}{error}\n")
    sys.stdout.write(page)
