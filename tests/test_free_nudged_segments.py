"""Two-phase learning under ``lrtt_ddp``: the same bits for any number of workers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from segment_jobs import DIGITAL, PULSED, digest, run
from torch.utils.data import DataLoader, TensorDataset

from lightning_lrtt import LRTTConfig, LRTTDDPStrategy
from lightning_lrtt.free_nudged import Estimator, FreeNudgedModule, HopfieldMLP
from lightning_lrtt.nn import find_tiles


class Module(FreeNudgedModule):
    """Three classes, SGD."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def fit(workers: int, config: LRTTConfig | None, estimator: str) -> dict[str, Any]:
    """Two epochs of four steps in this process, one of ``workers``."""
    pl.seed_everything(3, verbose=False)
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(2))
    module = Module(HopfieldMLP([6, 8, 3]), estimator=Estimator(kind=estimator), free_steps=8, nudged_steps=4)
    before = digest(module)
    options: dict[str, Any] = {"exclude": ["*"]} if config is None else {"config": config}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=workers,
        strategy=LRTTDDPStrategy(**options, timeout=600.0, verify_every=3),
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=24, shuffle=True))
    return {
        "digest": digest(module),
        "moved": digest(module) != before,
        "tiles": len(find_tiles(module)),
        "pulses": sum(tile.counts()["pulses_a"] for tile in find_tiles(module).values()),
    }


@pytest.mark.parametrize("estimator", ["centered", "random_sign"])
@pytest.mark.parametrize("config", [None, DIGITAL, PULSED], ids=["plain", "digital", "pulsed"])
def test_one_digest(config: LRTTConfig | None, estimator: str) -> None:
    """1, 2 and 3 workers, on plain weights and on tiles, whose phases latch operands of every segment."""
    found = [result for workers in (1, 2, 3) for result in run(workers, fit, config, estimator)]
    assert len({result["digest"] for result in found}) == 1
    assert all(result["moved"] for result in found)
    assert all(result["tiles"] == (0 if config is None else 2) for result in found)
    assert all((result["pulses"] > 0) == (config is PULSED) for result in found)
