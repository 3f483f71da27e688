"""One digest on 1, 2 and 4 GPUs, and the step time against plain DDP at the same worker count.

Usage (one call, under two minutes on H200s):  python benchmarks/segments_gpu.py --json out.json

Forks nothing and imports once per worker: every count is one group of spawned processes that runs all models. Prints one
JSON line for each result; exit status 1 if digests differ. The tree kernel is timed by `run.py --op tree`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTTConfig, LRTTDDPStrategy, convert_to_lrtt, devices

SOFT = devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0)
PULSED = LRTTConfig(rank=4, transfer_every=3, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT)
DIGITAL = LRTTConfig(rank=8, transfer_every=4)


class Steps(Callback):
    """Seconds of each step, from the end of one to the end of the next, with the device finished."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """One more."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if hasattr(self, "last"):
            self.seconds.append(now - self.last)
        self.last = now


class Block(nn.Module):
    """A transformer with dropout on ``[rows, tokens, width]``."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the mean token."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and one sample's shape."""
    if name == "conv":

        def stage(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1, stride=2), nn.BatchNorm2d(b), nn.ReLU()]

        return nn.Sequential(*stage(3, 32), *stage(32, 64), *stage(64, 64), nn.Flatten(), nn.Linear(64 * 16, 10)), (
            3,
            32,
            32,
        )
    if name == "transformer":
        return Block(128, 2), (16, 128)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10)), (256,)


class Model(pl.LightningModule):
    """Classification of Gaussian noise."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net, self.shape = network(name)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def digest(module: nn.Module) -> str:
    """Of parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("_extra_state"):
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def train(
    name: str, config: LRTTConfig | None, workers: int, accelerator: str, rows: int, steps: int, plain: bool = False
) -> dict[str, Any]:
    """One fit in this worker; ``plain``: with Lightning's DDP, each worker a share of the batch."""
    warnings.simplefilter("ignore")
    pl.seed_everything(1, verbose=False)
    model, clock, batch = Model(name), Steps(), 12 * rows
    if plain:
        if config is not None:
            convert_to_lrtt(model, config)
        strategy: Any = DDPStrategy()
    else:
        strategy = LRTTDDPStrategy(config=config, timeout=60) if config else LRTTDDPStrategy(exclude=["*"], timeout=60)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(2 * batch, *model.shape, generator=generator), torch.randint(10, (2 * batch,), generator=generator)
    )
    loader = DataLoader(data, batch_size=batch // workers if plain else batch, drop_last=True)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=workers,
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(model, loader)
    return {
        "model": name,
        "tiles": "none" if config is None else "pulsed" if config.is_pulsed else "digital",
        "workers": workers,
        "strategy": "ddp" if plain else "lrtt_ddp",
        "digest": digest(model),
        "ms": 1e3 * statistics.median(clock.seconds[len(clock.seconds) // 3 :]),
    }


CASES = [
    ("mlp", None),
    ("conv", None),
    ("transformer", None),
    ("mlp", DIGITAL),
    ("mlp", PULSED),
    ("conv", PULSED),
    ("transformer", PULSED),
]


def work(rank: int, workers: int, port: int, accelerator: str, rows: int, steps: int, folder: str) -> None:
    """All cases of one worker."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    results = [train(name, config, workers, accelerator, rows, steps) for name, config in CASES]
    for _ in range(2):  # interleaved, the better of the two medians each
        for name in ("conv", "transformer"):
            for plain in (True, False):
                results.append(train(name, DIGITAL, workers, accelerator, 64, 20, plain) | {"timing": True})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    (Path(folder) / f"{workers}.{rank}.json").write_text(json.dumps(results))


def main() -> None:
    """All counts; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--workers", type=int, nargs="*", help="counts; default: 1, 2, 4 as far as there are GPUs")
    parser.add_argument("--rows", type=int, default=8, help="of a segment, for the digests")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", default="/tmp/segments_gpu")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    counts = args.workers or [n for n in (1, 2, 4) if n <= torch.cuda.device_count()]
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for workers in counts:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(
            work, (workers, port, args.accelerator, args.rows, args.steps, args.folder), nprocs=workers
        )
        for rank in range(workers):
            results += json.loads((Path(args.folder) / f"{workers}.{rank}.json").read_text())
    failed = False
    out = sys.stdout.write
    for name, config in CASES:
        tiles = "none" if config is None else "pulsed" if config.is_pulsed else "digital"
        seen = {r["digest"] for r in results if r.get("model") == name and r["tiles"] == tiles and "timing" not in r}
        failed |= len(seen) != 1
        out(
            json.dumps(
                {"model": name, "tiles": tiles, "workers": counts, "digests": sorted(seen), "same": len(seen) == 1}
            )
            + "\n"
        )
    for workers in counts:
        for name in ("conv", "transformer"):
            ms = {
                s: min(
                    r["ms"]
                    for r in results
                    if r.get("timing") and (r["model"], r["workers"], r["strategy"]) == (name, workers, s)
                )
                for s in ("ddp", "lrtt_ddp")
            }
            out(
                json.dumps({"model": name, "workers": workers, "ms": ms, "ratio": round(ms["lrtt_ddp"] / ms["ddp"], 3)})
                + "\n"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(results))
    sys.exit(failed)


if __name__ == "__main__":
    main()
