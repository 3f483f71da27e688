"""Devices and ranks side by side: one short run of the digits for each, a plot, and HParams in TensorBoard.

Usage, from the repository root:

    python examples/device_sweep/run.py                                   # about 14 runs of 10 epochs
    python examples/device_sweep/run.py --devices ecram reram_es --ranks 2 8 --seeds 2 --epochs 5

Every run is ``lrtt fit --config examples/device_sweep/config.yaml`` with another device under A, B and C, rank and seed;
``digital`` has no device. Writes ``logs/device_sweep/accuracy.png`` and ``accuracy.csv``; ``tensorboard --logdir
logs/device_sweep`` compares all runs under HParams.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lrtt import _check, presets
from lightning_lrtt._files import replacing
from lightning_lrtt.cli import LRTTCLI

log = logging.getLogger("lightning_lrtt.examples")
CONFIG = "examples/device_sweep/config.yaml"
DIGITAL = "digital"
DEVICES = (DIGITAL, "idealized", "capacitor", "ecram", "ecram_mo", "reram_sb", "reram_es")
COLUMNS = ("device", "rank", "seed", "val_acc", "test_acc")


def fit(device: str, rank: int, seed: int, args: Sequence[str] = ()) -> dict[str, Any]:
    """Train once.

    Args:
        device: Name of a preset, or ``digital``.
        rank: r.
        seed: Of everything.
        args: More options of ``lrtt fit``.

    Returns:
        A row of the table; accuracies between 0 and 1, of the epoch with the best validation accuracy.
    """
    key = "--trainer.strategy.init_args.config."
    words = [f"{key}rank={rank}", f"{key}seed={seed}", f"--seed_everything={seed}"]
    if device != DIGITAL:
        cell = presets.device(device)
        kind = f"{type(cell).__module__}.{type(cell).__name__}"
        for array in ("fast_device", "visible_device"):
            words.append(f"{key}{array}={_yaml(kind, cell)}")
    words.append(f"--trainer.logger.init_args.name={device}_r{rank}_s{seed}")
    cli = LRTTCLI(args=["fit", "--config", CONFIG, *words, *args])
    val = float(cli.trainer.checkpoint_callback.best_model_score)
    (tested,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path="best", verbose=False)
    row = dict(zip(COLUMNS, (device, rank, seed, val, tested["test/acc"]), strict=True))
    metrics = {"hp/val_acc": val, "hp/test_acc": row["test_acc"]}
    cli.trainer.logger.log_hyperparams({"device": device, "rank": rank, "seed": seed}, metrics)
    cli.trainer.logger.finalize("success")
    return row


def _yaml(kind: str, cell: Any) -> str:
    """A device as one word of the command line."""
    import json
    from dataclasses import asdict

    return json.dumps({"class_path": kind, "init_args": asdict(cell)})


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Test accuracy over the rank, one line for each device: the median of the seeds and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for device in dict.fromkeys(row["device"] for row in rows):
        found: dict[int, list[float]] = {}
        for row in rows:
            if row["device"] == device:
                found.setdefault(row["rank"], []).append(row["test_acc"])
        ranks = sorted(found)
        middle = [statistics.median(found[rank]) for rank in ranks]
        low = [m - min(found[rank]) for m, rank in zip(middle, ranks, strict=True)]
        high = [max(found[rank]) - m for m, rank in zip(middle, ranks, strict=True)]
        style = {"color": "black", "linestyle": "--"} if device == DIGITAL else {}
        axes.errorbar(ranks, middle, [low, high], marker="o", capsize=3, label=device, **style)
    axes.set(xlabel="rank r", ylabel="test accuracy", title="Digits, MLP 64-128-10", xscale="log")
    ticks = sorted({row["rank"] for row in rows})
    axes.set_xticks(ticks, [str(rank) for rank in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the sweep; the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=DEVICES, choices=(DIGITAL, *presets.DEVICES), metavar="NAME")
    parser.add_argument("--ranks", nargs="+", type=int, default=(2, 8))
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 (default: 1)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("logs/device_sweep"))
    parser.add_argument("rest", nargs="*", metavar="OPTION", help="after --, more options of `lrtt fit`")
    given = parser.parse_args(args)
    _check.integer("device_sweep", "--seeds", given.seeds, low=1)
    given.out.mkdir(parents=True, exist_ok=True)
    common = [f"--trainer.max_epochs={given.epochs}", f"--trainer.logger.init_args.save_dir={given.out}", *given.rest]
    rows = []
    for device, rank, seed in itertools.product(given.devices, given.ranks, range(given.seeds)):
        rows.append(fit(device, rank, seed, common))
        log.info("%s", ", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    with replacing(given.out / "accuracy.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, given.out / "accuracy.png")
    log.info("wrote %s and accuracy.csv; tensorboard --logdir %s", given.out / "accuracy.png", given.out)
    return rows


if __name__ == "__main__":
    if str(Path.cwd()) not in sys.path:  # a script's own folder is there, the examples' is not
        sys.path.append(str(Path.cwd()))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words, sys.argv = sys.argv[1:], sys.argv[:1]  # LightningCLI warns about words that it is not given
    main(words)
