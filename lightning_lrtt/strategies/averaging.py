"""Lightning's averaging callbacks on models with tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_lrtt.nn.average import average_effective_weights, effective_weights


def averaged_copies(callbacks: Sequence[Any]) -> list[nn.Module]:
    """The copies that averaging callbacks made of the model."""
    copies = []
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            copies.append(callback._average_model.module)
        elif isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            copies.append(callback._average_model)
    return copies


def average_by_effective_weights(callbacks: Sequence[Any]) -> Callable[[], None]:
    """Let averaging callbacks average effective weights.

    Returns:
        What undoes it.
    """
    changed = []
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average_effective_weights(callback._average_model)  # the copy is thrown away with the fit
        elif isinstance(callback, StochasticWeightAveraging) and "update_parameters" not in callback.__dict__:
            update = partial(_update, callback.update_parameters)
            callback.update_parameters = update  # type: ignore[method-assign]  # of this instance only
            changed.append(callback)

    def undo() -> None:
        for callback in changed:
            callback.__dict__.pop("update_parameters", None)

    return undo


def _update(
    update: Callable[..., None],
    average_model: pl.LightningModule,
    model: pl.LightningModule,
    n_averaged: Tensor,
    avg_fn: Callable[..., Tensor],
) -> None:
    with effective_weights(average_model, model):
        update(average_model, model, n_averaged, avg_fn)
