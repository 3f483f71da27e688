"""One row of scalars to all loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter


def now(trainer: Any) -> int:
    """The step of Lightning's own rows: batches that stepped, without the one in progress."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def after(trainer: Any) -> int:
    """The same between two steps: that of the last finished one."""
    return max(now(trainer) - 1, 0)


def writers(trainer: pl.Trainer) -> list[SummaryWriter]:
    """The writers of TensorBoard loggers; none in processes that do not log."""
    if not trainer.is_global_zero:
        return []
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [w for w in (logger.experiment for logger in loggers) if isinstance(w, SummaryWriter)]


def add_summary(writer: SummaryWriter, summary: Summary, step: int | None = None) -> None:
    """Write a finished summary; a writer that was closed opens a new file."""
    writer._get_file_writer().add_summary(summary, step)


def log_row(trainer: pl.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Log ``metrics``; in TensorBoard as one event, which costs the host much less than one event each."""
    if not metrics:
        return
    summary = None
    for logger in trainer.loggers:
        plain = type(logger) is TensorBoardLogger and not logger._prefix and "log_metrics" not in vars(logger)
        if not (plain and isinstance(writer := getattr(logger, "experiment", None), SummaryWriter)):
            logger.log_metrics(dict(metrics), step=step)
            continue
        if summary is None:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()])
        add_summary(writer, summary, step)
