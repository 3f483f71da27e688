"""Test accuracy of aihwkit's TTv2 on the digits, for orientation beside LR-TT on the same devices (docs/accuracy.md).

    aihw/bin/python benchmarks/ttv2_digits.py [ecram_mo reram_es ...] [--seeds 3]

Runs in an environment that has aihwkit and scikit-learn, not this package (`tests/peers/aihwkit_statistics.py` tells how
to build it). Data, split, model, batch size, epochs and lr are those of examples/digits/pulsed.yaml; reads are exact,
biases digital; everything else of TTv2 is the preset's. The accuracy is that after the last epoch.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from aihwkit.nn import AnalogLinear, AnalogSequential
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.presets import configs
from sklearn.datasets import load_digits
from torch import nn

PRESETS = {
    "capacitor": "TTv2CapacitorPreset",
    "ecram": "TTv2EcRamPreset",
    "ecram_mo": "TTv2EcRamMOPreset",
    "reram_es": "TTv2ReRamESPreset",
    "reram_sb": "TTv2ReRamSBPreset",
    "idealized": "TTv2IdealizedPreset",
}


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Training and test part: the split of examples/digits/data.py."""
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).flatten(1) / 16.0
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, _val, train = order.split([360, 240, len(labels) - 600])
    images = images - images[train].mean(0)
    images = images / images[train].std()
    return (images[train], labels[train]), (images[test], labels[test])


def accuracy(preset: str, seed: int, epochs: int = 30, batch: int = 16, lr: float = 0.1) -> float:
    """Of one run."""
    torch.manual_seed(seed)
    config = getattr(configs, PRESETS[preset])()
    config.forward.is_perfect = config.backward.is_perfect = True
    config.mapping.digital_bias = True
    layers = [AnalogLinear(64, 128, rpu_config=config), nn.ReLU(), AnalogLinear(128, 10, rpu_config=config)]
    model = AnalogSequential(*layers)
    optimizer = AnalogSGD(model.parameters(), lr=lr)
    optimizer.regroup_param_groups(model)
    (x, y), (test_x, test_y) = digits()
    for _ in range(epochs):
        order = torch.randperm(len(y))
        for part in order[: len(y) // batch * batch].split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="preset")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print("| TTv2 on | median | min | max | s a run |\n|---|---|---|---|---|")
    for preset in args.presets:
        start = time.perf_counter()
        values = [accuracy(preset, seed) for seed in range(args.seeds)]
        seconds = (time.perf_counter() - start) / args.seeds
        print(
            f"| {preset} | {statistics.median(values):.4f} | {min(values):.4f} | {max(values):.4f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
