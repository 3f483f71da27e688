"""Stock optimizers in the form that a graph can hold: lr and step counts in device memory."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

__all__ = ["DeviceForm"]

_FUSED: tuple[type[Optimizer], ...] = (optim.SGD,)
_CAPTURABLE: tuple[type[Optimizer], ...] = (
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.ASGD,
    optim.Adadelta,
    optim.RMSprop,
    optim.Rprop,
)
# Set while `step` runs, by kind.
_FLAGS: dict[str, dict[str, Any]] = {"fused": {"fused": True, "foreach": None}, "capturable": {"capturable": True}}
# What a recording does not read: schedulers keep their own numbers in the groups.
_MOVING = ("params", "lr", "initial_lr", "swa_lr", "max_lr", "min_lr")


class DeviceForm:
    """Lends an optimizer of ``torch.optim`` a form whose lr and step counts are read from device memory.

    SGD takes its fused form, the others their capturable one. The groups are changed only while `active`: outside,
    schedulers and checkpoints see them as the user made them, with a lr that is a Python number.

    The forms round differently from the defaults in the last bits (Adam's bias correction is taken in float32), so
    every step of a run, recorded or not, should use the same form.

    Args:
        optimizer: The optimizer.
        device: Where its parameters are.

    Raises:
        ValueError: If it has no such form; `why_not` says why.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> DeviceForm.why_not(torch.optim.SGD([p], lr=0.1), p.device)
        ''
        >>> DeviceForm.why_not(torch.optim.Rprop([p], differentiable=True), p.device)
        'Rprop(differentiable=True) cannot be recorded'
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        reason = self.why_not(optimizer, device)
        if reason:
            raise ValueError(f"DeviceForm: {reason}")
        self.optimizer, self.device = optimizer, device
        self._lr: list[Tensor] = []
        self._moved: list[tuple[dict[str, Any], str]] = []

    @staticmethod
    def why_not(optimizer: Optimizer, device: torch.device) -> str:
        """The reason that ``optimizer`` cannot be recorded, or an empty string."""
        name = type(optimizer).__name__
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if type(optimizer) not in (*_FUSED, *_CAPTURABLE):
            return (
                f"optimizer {name} has no capturable or fused form that is known to keep lr and step counts on the "
                "device; use SGD or a member of the Adam family"
            )
        if any(hooks for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)):
            return f"step hooks registered on {name} would run once and then go silent; remove them"
        if any(group.get("differentiable") for group in optimizer.param_groups):
            return f"{name}(differentiable=True) cannot be recorded"
        if away := [p.device for p in parameters if p.device != device]:
            return f"all parameters of {name} must be on {device}, got some on {away[0]}"
        if type(optimizer) in _FUSED and any(not p.is_floating_point() for p in parameters):
            return f"{name} of complex parameters has no fused form"
        if any(
            isinstance(value, Tensor)
            for group in optimizer.param_groups
            for key, value in group.items()
            if key not in _MOVING
        ):
            return f"hyperparameters of {name} other than lr must be numbers, not tensors"
        return ""

    def signature(self) -> Hashable:
        """Everything of the groups that a recording freezes: another momentum, say, asks for another recording."""
        return tuple(
            (len(group["params"]), *(_hashable(v) for k, v in group.items() if k not in _MOVING))
            for group in self.optimizer.param_groups
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the groups' lr to the device scalars, in place; before every step, recorded or not."""
        groups = self.optimizer.param_groups
        while len(self._lr) < len(groups):
            self._lr.append(torch.empty((), dtype=torch.float32, device=self.device))
        for held, group in zip(self._lr, groups, strict=False):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device == self.device:
                held.copy_(lr.reshape(()))
            else:
                held.fill_(float(lr))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within, ``optimizer.step()`` takes the device form. On a CPU, where nothing is recorded, nothing changes."""
        if self.device.type != "cuda":
            yield
            return
        self._to_device()
        self.optimizer._warned_capturable_if_run_uncaptured = True  # eager steps are meant
        flags = _FLAGS["fused" if type(self.optimizer) in _FUSED else "capturable"]
        groups = list(self.optimizer.param_groups)
        before = [dict(group) for group in groups]
        for group, lr in zip(groups, self._lr, strict=True):
            group.update({**flags, "lr": lr})
        try:
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                for key in ("lr", *flags):
                    if key in old:
                        group[key] = old[key]
                    else:
                        group.pop(key, None)

    def _to_device(self) -> None:
        """Step counts and other scalars of a default form, from before or from a checkpoint, are on the CPU."""
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() == 0 and value.device != p.device:
                    state[key] = value.to(p.device)
                    self._moved.append((state, key))

    def release(self) -> None:
        """Put scalars that were moved back to the CPU, where the default forms want them."""
        for state, key in self._moved:
            if key in state:
                state[key] = state[key].cpu()
        self._moved.clear()


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, (list, tuple)) else value if isinstance(value, Hashable) else repr(value)
