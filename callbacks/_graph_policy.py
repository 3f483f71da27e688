"""What keeps a whole training step from being recorded, found before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_lrtt import LRTT
from lightning_lrtt.graphs import DeviceForm
from lightning_lrtt.graphs.finder import of_the_user, read_argument
from lightning_lrtt.strategies.seams import ExecutorSeams

# Hooks that run inside a step: in a graph their Python would run once, at the capture, and never again.
_IN_STEP = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


def silent_hooks(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """Hooks of the module and of callbacks that would go silent, by name."""
    found = [f"{type(module).__name__}.{hook}" for hook in _IN_STEP if is_overridden(hook, module)]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        found += [f"{type(callback).__name__}.{hook}" for hook in _IN_STEP if is_overridden(hook, callback)]
    return found


def most_accumulated(trainer: pl.Trainer) -> int:
    """Micro-batches of the longest window of the run; `GradientAccumulationScheduler` may make later ones longer."""
    longest = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, GradientAccumulationScheduler):
            longest = max(longest, *callback.scheduling.values())
    return max(longest, 1)


def hooks_of_the_user(modules: Mapping[str, nn.Module]) -> list[str]:
    """Hooks registered on modules and parameters, from outside the libraries, that would go silent, by place."""
    found = []
    for name, module in modules.items():
        for kind in ("forward_pre", "forward", "backward_pre", "backward"):
            hooks = getattr(module, f"_{kind}_hooks", None) or {}
            found += [f"a {kind} hook of {name or 'the module'}" for hook in hooks.values() if of_the_user(hook)]
        for own, p in module._parameters.items():
            hooks = (getattr(p, "_backward_hooks", None) or {}) | (
                getattr(p, "_post_accumulate_grad_hooks", None) or {}
            )
            found += [f"a gradient hook of {name}.{own}" for hook in hooks.values() if of_the_user(hook)]
    return found


def step_reasons(trainer: pl.Trainer, module: pl.LightningModule, device: torch.device) -> list[str]:
    """Why whole steps of this run cannot be recorded; empty if nothing is known to be in the way."""
    reasons = []
    if not isinstance(trainer.strategy, ExecutorSeams):
        return [f"{type(trainer.strategy).__name__} reduces over workers inside a step, which is not recorded"]
    if not module.automatic_optimization:
        return ["manual optimization: training_step itself calls the optimizers"]
    if hooks := silent_hooks(trainer, module):
        reasons.append(f"{', '.join(hooks)} would run at the capture and then go silent; do it in on_train_batch_end")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        reasons.append(
            "precision '16-mixed': the GradScaler reads on the host whether gradients are finite; use 'bf16-mixed'"
        )
    if torch.is_anomaly_enabled():
        reasons.append("Trainer(detect_anomaly=True) reads every gradient on the host")
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        reasons.append("training_step(dataloader_iter) fetches its own batches")
    if is_overridden("training_step", module) and (name := read_argument(module.training_step, 1)):
        holds = f"{name}, which holds batch_idx" if name.startswith("*") else name
        reasons.append(f"training_step reads {holds}, a Python number that a graph would repeat for ever")
    if trainer.world_size > 1:
        reasons.append(f"{trainer.world_size} workers: their communication is not recorded")
    # This package's own override (free/nudged learning projects there) may be called for every micro-batch.
    overridden = is_overridden("optimizer_step", module) and of_the_user(module.optimizer_step)
    if overridden and most_accumulated(trainer) > 1:
        reasons.append(
            "optimizer_step is overridden, and under accumulate_grad_batches it would be called for every micro-batch"
        )
    reasons += [reason for optimizer in trainer.optimizers if (reason := _optimizer_reason(optimizer, device))]
    return reasons


def _optimizer_reason(optimizer: Any, device: torch.device) -> str:
    digital = optimizer.digital if isinstance(optimizer, LRTT) else optimizer
    if isinstance(optimizer, LRTT) and (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks):
        return "step hooks registered on LRTT would run at the capture and then go silent; remove them"
    return DeviceForm.why_not(digital, device)
