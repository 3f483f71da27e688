"""Pretrained weights on the CPU: decoding, opening, memory, single flight and bad files, beside gguf's own code.

    python benchmarks/pretrained.py                          # all, on two threads; writes 2 GiB to a temporary folder
    python benchmarks/pretrained.py --only decode open --json out.json

Decoding: 4096x4096 into existing float32 memory, contenders by turns, medians of rounds, ratios within a round. Memory:
peak resident size of a fresh process that loads 2 GiB of C into tiles, above that of the same process before it. Each
line says the target; the exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from lightning_lrtt.weights import CheckpointFormatError, LazyCheckpoint, dequantize_into

Row = tuple[str, str, str, bool]  # what, measured, target, reached
REGISTRY: dict[str, Callable[[argparse.Namespace, Path], list[Row]]] = {}


def benchmark(
    function: Callable[[argparse.Namespace, Path], list[Row]],
) -> Callable[[argparse.Namespace, Path], list[Row]]:
    """Add to the registry by name."""
    REGISTRY[function.__name__] = function
    return function


def seconds(work: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@benchmark
def decode(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Blocks into existing memory against gguf.quants."""
    rows, rng = [], np.random.default_rng(0)
    for kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K, Kind.Q5_K, Kind.F16, Kind.MXFP4):
        size, width = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 60, (4096, 4096 // size * width), dtype=np.uint8)  # scales stay finite
        blocks, out = torch.from_numpy(raw).reshape(-1), torch.zeros(4096, 4096)
        expected = torch.from_numpy(np.array(gguf.dequantize(raw, kind), dtype=np.float32)).view(4096, 4096)
        same = torch.equal(dequantize_into(out, blocks, kind).view(torch.int32), expected.view(torch.int32))
        theirs_once, ours_once = partial(gguf.dequantize, raw, kind), partial(dequantize_into, out, blocks, kind)
        pairs = [(seconds(theirs_once), seconds(ours_once)) for _ in range(args.rounds)]
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        wanted = kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K)
        rows.append(
            (
                f"{kind.name} to float32",
                f"{ours * 1e3:.2f} ms, gguf.quants {theirs * 1e3:.1f} ms: {ratio:.1f}x, "
                f"bits {'equal' if same else 'DIFFER'}",
                ">= 10x, equal" if wanted else "equal",
                same and (ratio >= 10 or not wanted),
            )
        )
    return rows


def vocabulary_file(path: Path) -> Path:
    """A header as of Llama 3: 128k tokens, types and 280k merges."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{i}" for i in range(128_000)])
    writer.add_token_types([1] * 128_000)
    writer.add_token_merges([f"tok{i} en{i}" for i in range(280_000)])
    writer.add_tensor("w", np.zeros((2, 32), np.float32))
    return finish(writer, path)


def finish(writer: Any, path: Path) -> Path:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@benchmark
def opening(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Headers with and without a vocabulary."""
    path = vocabulary_file(folder / "vocabulary.gguf")
    ours = statistics.median(seconds(lambda: LazyCheckpoint.open(path)) for _ in range(args.rounds))
    theirs = seconds(lambda: gguf.GGUFReader(path))
    writer = gguf.GGUFWriter(folder / "weights.gguf", "llama")
    for i in range(291):  # a 7B Llama has as many tensors
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.zeros((8, 32), np.float32))
    weights = finish(writer, folder / "weights.gguf")
    plain = statistics.median(seconds(lambda: LazyCheckpoint.open(weights)) for _ in range(args.rounds))
    library = statistics.median(seconds(lambda: gguf.GGUFReader(weights)) for _ in range(3))
    return [
        (
            "open, 128k tokens and 280k merges",
            f"{ours * 1e3:.2f} ms, GGUFReader {theirs:.2f} s",
            "< 100 ms",
            ours < 0.1,
        ),
        ("open, 291 tensors", f"{plain * 1e3:.2f} ms, GGUFReader {library * 1e3:.1f} ms", "< 2 ms", plain < 0.002),
    ]


MEMORY = """
import sys, time
import torch
from torch import nn
from lightning_lrtt import LRTTConfig, convert_to_lrtt
from lightning_lrtt.weights import load_pretrained
torch.set_num_threads(2)
with torch.device("meta"):
    module = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(32)))  # 2 GiB in float32
convert_to_lrtt(module, LRTTConfig(rank=1))
import gguf  # the library's own memory is not the load's
def size(name):  # MiB; not getrusage, whose peak a child inherits from its parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
before = size("VmRSS")
start = time.perf_counter()
report = load_pretrained(module, sys.argv[1], transforms={})
spent = time.perf_counter() - start
peak = size("VmHWM")
assert len(report.loaded) == 32
print(peak - before, spent)
"""


