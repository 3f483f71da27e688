"""Which kind of progress bar a Trainer uses."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def bar_of(trainer: pl.Trainer) -> str | None:
    """``rich`` or ``tqdm``, on the first process of a Trainer with a progress bar; None otherwise."""
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero:
        return None
    return "rich" if isinstance(bar, RichProgressBar) else "tqdm"
