"""Validation loss of the README autoencoder, digital and on tiles, over seeds: the table of docs/accuracy.md.

Every run is a configuration of examples/autoencoder with another seed (of the model, the order of the data, the devices
and the pulses); the loss is that of the last epoch.

    python benchmarks/autoencoder_loss.py
    python benchmarks/autoencoder_loss.py --names lrtt --scales 1000 2000 3000 4000 --first-seed 100 --seeds 3
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from pathlib import Path

import torch
import yaml

from lightning_lrtt import NonFiniteError
from lightning_lrtt.cli import LRTTCLI

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("plain", "lrtt", "pulsed")


def loss(name: str, seed: int, scale: float | None = None, epochs: int | None = None) -> float:
    """Train one configuration; its validation loss after the last epoch.

    Args:
        name: A configuration of examples/autoencoder.
        seed: Seed of everything.
        scale: ``tile_lr_scale`` in place of its own.
        epochs: In place of its own.
    """
    config = yaml.safe_load((ROOT / "examples" / "autoencoder" / f"{name}.yaml").read_text())
    trainer = config["trainer"]
    trainer |= {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [],
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "max_epochs": epochs or trainer["max_epochs"],
    }
    config["seed_everything"] = seed
    if "strategy" in trainer:
        settings = trainer["strategy"]["init_args"]
        settings["config"]["seed"] = seed
        settings["tile_lr_scale"] = scale or settings["tile_lr_scale"]
    try:
        cli = LRTTCLI(args={"subcommand": "fit", "fit": config}, save_config_callback=None)
    except NonFiniteError:
        return float("inf")
    return float(cli.trainer.callback_metrics["val/loss"])


def main() -> None:
    """Run all seeds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--scales", type=float, nargs="*", default=[None], help="tile_lr_scale instead of the file's")
    args = parser.parse_args()
    sys.path.append(str(ROOT))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print("| training | tile_lr_scale | median | min | max |\n|---|---|---|---|---|")
    for name in args.names:
        for scale in args.scales if name != "plain" else [None]:
            found = [loss(name, args.first_seed + i, scale) for i in range(args.seeds)]
            columns = [name, scale or "as given", *(f"{f(found):.5f}" for f in (statistics.median, min, max))]
            print("| " + " | ".join(map(str, columns)) + " |", flush=True)


if __name__ == "__main__":
    main()
