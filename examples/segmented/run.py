"""One digest for 1, 2, 3 and 5 workers.

Usage, from the repository root:  python examples/segmented/run.py [--workers 1 2 3 5] [--epochs 2]

Trains examples/digits/segmented.yaml with each number of workers and prints the SHA-256 of the last checkpoint's state_dict;
exit status 1 if they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def digest(checkpoint: Path) -> str:
    """SHA-256 of every tensor of the state_dict, by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(torch.load(checkpoint, weights_only=True)["state_dict"].items()):
        sha.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def train(workers: int, epochs: int, folder: str) -> str:
    """Fit in new processes; return the digest of the result."""
    command = [
        sys.executable,
        "-m",
        "lightning_lrtt.cli",
        "fit",
        "--config",
        "examples/digits/segmented.yaml",
        f"--trainer.devices={workers}",
        f"--trainer.max_epochs={epochs}",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.enable_progress_bar=false",
        "--test_after_fit=false",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return digest(next(Path(folder).glob("segmented/version_0/checkpoints/last.ckpt")))


def main() -> None:
    """Print one line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    seen = set()
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            seen.add(result := train(workers, args.epochs, folder))
            sys.stdout.write(
                f"{workers} worker{'s' if workers > 1 else ' '}  {result}  {time.monotonic() - start:.0f} s\n"
            )
            sys.stdout.flush()
    sys.exit(len(seen) != 1)


if __name__ == "__main__":
    main()
