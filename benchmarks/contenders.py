"""Trainings that are timed beside each other: LR-TT of this package, of plain PyTorch, dense AdamW and LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from measure import Step
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lrtt import LRTT, LRTTConfig, convert_to_lrtt, devices

Training = tuple[Any, Any]  # a module and what has zero_grad and step
SOFT, QUIET = devices.SoftBounds(), devices.SoftBounds(dw_min_std=0.0)  # with 30% variations from cell to cell


class Missing(Exception):
    """A contender cannot run here; the message says why."""


def config(device: devices.Device | None, rank: int, transfer_every: int) -> LRTTConfig:
    """A, B and C on the same device; None: digital."""
    return LRTTConfig(rank=rank, transfer_every=transfer_every, fast_device=device, visible_device=device)


def lrtt(model: nn.Module, device: devices.Device | None, rank: int, transfer_every: int, lr: float = 0.1) -> Training:
    """The layers of ``model`` on tiles; everything else by SGD, which is fused on a GPU."""
    model = convert_to_lrtt(model, config(device, rank, transfer_every))
    fused = next(model.parameters()).is_cuda

    def digital(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, fused=fused)

    return model, LRTT(model.parameters(), lr=lr, digital=digital)


def adamw(model: nn.Module) -> Training:
    """Dense training of whatever takes a gradient, fused."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-3, fused=True, capturable=trained[0].is_cuda)


# ---------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """``x W^T + (x A^T) B^T`` with W frozen: what peft's layer computes without dropout and scaling."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, device = base.requires_grad_(False), base.weight.device
        self.down = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


def lora(model: nn.Module, rank: int) -> Training:
    """LoRA in a few lines of PyTorch on every linear layer of a Sequential."""
    layers = [LoRALinear(m, rank) if isinstance(m, nn.Linear) else m for m in _sequential(model)]
    return adamw(nn.Sequential(*layers))


def peft_lora(model: nn.Module, rank: int) -> Training:
    """LoRA by peft on every linear layer of a Sequential."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Missing(f"peft is not installed ({error})") from error
    model = _sequential(model)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return adamw(inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model))


def _sequential(model: nn.Module) -> nn.Sequential:
    return model if isinstance(model, nn.Sequential) else nn.Sequential(model)


# ---------------------------------------------------------------- LR-TT in plain PyTorch


class ReferenceLinear(nn.Module):
    """Digital LR-TT as one writes it in PyTorch: ``x (C + A B)^T + bias``; autograd gives the gradients of A and B."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.C, self.bias, rank = base.weight.requires_grad_(False), base.bias, min(rank, *base.weight.shape)
        self.A = nn.Parameter(self.C.new_zeros(base.out_features, rank))
        self.B = nn.Parameter(torch.randn_like(self.C[:rank]) / rank**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.C, self.bias) + F.linear(F.linear(x, self.B), self.A)


class ReferenceOptimizer:
    """``p -= lr grad`` for factors and biases; every ``transfer_every`` steps ``C += A B``, A = 0 and a fresh B."""

    def __init__(self, model: nn.Module, transfer_every: int, lr: float = 0.1) -> None:
        self.tiles = [m for m in model.modules() if isinstance(m, ReferenceLinear)]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.transfer_every, self.count = lr, transfer_every, 0

    def zero_grad(self) -> None:
        for p in self.trained:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        held = [p for p in self.trained if p.grad is not None]
        torch._foreach_add_(tuple(held), tuple(p.grad for p in held if p.grad is not None), alpha=-self.lr)
        self.count += 1
        if self.count % self.transfer_every == 0:
            for tile in self.tiles:
                tile.C.addmm_(tile.A, tile.B)
                tile.A.zero_()
                tile.B.normal_(0.0, tile.B.shape[0] ** -0.5)


def reference(model: nn.Module, rank: int, transfer_every: int, lr: float = 0.1) -> Training:
    """Eager PyTorch, on every linear layer of a Sequential."""
    layers = [ReferenceLinear(m, rank) if isinstance(m, nn.Linear) else m for m in _sequential(model)]
    made = nn.Sequential(*layers)
    return made, ReferenceOptimizer(made, transfer_every, lr)


def compiled(training: Training, backend: str) -> Training:
    """The same under torch.compile: forward and backward; the update is a few foreach calls as before."""
    model, optimizer = training
    return torch.compile(model, backend=backend), optimizer


def backend(quick: bool) -> tuple[str, str]:
    """torch.compile's backend and how the row is called; quick runs trace without compiling kernels."""
    return ("aot_eager", "torch.compile (aot_eager) of it") if quick else ("inductor", "torch.compile of it")


# ---------------------------------------------------------------- steps


def steps_with_gradients(
    training: Training, x: Tensor, gradients: Sequence[Tensor], autocast: Callable[[], Any]
) -> list[Step]:
    """One step per output gradient: forward, backward (with the gradient of x) and update."""
    model, optimizer = training
    x = x.detach().requires_grad_()

    def step(gradient: Tensor) -> None:
        optimizer.zero_grad()
        x.grad = None
        with autocast():
            y = model(x)
        y.backward(gradient)
        optimizer.step()

    return [partial(step, gradient) for gradient in gradients]


def step_of_loss(training: Training, x: Tensor, autocast: Callable[[], Any] = contextlib.nullcontext) -> Step:
    """One step of the mean square of the output."""
    model, optimizer = training

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            y = model(x)
        y.float().square().mean().backward()
        optimizer.step()

    return step
