"""A classifier of small images: an ordinary LightningModule."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from typing_extensions import override

from examples.digits.model import DigitsClassifier

_SHAPES = {"mnist": (1, 28), "cifar10": (3, 32)}


class VisionClassifier(DigitsClassifier):
    """`DigitsClassifier` for MNIST or CIFAR-10.

    Args:
        dataset: ``mnist`` or ``cifar10``: the shape of the images.
        arch: ``mlp`` (two hidden layers) or ``convnet`` (three convolutions and a linear layer).
        hidden: Width of the first hidden layer, or channels of the last convolution.
        lr: Learning rate of the default optimizer.
    """

    def __init__(
        self,
        dataset: Literal["mnist", "cifar10"] = "mnist",
        arch: Literal["mlp", "convnet"] = "mlp",
        hidden: int = 256,
        lr: float = 0.05,
    ) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        channels, size = _SHAPES[dataset]
        self.net = _mlp(channels * size * size, hidden) if arch == "mlp" else _convnet(channels, size, hidden)

    @override
    def predict_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0]).argmax(1)


def _mlp(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden // 2),
        nn.ReLU(),
        nn.Linear(hidden // 2, 10),
    )


def _convnet(channels: int, size: int, hidden: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, hidden // 4), (hidden // 4, hidden // 2), (hidden // 2, hidden)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden * (size // 8) ** 2, 10))
