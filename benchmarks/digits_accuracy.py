"""Test accuracy on the digits of plain training, LR-TT and pulsed SGD, over seeds: the table of docs/accuracy.md.

Every run is a configuration of examples/digits with another seed (of the model, the order of the data, the devices and
the pulses) and, where ``--search`` is given, the lr of the grid with the best validation accuracy. The test set plays
no part in choosing anything.

    python benchmarks/digits_accuracy.py                 # the settings found, 5 seeds
    python benchmarks/digits_accuracy.py --search        # first the same search over lr for every row
    python benchmarks/digits_accuracy.py --precision bf16-mixed
    python benchmarks/digits_accuracy.py --presets --seeds 3    # pulsed.yaml on the devices of every preset
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_lrtt import LRTT, LRTTConfig, LRTTStrategy, NonFiniteError, presets
from lightning_lrtt.cli import LRTTCLI
from lightning_lrtt.nn import TileModule
from lightning_lrtt.nn.identity import describe
from lightning_lrtt.ops import STEP, C
from lightning_lrtt.ops.schema import BLOCK_SAMPLES

ROOT = Path(__file__).resolve().parent.parent
GRID = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
SEARCH_SEEDS = (100, 101, 102, 103, 104)  # none of the seeds that are reported


class PulsedSGD(LRTT):
    """SGD whose weight updates go straight to the device of C, as pulses: A = B = 0 and nothing is transferred."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for tile, _ in self.tiles():
            tile.A.data.zero_()
            tile.B.data.zero_()

    def _step_tiles(self, members: list[tuple[TileModule, int]], device: torch.device) -> None:
        for tile, group in members:
            eta = torch.tensor(self.param_groups[group]["lr"], dtype=torch.float32, device=device)
            first = 0
            for call in tile.latch.merged():
                d = tile.samples(call.d)
                for offset, x in tile.patches(call.x):
                    self._pulse_visible(tile, x, d[offset : offset + x.shape[0]], eta, first + offset)
                first += -(-d.shape[0] // BLOCK_SAMPLES) * BLOCK_SAMPLES
            tile.tile_state[STEP] += 1

    @staticmethod
    def _pulse_visible(tile: TileModule, x: Tensor, d: Tensor, eta: Tensor, first: int) -> None:
        torch.ops.lrtt.pulsed_update_(
            [tile.matrix],
            [x],
            [d],
            [eta],
            [tile.tile_state],
            [tile.tile_counts],
            [tile.hyper],
            [C],
            [first],
            tile.cells(C),
        )


class PulsedSGDStrategy(LRTTStrategy):
    """The strategy ``lrtt`` with `PulsedSGD` in place of LR-TT: same tiles, same devices, same draws of their cells."""

    def _wrap(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return PulsedSGD(digital=optimizer)


# label: configuration; strategy and lr in place of its own
ROWS: dict[str, tuple[str, type[LRTTStrategy] | None, float | None]] = {
    "plain SGD": ("plain.yaml", None, None),
    "LR-TT, digital, r = 8": ("config.yaml", None, None),
    "LR-TT, pulsed, r = 8": ("pulsed.yaml", None, None),
    "pulsed SGD, same device": ("pulsed.yaml", PulsedSGDStrategy, 0.2),
}


def run(row: str, seed: int, lr: float | None, args: argparse.Namespace, stage: str, folder: str) -> float:
    """Train one configuration; accuracy of its best checkpoint on the validation set or the test set."""
    preset = row.removeprefix("LR-TT on ") if row not in ROWS else None
    file, strategy, own_lr = ROWS["LR-TT, pulsed, r = 8" if preset else row]
    config = yaml.safe_load((ROOT / "examples" / "digits" / file).read_text())
    trainer = config["trainer"]
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint")]
    trainer |= {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "precision": args.precision,
    }
    config |= {"seed_everything": seed, "test_after_fit": stage == "test"}
    if "strategy" in trainer:
        trainer["strategy"]["init_args"]["config"]["seed"] = seed
    if preset:
        device = describe(LRTTConfig(fast_device=presets.device(preset)))["fast_device"]
        trainer["strategy"]["init_args"]["config"] |= {"fast_device": device, "visible_device": device}
    if strategy is not None:
        trainer["strategy"]["class_path"] = f"{strategy.__module__}.{strategy.__qualname__}"
    config["model"]["init_args"]["lr"] = lr or own_lr or config["model"]["init_args"]["lr"]
    if args.epochs is not None:
        trainer["max_epochs"] = args.epochs
    try:
        cli = LRTTCLI(args={"subcommand": "fit", "fit": config}, save_config_callback=None)
    except NonFiniteError:
        return 0.0  # diverged
    if stage == "val":
        return float(cli.trainer.checkpoint_callback.best_model_score)
    return float(cli.trainer.callback_metrics["test/acc"])


def main() -> None:
    """Search if asked, run all seeds, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument(
        "--presets",
        nargs="*",
        default=None,
        choices=list(presets.DEVICES),
        metavar="NAME",
        help="instead of --rows, A, B and C on the devices of these presets; without names: of all",
    )
    parser.add_argument("--search", action="store_true", help="choose lr from the grid by validation accuracy first")
    parser.add_argument("--precision", default="32-true", help="of the Trainer")
    parser.add_argument("--epochs", type=int, default=None, help="instead of the configurations' own")
    parser.add_argument("--output", type=Path, default=None, help="also write the table here")
    args = parser.parse_args()
    if args.presets is not None:
        args.rows = [f"LR-TT on {name}" for name in args.presets or presets.DEVICES]
    sys.path.append(str(ROOT))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    lines = ["| training | lr | median | min | max | seconds per run |", "|---|---|---|---|---|---|"]
    grid = ["| training | " + " | ".join(f"lr {lr}" for lr in GRID) + " |", "|---" * (len(GRID) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for row in args.rows:
            lr = None
            if args.search:
                found = [statistics.mean(run(row, seed, x, args, "val", folder) for seed in SEARCH_SEEDS) for x in GRID]
                lr = GRID[found.index(max(found))]
                grid.append(f"| {row} | " + " | ".join(f"{x:.4f}" for x in found) + " |")
                print(grid[-1], flush=True)
            start = time.perf_counter()
            scores = [run(row, seed, lr, args, "test", folder) for seed in range(args.seeds)]
            seconds = (time.perf_counter() - start) / args.seeds
            middle, low, high = statistics.median(scores), min(scores), max(scores)
            lines.append(f"| {row} | {lr or 'as given'} | {middle:.4f} | {low:.4f} | {high:.4f} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    tables = ["Test accuracy:", "", *lines]
    if args.search:
        tables += ["", f"Validation accuracy (mean of seeds {SEARCH_SEEDS}):", "", *grid]
    print("\n".join(tables))
    if args.output is not None:
        args.output.write_text("\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
