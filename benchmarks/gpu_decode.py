"""Quantised blocks to bfloat16 on a GPU, against what its memory and its link allow.

    python benchmarks/gpu_decode.py [--size 16384] [--types Q4_0 Q8_0 ...] [--json out.json]

Three measured bounds and two measured works, medians of rounds by turns, all in one process:

- memory: bytes a second of a device copy (read and written bytes both count); decode: blocks that are on the device,
its
  bytes being the blocks read and the values written. `of memory` = decode's bytes a second / memory's.
- upload: bytes a second of a pinned host-to-device copy of the same blocks; both: upload of the blocks in pieces, each
  decoded while the next is on its way. `of the bound` = the time of upload and decode at these speeds (the longer of
  the two, since they overlap) / the time of both. The target for Q4_0 is 60% of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from lightning_lrtt import build_info
from lightning_lrtt.weights import dequantize_into

PIECE = 32 << 20  # bytes uploaded at once


def seconds(work: Callable[[], None]) -> float:
    """Device time of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(kind: Kind, size: int, rounds: int) -> dict[str, float]:
    """Medians for a ``size x size`` matrix; checks the bits of some rows first."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = size // block * width
    raw = np.random.default_rng(0).integers(0, 60, (size, row_bytes), dtype=np.uint8)  # scales stay finite
    host = torch.from_numpy(raw).pin_memory()
    blocks, out = host.cuda(), torch.empty(size, size, dtype=torch.bfloat16, device="cuda")
    dequantize_into(out, blocks.view(-1), kind)
    expected = torch.from_numpy(np.array(gguf.dequantize(raw[:64], kind), dtype=np.float32)).view(64, size).bfloat16()
    assert torch.equal(out[:64].cpu().view(torch.int16), expected.view(torch.int16)), "bits differ from gguf.quants"
    source, target = (
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
    )
    staging = torch.empty_like(blocks)
    rows = max(1, PIECE // row_bytes)
    copying = torch.cuda.Stream()

    def both() -> None:
        ready = []
        copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copying):
            for first in range(0, size, rows):
                staging[first : first + rows].copy_(host[first : first + rows], non_blocking=True)
                ready.append(torch.cuda.Event())
                ready[-1].record(copying)
        for first, event in zip(range(0, size, rows), ready, strict=True):
            event.wait()
            dequantize_into(out[first : first + rows], staging[first : first + rows].view(-1), kind)

    works: dict[str, Callable[[], None]] = {
        "memory": lambda: target.copy_(source) and None,
        "upload": lambda: staging.copy_(host, non_blocking=True) and None,
        "decode": lambda: dequantize_into(out, blocks.view(-1), kind) and None,
        "both": both,
    }
    works = {name: (lambda work=work: (work(), None)[1]) for name, work in works.items()}  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 2):
        for name, work in works.items():
            spent = seconds(work)
            if i >= 2:
                times[name].append(spent)
    middle = {name: statistics.median(values) for name, values in times.items()}
    traffic = blocks.numel() + out.numel() * 2
    memory, upload = 2 * source.numel() / middle["memory"], blocks.numel() / middle["upload"]
    bound = max(middle["upload"], traffic / memory)
    return {
        "memory_GBs": memory / 1e9,
        "upload_GBs": upload / 1e9,
        "decode_ms": middle["decode"] * 1e3,
        "decode_GBs": traffic / middle["decode"] / 1e9,
        "of_memory": traffic / middle["decode"] / memory,
        "both_ms": middle["both"] * 1e3,
        "of_bound": bound / middle["both"],
    }


def main() -> int:
    """Print one Markdown row per type; 1 if Q4_0 misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--types", nargs="*", default=["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q5_0", "MXFP4"])
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if not torch.cuda.is_available() or not build_info()["with_cuda"]:
        sys.exit("gpu_decode: needs a CUDA device and a build with CUDA kernels")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.size}x{args.size} to bfloat16\n")
    print(
        "| type | memory, GB/s | decode, ms | GB/s | of memory | upload, GB/s | upload and decode, ms | of the bound |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    for name in args.types:
        r = found[name] = measure(Kind[name], args.size, args.rounds)
        print(
            f"| {name} | {r['memory_GBs']:.0f} | {r['decode_ms']:.3f} | {r['decode_GBs']:.0f} | {r['of_memory']:.0%} | "
            f"{r['upload_GBs']:.1f} | {r['both_ms']:.2f} | {r['of_bound']:.0%} |",
            flush=True,
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))
    reached = "Q4_0" not in found or min(found["Q4_0"]["of_memory"], found["Q4_0"]["of_bound"]) >= 0.6
    print(f"\nQ4_0 at 60% of both: {'yes' if reached else 'NO'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
