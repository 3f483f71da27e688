"""Quantised blocks to bfloat16 on a GPU, against what its memory and its link allow.

    python benchmarks/gpu_decode.py [--size 16384] [--types Q4_0 Q8_0 ...] [--seconds 20] [--json out.json]
    python benchmarks/gpu_decode.py --device cpu --size 512 --seconds 2     # tries the script itself

Bounds and works are measured in one process by turns; medians. Each turn of `memory` and `decode` is several calls in a
row, so that the device never waits for the host.

- memory: bytes a second of a device copy (read and written bytes both count). upload: bytes a second of a pinned
  host-to-device copy of the same blocks.
- decode: blocks that are on the device; its bytes are the blocks read and the values written. `of memory`: its bytes a
  second / memory's.
- both: pinned blocks to values, uploaded in pieces through two buffers, each decoded while the next is on its way.
  `of the bound`: the longer of upload's and decode's least time (they overlap) / the time of both.
- file: `LazyTensor.into` from a GGUF file in the page cache, which is read into pinned memory by one thread.

The target for Q4_0 is 60% of the memory bound and of the bound of both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lightning_lrtt import build_info
from lightning_lrtt.weights import LazyCheckpoint, LazyTensor, dequantize_into

PIECE = 32 << 20  # bytes uploaded at once
CALLS = 8  # of memory and decode in one turn


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Device time of one call."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


class Upload:
    """Pinned blocks to values: two device buffers, a stream that copies and the current one that decodes."""

    def __init__(self, host: Tensor, out: Tensor, kind: Kind) -> None:
        self.host, self.out, self.kind = host, out, kind
        self.rows = max(1, min(len(host), PIECE // host.shape[1]))
        self.buffers = [torch.empty(self.rows, host.shape[1], dtype=torch.uint8, device=out.device) for _ in range(2)]
        self.cuda = out.is_cuda
        if self.cuda:
            self.copying = torch.cuda.Stream()
            self.copied, self.decoded = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def __call__(self) -> None:
        """All pieces."""
        if self.cuda:
            self.copying.wait_stream(torch.cuda.current_stream())
        for i, first in enumerate(range(0, len(self.host), self.rows)):
            piece, out = self.host[first : first + self.rows], self.out[first : first + self.rows]
            buffer = self.buffers[i % 2][: len(piece)]
            if self.cuda:
                with torch.cuda.stream(self.copying):
                    if i >= 2:
                        self.copying.wait_event(self.decoded[i % 2])
                    buffer.copy_(piece, non_blocking=True)
                    self.copied[i % 2].record()
                self.copied[i % 2].wait()
            else:
                buffer.copy_(piece)
            dequantize_into(out, buffer.view(-1), self.kind)
            if self.cuda:
                self.decoded[i % 2].record()


def write(path: Path, raw: np.ndarray, size: int, kind: Kind) -> LazyTensor:
    """The blocks as a GGUF file of one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = LazyCheckpoint.open(path)["w"]
    assert tensor.shape == (size, size)
    return tensor


def measure(kind: Kind, size: int, budget: float, device: torch.device, folder: Path) -> dict[str, float]:
    """Medians for a ``size x size`` matrix within ``budget`` seconds; checks the bits of some rows first."""
    deadline = time.perf_counter() + budget
    block, width = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = size // block * width
    few = np.random.default_rng(0).integers(0, 60, (min(size, 256), row_bytes), dtype=np.uint8)  # scales stay finite
    raw = np.tile(few, (-(-size // len(few)), 1))[:size]
    host = torch.from_numpy(raw)
    host = host.pin_memory() if device.type == "cuda" else host
    blocks, out = host.to(device), torch.empty(size, size, dtype=torch.bfloat16, device=device)
    tensor, both = write(folder / f"{kind.name}.gguf", raw, size, kind), Upload(host, out, kind)
    expected = torch.from_numpy(np.array(gguf.dequantize(raw[-64:], kind), dtype=np.float32)).view(-1, size).bfloat16()
    source = torch.zeros(2 * out.numel(), dtype=torch.uint8, device=device)
    target, staging = torch.empty_like(source), torch.empty_like(blocks)

    def several(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                work()

        return run

    works: dict[str, Callable[[], object]] = {
        "memory": several(lambda: target.copy_(source)),
        "upload": lambda: staging.copy_(host, non_blocking=True),
        "decode": several(lambda: dequantize_into(out, blocks.view(-1), kind)),
        "both": both,
        "file": lambda: tensor.into(out),
    }
    for name in ("decode", "both", "file"):
        out.fill_(-7)
        works[name]()
        found = out[-len(expected) :].cpu()
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), f"{name}: bits differ from gguf.quants"
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(50):
        for name, work in works.items():
            spent = seconds(work, device) / (CALLS if name in ("memory", "decode") else 1)
            if turn:  # the first warms up
                times[name].append(spent)
        if turn >= 3 and time.perf_counter() > deadline:
            break
    middle = {name: statistics.median(values) for name, values in times.items()}
    traffic = blocks.numel() + out.numel() * 2
    memory, upload = 2 * source.numel() / middle["memory"], blocks.numel() / middle["upload"]
    bound = max(middle["upload"], traffic / memory)
    return {
        "turns": float(len(times["both"])),
        "memory_GBs": memory / 1e9,
        "upload_GBs": upload / 1e9,
        "decode_ms": middle["decode"] * 1e3,
        "decode_GBs": traffic / middle["decode"] / 1e9,
        "of_memory": traffic / middle["decode"] / memory,
        "both_ms": middle["both"] * 1e3,
        "both_GBs": blocks.numel() / middle["both"] / 1e9,
        "of_bound": bound / middle["both"],
        "file_ms": middle["file"] * 1e3,
    }


def main() -> int:
    """Print one Markdown row per type; 1 if Q4_0 misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16384, help="rows and columns; a multiple of 256")
    parser.add_argument("--seconds", type=float, default=20.0, help="for all types together, without set-up")
    parser.add_argument("--types", nargs="*", default=["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q5_0", "MXFP4"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda":
        if not torch.cuda.is_available() or not build_info()["with_cuda"]:
            sys.exit("gpu_decode: needs a CUDA device and a build with CUDA kernels")
        free = torch.cuda.mem_get_info()[0]
        while args.size > 256 and 8 * args.size**2 > 0.8 * free:  # bfloat16 values, two copies of as much, blocks
            args.size //= 2
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU (not the figures that are meant)"
    print(f"{name}, torch {torch.__version__}, {args.size}x{args.size} to bfloat16\n")
    print(
        "| type | memory, GB/s | decode, ms | GB/s | of memory | upload, GB/s | upload and decode, ms | GB/s of blocks "
        "| of the bound | from a file, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.types:
            r = measure(Kind[name], args.size, args.seconds / len(args.types), device, Path(folder))
            found[name] = r
            print(
                f"| {name} | {r['memory_GBs']:.0f} | {r['decode_ms']:.3f} | {r['decode_GBs']:.0f} | "
                f"{r['of_memory']:.0%} | {r['upload_GBs']:.1f} | {r['both_ms']:.2f} | {r['both_GBs']:.1f} | "
                f"{r['of_bound']:.0%} | {r['file_ms']:.1f} |",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))
    reached = "Q4_0" not in found or min(found["Q4_0"]["of_memory"], found["Q4_0"]["of_bound"]) >= 0.6
    print(f"\nQ4_0 at 60% of both: {'yes' if reached else 'NO'}")
    return 0 if reached or args.device == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
