"""Oracles and small systems shared by the tests of two-phase training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lrtt.free_nudged import HopfieldMLP, States, System

DOUBLE = torch.float64


def data(n: int = 16, inputs: int = 12, classes: int = 4, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    """Gaussian inputs and classes, always the same."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, inputs, generator=generator, dtype=DOUBLE).to(dtype)
    return x, torch.randint(classes, (n,), generator=generator)


def network(
    sizes: tuple[int, ...] = (12, 9, 7, 4), dtype: torch.dtype = DOUBLE, seed: int = 0, **kwargs: Any
) -> HopfieldMLP:
    """A small network of fixed weights."""
    torch.manual_seed(seed)
    return HopfieldMLP(sizes, **kwargs).to(dtype)


class LinearOracle:
    """A linear network with squared error in closed form: ``(I - K + beta P) s = drive + beta P y``.

    K is the symmetric matrix of the couplings between states, P selects the outputs.
    """

    def __init__(self, system: HopfieldMLP, x: Tensor, y: Tensor) -> None:
        sizes = system.sizes[1:]
        self.ends = torch.tensor(sizes).cumsum(0).tolist()
        total = self.ends[-1]
        self.starts = [end - size for end, size in zip(self.ends, sizes, strict=True)]
        w = [layer.weight for layer in system.layers]
        k = torch.zeros(total, total, dtype=DOUBLE)
        for i in range(1, len(w)):
            a, b = slice(self.starts[i], self.ends[i]), slice(self.starts[i - 1], self.ends[i - 1])
            pad = torch.zeros(total, total, dtype=DOUBLE)
            pad[a, b] = 1.0
            block = torch.zeros(total, total, dtype=DOUBLE)
            k = k + _embed(block, w[i], a, b) + _embed(block, w[i].t(), b, a)
        drive = [x @ w[0].t() + system.layers[0].bias]
        drive += [layer.bias.expand(len(x), -1) for layer in system.layers[1:]]
        self.hessian, self.drive = torch.eye(total, dtype=DOUBLE) - k, torch.cat(drive, 1)
        self.outputs = torch.zeros(total, dtype=DOUBLE)
        self.outputs[self.starts[-1] :] = 1.0
        self.y = torch.zeros_like(self.drive)
        self.y[:, self.starts[-1] :] = y

    def states(self, beta: float = 0.0) -> Tensor:
        """All layers side by side ``[N, total]``."""
        matrix = self.hessian + beta * torch.diag(self.outputs)
        return torch.linalg.solve(matrix, (self.drive + beta * self.y).t()).t()

    def cost(self) -> Tensor:
        """Mean cost of the free states, differentiable by the weights: its gradient is implicit differentiation."""
        error = (self.states() - self.y)[:, self.starts[-1] :]
        return 0.5 * error.square().sum(1).mean()


def _embed(block: Tensor, w: Tensor, rows: slice, columns: slice) -> Tensor:
    left = torch.zeros(block.shape[0], w.shape[0], dtype=DOUBLE)
    left[rows] = torch.eye(w.shape[0], dtype=DOUBLE)
    right = torch.zeros(w.shape[1], block.shape[1], dtype=DOUBLE)
    right[:, columns] = torch.eye(w.shape[1], dtype=DOUBLE)
    return left @ w @ right


class SyncCounter(TorchDispatchMode):
    """Counts operations that make a device wait for the host or the host for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten::equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masked = name.startswith("aten.index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for i in arg
        )
        if masked or any(word.removeprefix("aten::") in name.split(".")[1] for word in self.NAMES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Noisy(System):
    """A noisy spring with a field that a window moves: state of every kind. ``register`` says which it names."""

    def __init__(self, register: tuple[str, ...] = ("field", "generator")) -> None:
        super().__init__(rate=0.2)
        self.w = nn.Parameter(torch.tensor([[1.0, -0.5], [0.3, 0.8]]))
        self.register_buffer("field", torch.zeros(2))
        self.generator = torch.Generator().manual_seed(7)
        self.register = register
        self.committed = 0

    def start(self, *, x: Tensor, context: Any) -> States:
        return {"s": torch.zeros_like(x)}

    def energy(self, *, x: Tensor, context: Any, states: States) -> Tensor:
        return 0.5 * ((states["s"] - x @ self.w) ** 2).sum(1)

    def cost(self, *, states: States, target: Tensor) -> Tensor:
        return 0.5 * ((states["s"] - target) ** 2).sum(1)

    def output(self, *, states: States) -> Tensor:
        return states["s"]

    def window(
        self, *, x: Tensor, context: Any, states: States, steps: int, target: Any, beta: Any, clamped: Any
    ) -> States:
        for _ in range(steps):
            states = super().window(
                x=x, context=context, states=states, steps=1, target=target, beta=beta, clamped=clamped
            )
            noise = torch.randn(states["s"].shape, generator=self.generator)
            states = {"s": states["s"] + 0.01 * noise + 0.1 * self.field}
            self.field.add_(states["s"].mean(0))
        return states

    def registered(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.register}
