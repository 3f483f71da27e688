"""T9 of ``lrtt_ddp``: one digest on 1, 2 and 4 GPUs, the step time against plain DDP on 2, and the tree kernel.

Usage, one call of less than 150 s:      python benchmarks/segments_gpu.py --json out.json [--workers 1 2 4]
The same on CPU cores, small and gloo:   python benchmarks/segments_gpu.py --device cpu --workers 1 2

Every count is one group of processes that runs all models. Each result is printed (and written to ``--json``) as it comes;
a group that is not done in time is ended, says where it hung, and the next one starts. Exit status 1 if digests differ, a
group failed, or on two GPUs a step takes more than 1.10 times plain DDP's.

Step times: mean of the steps after the first four, between two synchronisations of the device; ``ddp`` is Lightning's DDP
as it comes, ``ddp_deterministic`` the same with deterministic algorithms, which ``lrtt_ddp`` always uses; both have the same
tiles. Fits are interleaved; the ratio is the median over rounds. Rows come in one index operation, so that loading, the
same for both, is not what is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset
from worker_group import GroupError, group

from lightning_lrtt import LRTTConfig, LRTTDDPStrategy, convert_to_lrtt, devices

SOFT = devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0)
PULSED = LRTTConfig(rank=4, transfer_every=3, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT)
DIGITAL = LRTTConfig(rank=8, transfer_every=4)
BOUND = 1.10  # of plain DDP's step on 2 GPUs
WARM = 4  # steps that are not timed: self-test, autotuning, the allocator's growth


class Clock(Callback):
    """Seconds a step, from the end of step `WARM` to the end of the last, with the device finished at both."""

    def __init__(self, steps: int) -> None:
        self.steps, self.ms = steps, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """One more."""
        if trainer.global_step in (min(WARM, self.steps - 1), self.steps):
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if trainer.global_step == self.steps:
                self.ms = 1e3 * (now - self.start) / (self.steps - min(WARM, self.steps - 1))
            self.start = now


class Block(nn.Module):
    """A transformer with dropout on ``[rows, tokens]`` of a vocabulary of 256."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the mean token."""
        x = self.embedding(x.long())
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def network(name: str, big: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and one sample's shape; ``big``: enough work in 64 rows for a GPU to be busy."""
    if name == "conv":
        width, depth = (256, 5) if big else (32, 3)

        def stage(a: int, b: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1, stride=stride), nn.BatchNorm2d(b), nn.ReLU()]

        body = stage(3, width, 1 if big else 2)
        for _ in range(depth - 1):
            body += stage(width, width, 1 if big else 2)
        side = 32 if big else 4
        return nn.Sequential(*body, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(width * (side // 4) ** 2, 10)), (3, 32, 32)
    if name == "transformer":
        return (Block(512, 4), (128,)) if big else (Block(128, 2), (16,))
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10)), (256,)


class Model(pl.LightningModule):
    """Classification of noise."""

    def __init__(self, name: str, big: bool = False) -> None:
        super().__init__()
        self.net, self.shape = network(name, big)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Rows(Dataset[Any]):
    """Noise and labels; many rows at once."""

    def __init__(self, rows: int, shape: tuple[int, ...], tokens: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, *shape, generator=generator)
        if tokens:
            self.x = (self.x.abs() * 64).clamp_max(255).to(torch.uint8)
        self.y = torch.randint(10, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Any:
        return self.x[row], self.y[row]

    def __getitems__(self, rows: list[int]) -> Any:
        return self.x[rows], self.y[rows]


def same(batch: Any) -> Any:
    """Batches come collated."""
    return batch


def digest(module: nn.Module) -> str:
    """Of parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("_extra_state"):
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def train(
    name: str,
    config: LRTTConfig | None,
    workers: int,
    device: str,
    rows: int,
    steps: int,
    how: str = "lrtt_ddp",
    big: bool = False,
    callbacks: list[Callback] | None = None,
    exchange: str | None = None,
) -> dict[str, Any]:
    """One fit in this worker; ``how``: lrtt_ddp, or Lightning's DDP with a share of the batch for each worker."""
    warnings.simplefilter("ignore")
    pl.seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    model, clock, batch = Model(name, big), Clock(steps), 12 * rows
    plain = how != "lrtt_ddp"
    if plain:
        if config is not None:
            convert_to_lrtt(model, config)
        strategy: Any = DDPStrategy()
    else:
        # Collectives also on CPU cores, as on GPUs.
        strategy = LRTTDDPStrategy(
            config=config, timeout=60, exclude=None if config else ["*"], exchange=exchange or "collectives"
        )
    loader = DataLoader(
        Rows(2 * batch, model.shape, name == "transformer"),
        batch_size=batch // workers if plain else batch,
        drop_last=True,
        collate_fn=same,
        pin_memory=device == "cuda",
    )
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=workers,
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        deterministic=True if how == "ddp_deterministic" else None,
        callbacks=[clock, *(callbacks or [])],
    )
    try:
        trainer.fit(model, loader)
    finally:
        torch.use_deterministic_algorithms(False)  # Lightning leaves it on
    return {
        "model": name,
        "tiles": "none" if config is None else "pulsed" if config.is_pulsed else "digital",
        "workers": workers,
        "strategy": how,
        "digest": digest(model),
        "ms": round(clock.ms, 3),
    }


CASES = [
    ("mlp", None),
    ("conv", None),
    ("transformer", None),
    ("mlp", DIGITAL),
    ("conv", DIGITAL),
    ("mlp", PULSED),
    ("conv", PULSED),
    ("transformer", PULSED),
]


def digests(rank: int, workers: int, device: str) -> Iterator[dict[str, Any]]:
    """All cases of one worker."""
    for name, config in CASES:
        yield train(name, config, workers, device, rows=8, steps=8)


def timings(rank: int, workers: int, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Step times of one worker, 64 rows a segment on GPUs."""
    big = device == "cuda"
    for round_ in range(rounds):
        for name in ("transformer", "conv"):
            for how in ("ddp", "lrtt_ddp", "ddp_deterministic"):
                rows, steps = (64, 16) if big else (8, 6)  # on CPU cores only to see that it runs
                yield train(name, DIGITAL, workers, device, rows, steps, how, big) | {"round": round_}


def tree_kernel(sizes: tuple[int, ...], device: str) -> Iterator[dict[str, Any]]:
    """Median ms of the fused kernel (sum alone, and with norms and flags), of zero + 12 adds + scale, and of a copy.

    Runs are paired: all four after each other, the median of their ratios; short ones are repeated to about 2 ms.
    """
    from lightning_lrtt.strategies.tree import sum_program, tree

    program = sum_program((tree(12),))
    for size in sizes:
        slots = [torch.randn(size, device=device) for _ in range(12)]
        out, target = torch.empty(size, device=device), torch.empty(size, device=device)
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        ones, scale = torch.ones(12, **options), torch.full((1,), 1 / 12, **options)
        stats, none = torch.zeros(12, 2, **options), torch.zeros(0, **options)

        def adds(out: Any = out, slots: Any = slots) -> None:
            out.zero_()
            for slot in slots:
                out.add_(slot)
            out.mul_(1 / 12)

        def fused(want: Any, out: Any = out, slots: Any = slots, ones: Any = ones, scale: Any = scale) -> None:
            torch.ops.lrtt.segment_sum_([out], slots, ones, scale, want, program, False)

        runs: dict[str, Any] = {
            "fused": lambda none=none: fused(none),
            "fused_with_norms": lambda stats=stats: fused(stats),
            "torch": adds,
            "copy": lambda target=target, slots=slots: target.copy_(slots[0]),
        }
        repeats = max(1, 2_000_000 // size)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(16):
            for name, function in runs.items():
                _finish(device)
                start = time.perf_counter()
                for _ in range(repeats):
                    function()
                _finish(device)
                times[name].append(1e3 * (time.perf_counter() - start) / repeats)
        times = {name: t[1:] for name, t in times.items()}
        yield {
            "floats": size,
            "device": device,
            "kernel_ms": {name: round(statistics.median(t), 4) for name, t in times.items()},
            "torch_over": {
                name: round(statistics.median(a / b for a, b in zip(times["torch"], times[name], strict=True)), 2)
                for name in ("fused", "fused_with_norms")
            },
        }


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kernels(rank: int, workers: int, device: str) -> Iterator[dict[str, Any]]:
    """The tree kernel on one device: small, in L2, in memory."""
    yield from tree_kernel((4_096, 1_000_000, 30_000_000) if device == "cuda" else (4_096, 16_384, 4_000_000), device)


class Report:
    """Prints each result and keeps the file complete.

    Args:
        path: JSON file; None: print only.
    """

    def __init__(self, path: str | None) -> None:
        self.path, self.lines, self.start = path, list[dict[str, Any]](), time.monotonic()

    def add(self, line: dict[str, Any]) -> None:
        """One more."""
        self.lines.append(line | {"at_s": round(time.monotonic() - self.start, 1)})
        sys.stdout.write(json.dumps(self.lines[-1]) + "\n")
        sys.stdout.flush()
        if self.path:
            Path(self.path).write_text(json.dumps(self.lines, indent=1))

    def left(self, budget: float) -> float:
        """Seconds of the budget."""
        return budget - (time.monotonic() - self.start)


def main() -> None:
    """All counts; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--workers", type=int, nargs="+", help="counts; default: 1, 2, 4 as far as there are GPUs")
    parser.add_argument("--rounds", type=int, default=2, help="of step times; 0: none")
    parser.add_argument("--budget", type=float, default=125.0, help="seconds for everything after the imports")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    counts = args.workers or [n for n in (1, 2, 4) if args.device == "cpu" or n <= torch.cuda.device_count()]
    report, failed, seen = Report(args.json), list[str](), dict[tuple[str, str], dict[str, set[str]]]()

    def collect(workers: int, limit: float, job: Any, *job_args: Any) -> list[tuple[int, dict[str, Any]]]:
        results = []
        try:
            for rank, value in group(workers, job, *job_args, limit=max(min(limit, report.left(args.budget)), 4.0)):
                results.append((rank, value))
                if rank == 0 and job is not digests:
                    report.add(value)
                elif job is digests:
                    case = seen.setdefault((value["model"], value["tiles"]), {})
                    case.setdefault(value["digest"], set()).add(f"{rank}/{workers}")
                    if rank == 0:
                        report.add(value | {"same_so_far": len(case) == 1})
        except GroupError as error:
            failed.append(str(error))
            report.add({"error": str(error)})
        return results

    for workers in sorted(counts, reverse=True):  # the count that most can go wrong with first
        collect(workers, 60.0, digests, args.device)
    for (name, tiles), found in seen.items():
        who = {d: sorted(w, key=lambda t: t.split("/")[::-1]) for d, w in found.items()}
        report.add({"T9": name, "tiles": tiles, "one_digest": len(found) == 1, "digests": who})
        if len(found) != 1:
            failed.append(f"{name} ({tiles}): {len(found)} digests")
    collect(1, 30.0, kernels, args.device)
    if 2 in counts and args.rounds:
        workers = 2
        got = [v for rank, v in collect(workers, 60.0, timings, args.device, args.rounds) if rank == 0]
        for name in ("transformer", "conv"):
            ms = {h: [v["ms"] for v in got if (v["model"], v["strategy"]) == (name, h)] for h in HOWS}
            if not all(ms.values()):
                continue
            ratio = {
                h: round(statistics.median(a / b for a, b in zip(ms["lrtt_ddp"], ms[h], strict=False)), 3)
                for h in HOWS[1:]
            }
            report.add({"step": name, "workers": workers, "ms": ms, "lrtt_ddp_over": ratio, "bound": BOUND})
            if args.device == "cuda" and workers == 2 and ratio["ddp"] > BOUND:
                failed.append(f"{name}: a step takes {ratio['ddp']} times plain DDP's")
    report.add({"failed": failed})
    sys.exit(bool(failed))


HOWS = ("lrtt_ddp", "ddp", "ddp_deterministic")

if __name__ == "__main__":
    main()
