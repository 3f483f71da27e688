"""What all benchmarks share: the machine's floors, windows of steps timed in turn, rows and their table."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch

from lightning_lrtt import build_info

Step = Callable[[], Any]
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One line of a result.

    Args:
        name: What was timed.
        ms: Median time of a step, in ms; None if there is none, and then `missing` says why.
        worst: The slowest single step of the timed windows, in ms.
        bytes: What must at least move through the device's memory.
        flops: Operations of the matrix products (2 per multiplication and addition) that the work amounts to.
        more: Further figures by name.
        checks: What must hold; a check that does not makes the program exit with 1.
        missing: Why nothing was timed.
    """

    name: str
    ms: float | None = None
    worst: float | None = None
    bytes: float | None = None
    flops: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Machine:
    """The device and what it reaches: bytes a second of a copy (read and written), operations a second of a bf16 product."""

    device: str
    name: str
    bandwidth: float
    rate: float

    @classmethod
    def measure(cls, device: str, quick: bool) -> Machine:
        """Times a copy (1 GiB; quick: 16 MiB) and a square bf16 product (8192; quick: 256)."""
        size, count = (8192, 1 << 30) if not quick else (256, 1 << 24)
        source = torch.empty(count, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        steps = {"copy": [lambda: target.copy_(source)] * 4, "product": [lambda: torch.mm(a, b, out=out)] * 4}
        times = {name: found.median for name, found in in_turn(steps, 7, device).items()}
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {build_info()['cpu_instructions']}"
        return cls(device, name, 2e3 * count / times["copy"], 2e3 * size**3 / times["product"])

    def floors(self, row: Row) -> tuple[float | None, float | None]:
        """The least ms by the memory and by the matrix units."""
        by_memory = None if row.bytes is None else 1e3 * row.bytes / self.bandwidth
        return by_memory, None if row.flops is None else 1e3 * row.flops / self.rate

    def over_floor(self, row: Row) -> float | None:
        """Time over the larger floor."""
        floors = [floor for floor in self.floors(row) if floor]
        return row.ms / max(floors) if row.ms is not None and floors else None


@dataclass(frozen=True)
class Options:
    """What an operation is told: where to run, its sizes, and how it reports progress."""

    device: str
    quick: bool
    sizes: dict[str, int]
    machine: Machine

    def __getattr__(self, name: str) -> int:
        try:
            return int(self.__dict__["sizes"][name])
        except KeyError:
            raise AttributeError(name) from None

    @property
    def rounds(self) -> int:
        """Timed windows of each contender."""
        return 2 if self.quick else 7

    def autocast(self) -> Any:
        """bf16 autocast on the device."""
        return torch.autocast(self.device, torch.bfloat16)


def say(text: str) -> None:
    """Progress, on stderr, as it goes."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- time


@dataclass
class Times:
    """Milliseconds of the steps of every timed window."""

    windows: list[list[float]] = field(default_factory=list)

    @property
    def means(self) -> list[float]:
        """Mean step of each window."""
        return [statistics.fmean(window) for window in self.windows]

    @property
    def median(self) -> float:
        """Of the windows' means."""
        return statistics.median(self.means)

    @property
    def worst(self) -> float:
        """The slowest step."""
        return max(max(window) for window in self.windows)


@contextlib.contextmanager
def syncs_forbidden(device: str, forbidden: bool = True) -> Iterator[None]:
    """Within, a host synchronisation that torch knows of raises."""
    if device != "cuda" or not forbidden:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def window(steps: Sequence[Step], device: str, forbid_syncs: bool = False) -> list[float]:
    """Milliseconds of every step, run one after the other: device time by events, or the host's clock on a CPU."""
    if device != "cuda":
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with syncs_forbidden(device, forbid_syncs):
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            step()
            event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def in_turn(
    runs: Mapping[str, Sequence[Step]],
    rounds: int,
    device: str,
    forbid_syncs: Sequence[str] = (),
    on_start: Callable[[], None] | None = None,
) -> dict[str, Times]:
    """Times windows of steps, one of each contender after the other, so that what disturbs one disturbs all.

    Args:
        runs: The steps of one window, by contender.
        rounds: Timed windows of each; one more comes first and does not count.
        device: ``cpu`` or ``cuda``.
        forbid_syncs: Contenders whose steps must not wait for the device.
        on_start: Called between the uncounted windows and the timed ones.
    """
    found = {name: Times() for name in runs}
    for turn in range(rounds + 1):
        for name, steps in runs.items():
            times = window(steps, device, name in forbid_syncs)
            if turn:
                found[name].windows.append(times)
        if not turn and on_start is not None:
            on_start()
    return found


def captured(steps: Sequence[Step], device: str, forbid_syncs: bool = False) -> list[Step]:
    """Each step as a CUDA graph, after three eager ones; on a CPU, where there are no graphs, the steps themselves.

    A capture runs nothing. With ``forbid_syncs`` the third eager step must not wait for the device.
    """
    if device != "cuda":
        for step in steps[:3]:
            step()
        return list(steps)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            with syncs_forbidden(device, forbid_syncs and i == 2):
                steps[i % len(steps)]()
    torch.cuda.current_stream().wait_stream(side)
    pool, replays = torch.cuda.graph_pool_handle(), list[Step]()
    for step in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        replays.append(owning(graph.replay, step))
    return replays


def owning(replay: Step, step: Step) -> Step:
    """``replay``, kept together with the step that owns the tensors its graph reads: without it their memory would go to
    the next contender.
    """
    return partial(_replay, replay, step)


def _replay(replay: Step, _: Step) -> None:
    replay()


def cycle(steps: Sequence[Step], every: int) -> list[Step]:
    """Whole rounds of ``steps``, as many as make a multiple of ``every`` steps."""
    return list(steps) * (math.lcm(len(steps), every) // len(steps))


# ---------------------------------------------------------------- reports


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e5 else f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)


def table(rows: Sequence[Row], machine: Machine) -> str:
    """Markdown: one line a row."""
    lines = ["| | ms | worst, ms | memory floor | matrix floor | / floor | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        notes = [f"{name} {_number(value)}" for name, value in row.more.items()]
        notes += [f"{name}: {'yes' if holds else 'NO'}" for name, holds in row.checks.items()]
        if row.missing:
            notes.insert(0, f"missing: {row.missing}")
        figures = [row.ms, row.worst, *machine.floors(row), machine.over_floor(row)]
        lines.append(f"| {row.name} | " + " | ".join(map(_number, figures)) + f" | {'; '.join(notes)} |")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], machine: Machine) -> list[dict[str, Any]]:
    """Rows with their floors."""
    found = []
    for row in rows:
        by_memory, by_matrix = machine.floors(row)
        floors = {"memory_floor_ms": by_memory, "matrix_floor_ms": by_matrix, "over_floor": machine.over_floor(row)}
        found.append(asdict(row) | floors)
    return found


def relate(rows: Sequence[Row], to: str, as_name: str) -> None:
    """Adds to every timed row its time over that of the row ``to``, if that was timed."""
    base = next((row.ms for row in rows if row.name == to), None)
    for row in rows:
        if base and row.ms is not None:
            row.more = {as_name: row.ms / base} | row.more


def about(machine: Machine) -> dict[str, Any]:
    """Where and with what the figures were made."""
    git = shutil.which("git")
    command = [git or "", "describe", "--always", "--dirty"]
    revision = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() if git else ""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": machine.name,
        "copy_GBs": machine.bandwidth / 1e9,
        "product_TFLOPs": machine.rate / 1e12,
        "revision": revision or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "build": str(build_info()["cuda_architectures"]) if machine.device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "command": " ".join(["python", *sys.argv]),
    }
