"""One training step of a square linear layer on a GPU, captured in CUDA graphs: LR-TT beside dense AdamW and LoRA.

    python benchmarks/gpu_step.py [--size 4096] [--samples 4096] [--rank 16] [--transfer-every 32]

Forward, backward and update under bf16 autocast, float32 weights, inputs U(-1, 1). The output gradients are 16 fresh draws
that a ring of 16 graphs runs through, so that A·B does not grow along one direction. Light pulses: gradients N(0, 1e-4²),
heavy: N(0, 0.1²). Times are medians of 7 windows of 32 steps each, so every window holds whole transfer cycles; all rows
come from one process on one GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, build_info, devices
from lightning_lrtt.nn import LRTTLinear

RING = 16
Step = Callable[[], None]


class LoRA(nn.Module):
    """``x W^T + (x A^T) B^T`` with W frozen: what peft's LoraLayer computes without dropout and scaling."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(size, size, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def make_steps(
    module: nn.Module, optimizer: torch.optim.Optimizer, size: int, samples: int, scale: float
) -> list[Step]:
    """One eager step per gradient of the ring."""
    x = (2 * torch.rand(samples, size, device="cuda") - 1).requires_grad_(True)
    steps = []
    for _ in range(RING):
        gradient = (scale * torch.randn(samples, size, device="cuda")).bfloat16()

        def step(gradient: torch.Tensor = gradient) -> None:
            optimizer.zero_grad()
            x.grad = None
            with torch.autocast("cuda", torch.bfloat16):
                y = module(x)
            y.backward(gradient)
            optimizer.step()

        steps.append(step)
    return steps


def milliseconds(steps: list[Step], windows: int = 7) -> float:
    """Median time of a captured step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps[:3]:
            step()
    torch.cuda.current_stream().wait_stream(side)
    pool, graphs = torch.cuda.graph_pool_handle(), []
    for step in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        graphs.append(graph)
    times = []
    for _ in range(windows + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for graph in graphs * 2:
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / (2 * RING))
    return statistics.median(times[1:])


def main() -> None:
    """Print one Markdown row per training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--transfer-every", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)

    def adamw(module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        trained = [p for p in module.parameters() if p.requires_grad]
        return module, torch.optim.AdamW(trained, lr=1e-3, fused=True, capturable=True)

    def lrtt(device: devices.Device | None) -> tuple[nn.Module, torch.optim.Optimizer]:
        config = LRTTConfig(
            rank=args.rank, transfer_every=args.transfer_every, fast_device=device, visible_device=device
        )
        module = LRTTLinear(args.size, args.size, bias=False, config=config, device="cuda")
        return module, LRTT(module.parameters(), lr=0.1)

    soft, quiet = devices.SoftBounds(), devices.SoftBounds(dw_min_std=0.0)
    rows: dict[str, tuple[Callable[[], tuple[nn.Module, torch.optim.Optimizer]], float]] = {
        "dense, fused AdamW": (lambda: adamw(nn.Linear(args.size, args.size, bias=False, device="cuda")), 1e-4),
        "LoRA, fused AdamW": (lambda: adamw(LoRA(args.size, args.rank).cuda()), 1e-4),
        "LR-TT digital": (lambda: lrtt(None), 1e-4),
        "LR-TT pulsed, light": (lambda: lrtt(soft), 1e-4),
        "LR-TT pulsed, light, no cycle-to-cycle noise": (lambda: lrtt(quiet), 1e-4),
        "LR-TT pulsed, heavy": (lambda: lrtt(soft), 0.1),
        "LR-TT pulsed, heavy, no cycle-to-cycle noise": (lambda: lrtt(quiet), 0.1),
    }
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {build_info()['cuda_architectures']}, "
        f"{args.size}x{args.size}, {args.samples} samples, r = {args.rank}, T = {args.transfer_every}\n"
    )
    print("| training | ms a step | / dense |\n|---|---|---|")
    dense = None
    for name, (build, scale) in rows.items():
        torch.cuda.empty_cache()
        module, optimizer = build()
        time = milliseconds(make_steps(module, optimizer, args.size, args.samples, scale))
        dense = dense or time
        print(f"| {name} | {time:.3f} | {time / dense:.2f} |", flush=True)
        del module, optimizer


if __name__ == "__main__":
    main()