@benchmark
def memory(args: argparse.Namespace, folder: Path) -> list[Row]:
    """2 GiB of C from a Q4_0 file."""
    writer = gguf.GGUFWriter(folder / "large.gguf", "llama")
    raw = np.random.default_rng(0).integers(0, 60, (4096, 128 * 18), dtype=np.uint8)
    for i in range(32):
        writer.add_tensor(f"{i}.weight", raw, raw_dtype=Kind.Q4_0)
    path = finish(writer, folder / "large.gguf")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    peak, spent = map(float, done.stdout.split())
    return [
        ("2 GiB of C from Q4_0, above the baseline", f"{peak:.0f} MiB in {spent:.1f} s", "<= 2112 MiB", peak <= 2112)
    ]


@benchmark
def flight(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Eight threads, twelve tensors."""
    writer = gguf.GGUFWriter(folder / "twelve.gguf", "llama")
    for i in range(12):
        writer.add_tensor(f"t{i}", np.zeros((1024, 1024), np.float32))
    checkpoint = LazyCheckpoint.open(finish(writer, folder / "twelve.gguf"))
    held: list[Any] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        held.extend(checkpoint[f"t{i}"].load() for i in range(12))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loads = checkpoint.flight.counts["loads"]
    return [
        ("8 threads x 12 tensors", f"{loads} loads, {len(held)} answers", "exactly 12", loads == 12 and len(held) == 96)
    ]


@benchmark
def refusal(args: argparse.Namespace, folder: Path) -> list[Row]:
    """The slowest of some bad headers."""
    path, worst = folder / "bad.gguf", 0.0
    head = b"GGUF" + struct.pack("<I", 3)
    key = struct.pack("<Q", 1) + b"k"
    bad = [
        head + struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 8, 2**40) + bytes(60),
        head + struct.pack("<QQ", 2**60, 0),
        head + struct.pack("<QQ", 0, 2**60),
        head[:7],
        vocabulary_file(path).read_bytes()[:-80],
    ]
    for data in bad:
        path.write_bytes(data)

        def refused() -> None:
            try:
                LazyCheckpoint.open(path)
            except CheckpointFormatError:
                return
            raise AssertionError("a bad file was opened")

        worst = max(worst, statistics.median(seconds(refused) for _ in range(args.rounds)))
    return [("refusal of a bad file, the slowest of five", f"{worst * 1e3:.2f} ms", "< 10 ms", worst < 0.01)]


@benchmark
def first_step(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Until the first layer of a large file can be used: lazily and whole."""
    from lightning_lrtt.weights import load_pretrained
    from lightning_lrtt.weights.lazy_fill import LazyFill
    from lightning_lrtt.weights.plan import make_plan

    writer = gguf.GGUFWriter(folder / "layers.gguf", "llama")
    raw = np.random.default_rng(0).integers(0, 60, (2048, 64 * 18), dtype=np.uint8)
    for i in range(16):
        writer.add_tensor(f"{i}.weight", raw, raw_dtype=Kind.Q4_0)
    path = finish(writer, folder / "layers.gguf")

    def fresh() -> torch.nn.Sequential:
        with torch.device("meta"):
            return torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(16)))

    def lazily() -> None:
        module = fresh().to_empty(device="cpu")
        LazyFill(module, make_plan(module, LazyCheckpoint.open(path), transforms={}), lambda: None)
        module[0](torch.zeros(1, 2048))

    lazy = statistics.median(seconds(lazily) for _ in range(args.rounds))
    everything = statistics.median(seconds(lambda: load_pretrained(fresh(), path, transforms={})) for _ in range(3))
    return [
        (
            "first layer of 16 (256 MiB) usable",
            f"lazy {lazy * 1e3:.1f} ms, everything {everything * 1e3:.0f} ms",
            "-",
            True,
        )
    ]


def main() -> int:
    """Run the chosen benchmarks; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(REGISTRY), default=list(REGISTRY))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=None, help="for the files; default: the system's temporary folder"
    )
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: list[Row] = []
    print(f"{os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}, numpy {np.__version__}\n")
    print("| what | measured | target | reached |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.only:
            for row in REGISTRY[name](args, Path(folder)):
                found.append(row)
                print(f"| {row[0]} | {row[1]} | {row[2]} | {'yes' if row[3] else 'NO'} |", flush=True)
    if args.json is not None:
        args.json.write_text(
            json.dumps(
                [dict(zip(("what", "measured", "target", "reached"), row, strict=True)) for row in found], indent=1
            )
        )
    return 0 if all(row[3] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
