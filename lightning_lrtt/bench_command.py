"""``lrtt bench``: a short measurement of training steps on the user's machine, side by side."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, _check, presets
from lightning_lrtt.nn import LRTTLinear

__all__ = ["measure"]

HELP = "Time training steps on this machine: dense, digital LR-TT, pulsed LR-TT."


def measure(
    size: int = 512,
    samples: int = 64,
    rank: int = 8,
    preset: str = "idealized",
    transfer_every: int = 32,
    rounds: int = 7,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time training steps (forward, backward, update; transfers included) of one ``size x size`` layer.

    Every round times one cycle, ``transfer_every`` steps, of each variant in turn, so that what slows the machine for a
    while slows all of them; the first round warms up and does not count. ``dense`` is a Linear layer with SGD.

    Args:
        size: Inputs and outputs of the layer.
        samples: Rows of a batch.
        rank: r.
        preset: Device of A, B and C of the pulsed variant.
        transfer_every: Steps in a cycle.
        rounds: Rounds that count, at least 3.
        device: Of torch.

    Returns:
        What was asked for; ``milliseconds`` per step by variant (the median round) and ``of_dense`` (the median of each
        round's ratio to dense, with the smallest and the largest).

    Raises:
        ValueError: If a number is out of range or the preset unknown.

    Example:
        >>> sorted(measure(size=16, samples=4, rank=2, transfer_every=2, rounds=3)["milliseconds"])
        ['dense', 'digital', 'pulsed']
    """
    me = "lrtt bench"
    for name, value, low in (("size", size, 1), ("samples", samples, 1), ("rank", rank, 1), ("rounds", rounds, 3)):
        _check.integer(me, f"--{name}", value, low=low)
    _check.integer(me, "--transfer-every", transfer_every, low=1)
    _check.integer(me, "--rank", rank, low=1, high=size, remedy="a rank above the size holds nothing more")
    _check.choice(me, "--device-preset", preset, presets.DEVICES)
    cell = presets.device(preset)
    common: dict[str, Any] = {"rank": rank, "transfer_every": transfer_every}
    torch.manual_seed(0)
    x = torch.randn(samples, size, device=device)
    target = torch.randn(samples, size, device=device)
    digital = LRTTLinear(size, size, config=LRTTConfig(**common), device=device)
    pulsed = LRTTLinear(size, size, config=LRTTConfig(**common, fast_device=cell, visible_device=cell), device=device)
    dense = nn.Linear(size, size, device=device)
    steps = {
        "dense": _step(dense, torch.optim.SGD(dense.parameters(), lr=1e-3), x, target),
        "digital": _step(digital, LRTT(digital.parameters(), lr=1e-3), x, target),
        "pulsed": _step(pulsed, LRTT(pulsed.parameters(), lr=1e-3), x, target),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            times[name].append(_seconds(step, transfer_every, x.device) / transfer_every * 1e3)
    measured = {name: values[1:] for name, values in times.items()}
    ratios = {
        name: sorted(a / b for a, b in zip(measured[name], measured["dense"], strict=True))
        for name in ("digital", "pulsed")
    }
    return {
        "size": size, "samples": samples, "rank": rank, "preset": preset, "transfer_every": transfer_every,
        "rounds": rounds, "device": torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "milliseconds": {name: statistics.median(values) for name, values in measured.items()},
        "of_dense": {name: [statistics.median(r), r[0], r[-1]] for name, r in ratios.items()},
    }  # fmt: skip


def _step(
    module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor
) -> Callable[[], Any]:
    x = x.clone().requires_grad_()  # a layer inside a network hands its gradient on

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), target).backward()
        optimizer.step()

    return step


def _seconds(step: Callable[[], Any], count: int, device: torch.device) -> float:
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``lrtt bench``."""
    parser.add_argument("--size", type=int, default=512, help="inputs and outputs of the layer (default: 512)")
    parser.add_argument("--samples", type=int, default=64, help="rows of a batch (default: 64)")
    parser.add_argument("--rank", type=int, default=8, help="rank of A and B (default: 8)")
    parser.add_argument("--device-preset", default="idealized", help="cells of the pulsed layer (default: idealized)")
    parser.add_argument("--transfer-every", type=int, default=32, help="steps in a cycle (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="cycles timed of each variant (default: 7)")
    parser.add_argument(
        "--on", choices=("auto", "cpu", "cuda"), default="auto", help="where (default: CUDA if it is there)"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")


def main(args: Sequence[str]) -> None:
    """The subcommand ``lrtt bench``.

    Args:
        args: Command line after ``bench``.
    """
    parser = argparse.ArgumentParser(
        prog="lrtt bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Time training steps of one layer on this machine: dense with SGD, LR-TT in floating point, LR-TT by\n"
        "pulses. Medians of interleaved rounds; transfers are in them. Run it while nothing else runs.",
        epilog="examples:\n  lrtt bench\n  lrtt bench --size 4096 --samples 4096 --rank 16 --device-preset ecram",
    )
    add_arguments(parser)
    given = parser.parse_args(args)
    if given.on == "cuda" and not torch.cuda.is_available():
        parser.exit(
            1, "lrtt bench: --on must be cpu or auto where torch sees no GPU, got 'cuda'; `lrtt info` says why\n"
        )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.on == "auto" else given.on
    try:
        found = measure(
            given.size, given.samples, given.rank, given.device_preset, given.transfer_every, given.rounds, device
        )
    except (ValueError, TypeError) as error:
        parser.exit(1, f"{error}\n")
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    lines = [
        "{size} x {size}, {samples} samples, r = {rank}, transfer every {transfer_every} steps; {device}, {threads} "
        "threads, torch {torch}; medians of {rounds} rounds".format(**found),
        f"{'':<28}{'ms a step':>12}{'of dense':>12}   (smallest, largest)",
    ]
    words = {"dense": "dense, SGD", "digital": "LR-TT, digital", "pulsed": f"LR-TT, pulsed ({found['preset']})"}
    for name, said in words.items():
        middle, low, high = found["of_dense"].get(name, (1.0, 1.0, 1.0))
        spread = "" if name == "dense" else f"   ({low:.2f}, {high:.2f})"
        lines.append(f"{said:<28}{found['milliseconds'][name]:>12.3f}{middle:>12.2f}{spread}")
    sys.stdout.write("\n".join(lines) + "\n")
