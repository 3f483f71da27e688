"""What the segmented strategy does not train, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn import SyncBatchNorm

if TYPE_CHECKING:
    from lightning_lrtt.strategies.ddp import LRTTDDPStrategy


def refuse(strategy: LRTTDDPStrategy, trainer: pl.Trainer) -> None:
    """Check a Trainer before any work.

    Raises:
        MisconfigurationException: For what would change the bits with the number of workers.
    """
    module = trainer.lightning_module
    if trainer.accumulate_grad_batches != 1:
        raise _error(
            "accumulate_grad_batches",
            "1",
            trainer.accumulate_grad_batches,
            "a batch is cut into segments anyway: use a larger batch_size, or segments=144",
        )
    if not module.automatic_optimization:
        raise _error("optimization", "automatic", "manual", "the strategy runs backward itself, once for each segment")
    if strategy._layer_sync is not None or any(isinstance(m, SyncBatchNorm) for m in module.modules()):
        raise _error(
            "sync_batchnorm",
            "off",
            "on",
            "statistics are those of a segment, and running statistics are reduced along the tree",
        )
    if isinstance(strategy.precision_plugin, MixedPrecision) and strategy.precision_plugin.scaler is not None:
        raise _error(
            "precision",
            "'32-true', '64-true' or 'bf16-mixed'",
            strategy.precision_plugin.precision,
            "a gradient scaler makes infinities on purpose, which nonfinite= would take for errors",
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise _error("training_step", "one that takes a batch", "dataloader_iter", "batches come as segments")


def _error(name: str, rule: str, value: object, remedy: str) -> MisconfigurationException:
    return MisconfigurationException(f"LRTTDDPStrategy: {name} must be {rule}, got {value}; {remedy}")
