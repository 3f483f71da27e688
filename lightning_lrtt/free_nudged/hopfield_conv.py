"""A convolutional Hopfield network: convolutions with pooling below, linear layers on top; relaxed by autograd of
Phi.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lrtt import _check
from lightning_lrtt.free_nudged import couplings
from lightning_lrtt.free_nudged.activations import activation_named, beta_range, cost_named, one_hot
from lightning_lrtt.free_nudged.system import Phase, States, System


@dataclass(frozen=True)
class _Context:
    """Kernels, matrices and biases of this step; ``first`` is the input's drive of layer 1, computed once."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    first: Tensor


class HopfieldConvNet(System):
    """``Phi = sum_i s_i . pool(w_i * s_(i-1)) + sum_i s_i . b_i``, relaxed by ``s_i <- rho(dPhi/ds_i)``, all at once.

    The model of Ernoult et al. (2019) and Laborieux et al. (2021): pooled convolutions, then linear layers. The
    derivative of Phi goes back through the pooling, so it is taken by autograd; the drive of the input is computed
    once a step. Couplings are `torch.nn.Conv2d` and `torch.nn.Linear` layers, which may become tiles.

    Args:
        image: Channels, height and width of the input.
        channels: Channels of each convolution's state, at least one.
        classes: Outputs.
        hidden: Sizes of linear hidden layers between the last convolution and the outputs.
        kernel: Kernel size of all convolutions (stride 1, padding ``kernel // 2``), odd.
        pool: ``max`` or ``avg``, 2x2. With ``max`` take states >= 0: with ``tanh`` the routes may switch for ever.
        activation: rho of all states but the outputs.
        output: rho of the outputs.
        cost: ``mse`` or ``cross_entropy``.
        gain: Factor on the initial weights of all layers but the first; see `HopfieldMLP`.

    Shape:
        x ``[N, channels, height, width]``.

    Raises:
        ValueError: If an argument is out of range, or pooling leaves no pixel.

    Example:
        >>> import torch
        >>> system = HopfieldConvNet((1, 8, 8), channels=[4, 8], classes=10)
        >>> x = torch.zeros(2, 1, 8, 8)
        >>> states = system.start(x=x, context=system.prepare(x=x, differentiable=False))
        >>> [tuple(s.shape) for s in states.values()]
        [(2, 4, 4, 4), (2, 8, 2, 2), (2, 10)]
    """

    stackable = True

    def __init__(
        self,
        image: Sequence[int],
        channels: Sequence[int],
        classes: int,
        hidden: Sequence[int] = (),
        kernel: int = 3,
        pool: Literal["max", "avg"] = "avg",
        activation: Literal["tanh", "sigmoid", "hard_sigmoid"] = "hard_sigmoid",
        output: Literal["linear", "tanh", "sigmoid", "hard_sigmoid"] = "linear",
        cost: Literal["mse", "cross_entropy"] = "mse",
        gain: float = 0.5,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _check.integer(name, "kernel", kernel, low=1)
        if kernel % 2 == 0:
            raise _check.fail(name, "kernel", "odd", kernel)
        if len(image) != 3 or not channels:
            raise _check.fail(
                name,
                "image and channels",
                "(channels, height, width) and at least one layer",
                (tuple(image), tuple(channels)),
            )
        for size in (*image, *channels, classes, *hidden):
            _check.integer(name, "sizes", size, low=1)
        _check.choice(name, "pool", pool, ("max", "avg"))
        _check.number(name, "gain", gain, above=0.0)
        self.hidden, self.out = (
            activation_named(name, "activation", activation),
            activation_named(name, "output", output),
        )
        self.cost_function = cost_named(name, cost)
        self.pool, self.classes = pool, classes
        maps = [image[0], *channels]
        height, width = image[1] >> len(channels), image[2] >> len(channels)
        if height * width == 0:
            raise _check.fail(
                name,
                "channels",
                f"few enough for {len(channels)} poolings by 2 of {image[1]}x{image[2]}",
                list(channels),
            )
        flat = [channels[-1] * height * width, *hidden, classes]
        self.layers = nn.ModuleList(
            [nn.Conv2d(a, b, kernel, padding=kernel // 2) for a, b in itertools.pairwise(maps)]
            + [nn.Linear(a, b) for a, b in itertools.pairwise(flat)]
        )
        with torch.no_grad():
            for layer in list(self.layers)[1:]:
                layer.weight.mul_(gain)  # type: ignore[operator]  # every layer here has a weight
        self.shapes: list[tuple[int, ...]] = [(c, image[1] >> i + 1, image[2] >> i + 1) for i, c in enumerate(channels)]
        self.shapes += [(size,) for size in flat[1:]]
        self.convolutions = len(channels)

    # -------------------------------------------------------------- states

    def start(self, *, x: Tensor, context: _Context) -> States:
        """Zeros."""
        return {f"s{i}": context.first.new_zeros(len(x), *shape) for i, shape in enumerate(self.shapes, 1)}

    def output(self, *, states: States) -> Tensor:
        """The last layer."""
        return states[f"s{len(self.shapes)}"]

    def encode(self, *, target: Tensor) -> Tensor:
        """Class indices as one-hot rows in the parameters' dtype."""
        return one_hot(target, self.classes, couplings.frozen_weight(self.layers[-1]).dtype)

    def cost(self, *, states: States, target: Tensor) -> Tensor:
        """Cost of each sample."""
        return self.cost_function.value(self.output(states=states), target)

    def beta_range(self) -> tuple[float, float]:
        """The outputs are iterated, so the nudge must contract: see `activations.beta_range`."""
        low, high = beta_range(self.out, self.cost_function)
        bound = 1.0 / (self.out.slope * self.cost_function.slope)
        return max(low, -bound), min(high, bound)

    def check(self) -> None:
        """Couplings must be convolutions, linear layers or tiles."""
        couplings.check_layers(list(self.layers), (nn.Conv2d, nn.Linear))

    def saturation(self, states: States) -> Tensor:
        """Share of hidden states within 1% of an end of their range."""
        flags = [self.hidden.saturated(s).flatten() for s in list(states.values())[:-1]]
        return torch.cat(flags).to(self.output(states=states).dtype).mean()

    # -------------------------------------------------------------- relaxation

    def prepare(self, *, x: Tensor, differentiable: bool) -> _Context:
        """Weights and the drive of the input."""
        weight = couplings.live_weight if differentiable else couplings.frozen_weight
        weights = tuple(weight(layer) for layer in self.layers)
        found = [couplings.bias_of(layer, differentiable) for layer in self.layers]
        biases = tuple(b for b in found if b is not None)  # every layer has one
        return _Context(weights, biases, self._apply_layer(0, x.to(weights[0].dtype), weights[0]))

    def stack(self, context: _Context, copies: int) -> _Context:
        """The same weights for ``copies`` batches."""
        return _Context(context.weights, context.biases, context.first.repeat(copies, 1, 1, 1))

    def _pool(self, y: Tensor) -> Tensor:
        return F.max_pool2d(y, 2) if self.pool == "max" else F.avg_pool2d(y, 2)

    def _apply_layer(self, index: int, s: Tensor, w: Tensor) -> Tensor:
        if index < self.convolutions:
            return self._pool(F.conv2d(s, w, padding=w.shape[-1] // 2))
        return F.linear(s.flatten(1), w)

    def _phi(self, context: _Context, states: Sequence[Tensor]) -> Tensor:
        """Phi of each sample."""
        total = (states[0] * context.first).flatten(1).sum(1)
        for i in range(1, len(states)):
            total = total + (states[i] * self._apply_layer(i, states[i - 1], context.weights[i])).flatten(1).sum(1)
        for s, b in zip(states, context.biases, strict=True):
            total = total + (s * b.view(-1, *[1] * (s.dim() - 2))).flatten(1).sum(1)
        return total

    def window(
        self,
        *,
        x: Tensor,
        context: _Context,
        states: States,
        steps: int,
        target: Tensor | None,
        beta: Tensor | None,
        clamped: Tensor | None,
    ) -> States:
        """``steps`` synchronous steps."""
        differentiable = torch.is_grad_enabled()
        names, layers = list(states), list(states.values())
        for _ in range(steps):
            with torch.enable_grad():
                leaves = [s if differentiable and s.requires_grad else s.detach().requires_grad_() for s in layers]
                drives = torch.autograd.grad(self._phi(context, leaves).sum(), leaves, create_graph=differentiable)
            last = drives[-1]
            if beta is not None:
                assert target is not None
                last = last - beta.view(-1, 1) * self.cost_function.gradient(
                    leaves[-1] if differentiable else layers[-1], target
                )
            layers = [self.hidden.apply(u) for u in drives[:-1]]
            layers.append(self.out.apply(last) if clamped is None else clamped)
        return dict(zip(names, layers, strict=True))

    # -------------------------------------------------------------- energy

    def energy(self, *, x: Tensor, context: _Context, states: States) -> Tensor:
        """``sum G(s) - Phi`` of each sample."""
        layers = list(states.values())
        total = self.out.potential(layers[-1]).sum(1) - self._phi(context, layers)
        for s in layers[:-1]:
            total = total + self.hidden.potential(s).flatten(1).sum(1)
        return total

    def contrast(self, *, x: Tensor, target: Tensor, phases: Sequence[Phase], form: str) -> Tensor:
        """See `System.contrast`; terms that do not depend on parameters are left out.

        The pooled product is ``unpool(s_i) . (w * s_(i-1))``. Both forms are exact with either pooling, since the
        unpooled states of each phase are what enters the differences.
        """
        weights = [phase.weight for phase in phases]
        layers = [
            [x.to(self.output(states=phases[0].states).dtype)] * len(phases),
            *(list(s) for s in zip(*(p.states.values() for p in phases), strict=True)),
        ]
        total: Tensor | None = None
        for i, layer in enumerate(self.layers):
            lower, upper = layers[i], layers[i + 1]
            if i < self.convolutions:
                upper = [self._unpool(i, s, low) for s, low in zip(upper, lower, strict=True)]
            elif i == self.convolutions:
                lower = [s.flatten(1) for s in lower]
            rows, cotangents = couplings.outer_terms(lower, upper, weights, form, driven=i == 0)
            term = couplings.couple(layer, rows, cotangents)
            delta = couplings.difference(layers[i + 1], weights)
            bias = couplings.bias_of(layer, True)
            assert bias is not None
            term = term + (bias * (delta.flatten(2).sum((0, 2)) if delta.dim() > 2 else delta.sum(0))).sum()
            total = term if total is None else total + term
        assert total is not None
        return total / -len(x)

    @torch.no_grad()
    def _unpool(self, index: int, s: Tensor, lower: Tensor) -> Tensor:
        """The cotangent of the convolution's output: s sent back through the pooling."""
        full = (*s.shape[:2], *lower.shape[2:])
        if self.pool == "avg":
            spread = F.interpolate(s, scale_factor=2, mode="nearest") / 4
            return F.pad(spread, (0, full[3] - spread.shape[3], 0, full[2] - spread.shape[2]))
        w = couplings.frozen_weight(self.layers[index])
        with torch.autocast(lower.device.type, enabled=False):  # rounded, routes would not be those of relaxation
            _, where = F.max_pool2d(F.conv2d(lower, w, padding=w.shape[-1] // 2), 2, return_indices=True)
        flat = s.new_zeros(*full[:2], full[2] * full[3])
        return flat.scatter_(2, where.flatten(2), s.flatten(2)).view(full)
