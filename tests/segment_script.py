"""What torchrun starts in test_segmented.py: trains, is killed once, and goes on from the last checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import segment_jobs as jobs

folder = Path(sys.argv[1])


def dies_once(model: pl.LightningModule) -> None:
    """kill -9 of worker 1 in the middle of the run, the first time."""
    marker = folder / "killed"
    if model.trainer.global_rank == 1 and model.trainer.global_step == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    last = folder / "last.ckpt"
    result = jobs.fit(
        2,
        "mlp",
        jobs.PULSED,
        trouble=dies_once,
        resume=str(last) if last.exists() else None,
        trainer=jobs.keep_all(folder),
    )
    if int(os.environ["RANK"]) == 0:
        (folder / "digest").write_text(result["digest"])
