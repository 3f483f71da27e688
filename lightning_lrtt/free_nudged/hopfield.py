"""A layered Hopfield network with a closed-form relaxation: two matrix products a step, whatever its depth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_lrtt import _check
from lightning_lrtt.free_nudged import couplings, fused
from lightning_lrtt.free_nudged.activations import activation_named, beta_range, cost_named, one_hot, solves_output
from lightning_lrtt.free_nudged.system import Phase, States, System
from lightning_lrtt.nn import TileModule


@dataclass(frozen=True)
class _Context:
    """Frozen for a step. Odd and even layers see each other only, so one matrix holds all couplings.

    Args:
        matrix: M ``[odd, even]``, with ``u_odd = s_even M^T + drive_odd`` and ``u_even = s_odd M + drive_even``.
        odd: Drive of the odd layers ``[N, odd]``: ``x W_1^T`` and biases.
        even: Drive of the even layers ``[even]``: biases.
    """

    matrix: Tensor
    odd: Tensor
    even: Tensor


@dataclass(frozen=True)
class _Nudge:
    """What a window does to the outputs: hold them, solve ``shift + scale u``, or subtract ``beta dcost/do``."""

    clamped: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    beta: Tensor | None = None
    target: Tensor | None = None


class HopfieldMLP(System):
    """``E = sum_i G(s_i) - sum_i s_i^T (W_i s_(i-1) + b_i)`` with ``s_0 = x``, relaxed by ``s_i <- rho(dPhi/ds_i)``.

    The model of Scellier & Bengio (2017). Couplings are `torch.nn.Linear` layers, which the ``lrtt`` strategy turns into
    tiles. The states ``odd`` and ``even`` hold the layers of odd and even number side by side (`split` gives them one by
    one).

    Args:
        sizes: Inputs, hidden layers, outputs; at least two numbers.
        activation: rho of hidden layers: ``tanh``, ``sigmoid``, ``hard_sigmoid``, or ``linear``, whose energy is
            bounded only while the couplings' norm is below 1.
        output: rho of the outputs.
        cost: ``mse`` (half the squared error) or ``cross_entropy`` (of the softmax of the outputs).
        order: ``synchronous`` moves all layers at once; ``even_odd`` the odd ones first, then the even ones from the
            new odd ones, which converges in about half the steps.
        bias: Whether states have biases.
        gain: Factor on the initial weights of all layers but the first, > 0. Two states drive each other through them;
            at 1 the norm of these couplings is above 1 and relaxation takes hundreds of steps.

    Shape:
        x ``[N, ...]`` with ``sizes[0]`` elements a sample; targets are class indices ``[N]`` or values ``[N, K]``.

    Attributes:
        fused: Whether a window may run as one compiled kernel where `fused.serves` says so; False: always torch's
            products.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> system = HopfieldMLP([4, 3, 2])
        >>> x = torch.ones(5, 4)
        >>> context = system.prepare(x=x, differentiable=False)
        >>> states = system.start(x=x, context=context)
        >>> with torch.no_grad():
        ...     states = system.window(
        ...         x=x, context=context, states=states, steps=20, target=None, beta=None, clamped=None
        ...     )
        >>> system.output(states=states).shape
        torch.Size([5, 2])
    """

    stackable = True
    fused = True

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Literal["tanh", "sigmoid", "hard_sigmoid", "linear"] = "tanh",
        output: Literal["linear", "tanh", "sigmoid", "hard_sigmoid"] = "linear",
        cost: Literal["mse", "cross_entropy"] = "mse",
        order: Literal["synchronous", "even_odd"] = "synchronous",
        bias: bool = True,
        gain: float = 0.5,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if len(sizes) < 2:
            raise _check.fail(name, "sizes", "at least inputs and outputs", list(sizes))
        for size in sizes:
            _check.integer(name, "sizes", size, low=1)
        _check.choice(name, "order", order, ("synchronous", "even_odd"))
        self.sizes, self.order = tuple(sizes), order
        self.hidden = activation_named(name, "activation", activation)
        self.out = activation_named(name, "output", output)
        self.cost_function = cost_named(name, cost)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias) for a, b in itertools.pairwise(sizes))
        _check.number(name, "gain", gain, above=0.0)
        with torch.no_grad():
            for layer in self.layers[1:]:
                layer.weight.mul_(gain)  # type: ignore[operator]  # every layer here has a weight
        self.holomorphic = self.hidden.holomorphic and self.out.holomorphic
        self.solves = solves_output(self.out, self.cost_function)
        self._outputs = "odd" if len(self.layers) % 2 else "even"
        self._widths = {"odd": self.sizes[1::2], "even": self.sizes[2::2]}

    # -------------------------------------------------------------- states

    def start(self, *, x: Tensor, context: _Context) -> States:
        """Zeros."""
        return {
            "odd": torch.zeros_like(context.odd),
            "even": context.odd.new_zeros(len(context.odd), len(context.even)),
        }

    def split(self, states: States) -> list[Tensor]:
        """Views of layers 1, 2, ... in order."""
        widths = {name: list(sizes) for name, sizes in self._widths.items() if sizes}
        parts = {name: iter(torch.split(states[name], sizes, 1)) for name, sizes in widths.items()}
        return [next(parts["odd" if i % 2 else "even"]) for i in range(1, len(self.sizes))]

    def output(self, *, states: States) -> Tensor:
        """The last layer."""
        return states[self._outputs][:, -self.sizes[-1] :]

    def encode(self, *, target: Tensor) -> Tensor:
        """Class indices as one-hot rows in the parameters' dtype."""
        dtype = self.layers[-1].weight.dtype
        return one_hot(target, self.sizes[-1], dtype)  # type: ignore[arg-type]  # every layer here has a weight

    def cost(self, *, states: States, target: Tensor) -> Tensor:
        """Cost of each sample."""
        return self.cost_function.value(self.output(states=states), target)

    def check(self) -> None:
        """Couplings must be linear layers or tiles."""
        couplings.check_layers(list(self.layers), (nn.Linear,))

    def beta_range(self) -> tuple[float, float]:
        """See `activations.beta_range`."""
        return beta_range(self.out, self.cost_function)

    def saturation(self, states: States) -> Tensor:
        """Share of hidden states within 1% of an end of their range."""
        hidden = self.split(states)[:-1]
        if not hidden:
            return super().saturation(states)
        flags = torch.cat([self.hidden.saturated(s.real if s.is_complex() else s).flatten() for s in hidden])
        return flags.to(hidden[0].dtype).mean()

    # -------------------------------------------------------------- relaxation

    def prepare(self, *, x: Tensor, differentiable: bool) -> _Context:
        """Weights of this step and the drive of the input, computed once for all windows."""
        weight = couplings.live_weight if differentiable else couplings.frozen_weight
        w = [weight(layer) for layer in self.layers]
        x = x.flatten(1).to(w[0].dtype)
        blocks = []
        for i in range(1, len(self.sizes), 2):  # odd layers
            row = [
                w[i - 1] if j == i - 1 else w[i].t() if j == i + 1 else w[0].new_zeros(self.sizes[i], self.sizes[j])
                for j in range(2, len(self.sizes), 2)
            ]
            blocks.append(torch.cat(row, 1) if row else w[0].new_zeros(self.sizes[i], 0))
        matrix = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        found = [couplings.bias_of(layer, differentiable) for layer in self.layers]
        biases = [w[0].new_zeros(n) if b is None else b for b, n in zip(found, self.sizes[1:], strict=True)]
        first = torch.addmm(biases[0], x, w[0].t())
        rest = [b.expand(len(x), -1) for b in biases[2::2]]
        even = torch.cat(biases[1::2]) if biases[1::2] else w[0].new_zeros(0)
        return _Context(matrix, torch.cat([first, *rest], 1) if rest else first, even)

    def stack(self, context: _Context, copies: int) -> _Context:
        """The same weights for ``copies`` batches."""
        return _Context(context.matrix, context.odd.repeat(copies, 1), context.even)

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
        """``steps`` sweeps over all layers."""
        nudge = self._nudge(target, beta, clamped)
        kinds = [t.dtype for t in (context.odd, *states.values())] + ([] if beta is None else [beta.dtype])
        if any(kind.is_complex for kind in kinds):
            kind = torch.complex128 if torch.float64 in kinds or torch.complex128 in kinds else torch.complex64
            context = _Context(*(t.to(kind) for t in (context.matrix, context.odd, context.even)))
            states = {name: s.to(kind) for name, s in states.items()}
        odd, even = states["odd"], states["even"]
        if clamped is not None and steps:
            odd, even = self._hold(odd, even, clamped)
        grads = torch.is_grad_enabled()
        if self.fused and fused.serves(context.matrix, context.odd, odd, even):
            new = fused.window(self, context, odd, even, target, beta, clamped, steps)
            return dict(zip(("odd", "even"), new, strict=True))
        spare: list[Tensor | None] = [None] * 4 if grads else [torch.empty_like(t) for t in (odd, even, odd, even)]
        upward, downward = context.matrix.t(), context.matrix
        for step in range(steps):
            to_odd, to_even = spare[2 * (step % 2)], spare[2 * (step % 2) + 1]
            new_odd = self._move("odd", context.odd, even, upward, odd, nudge, to_odd)
            source = new_odd if self.order == "even_odd" else odd
            new_even = self._move("even", context.even, source, downward, even, nudge, to_even)
            odd, even = new_odd, new_even
        return {"odd": odd, "even": even}

    def _nudge(self, target: Tensor | None, beta: Tensor | None, clamped: Tensor | None) -> _Nudge | None:
        if clamped is not None:
            return _Nudge(clamped=clamped)
        if beta is None:
            return None
        assert target is not None
        column = beta.view(-1, 1)
        if self.solves:
            scale = 1.0 / (1.0 + column)
            return _Nudge(scale=scale, shift=column * target * scale)
        return _Nudge(beta=column, target=target)

    def _hold(self, odd: Tensor, even: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        states = self.hold({"odd": odd, "even": even}, value)
        return states["odd"], states["even"]

    def _move(
        self,
        group: str,
        drive: Tensor,
        other: Tensor,
        matrix: Tensor,
        old: Tensor,
        nudge: _Nudge | None,
        out: Tensor | None,
    ) -> Tensor:
        """``rho(drive + other matrix)`` for the layers of one group; into ``out`` unless gradients are wanted."""
        width = self.sizes[-1] if group == self._outputs else 0
        hidden = old.shape[1] - width
        push = None
        if width and nudge is not None and nudge.beta is not None:
            assert nudge.target is not None
            push = nudge.beta * self.cost_function.gradient(old[:, hidden:], nudge.target)
        if out is None:
            u = torch.addmm(drive, other, matrix)
            parts = [self.hidden.apply(u[:, :hidden])]
            if width:
                parts.append(self._finish(u[:, hidden:], nudge, push, inplace=False))
            return torch.cat(parts, 1)
        torch.addmm(drive, other, matrix, out=out)
        if hidden:
            self.hidden.apply_(out[:, :hidden])
        if width:
            self._finish(out[:, hidden:], nudge, push, inplace=True)
        return out

    def _finish(self, u: Tensor, nudge: _Nudge | None, push: Tensor | None, inplace: bool) -> Tensor:
        """The outputs' own activation and nudge."""
        if nudge is not None and nudge.clamped is not None:
            return u.copy_(nudge.clamped) if inplace else nudge.clamped.expand_as(u)
        if nudge is not None and nudge.scale is not None:
            assert nudge.shift is not None
            u = (
                torch.addcmul(nudge.shift, u, nudge.scale, out=u)
                if inplace
                else torch.addcmul(nudge.shift, u, nudge.scale)
            )
        elif push is not None:
            u = u.sub_(push) if inplace else u - push
        return self.out.apply_(u) if inplace else self.out.apply(u)

    # -------------------------------------------------------------- energy

    def energy(self, *, x: Tensor, context: _Context, states: States) -> Tensor:
        """E of each sample; states outside of their range have none (NaN)."""
        odd, even = states["odd"], states["even"]
        coupled = (odd * (even @ context.matrix.t() + context.odd)).sum(1) + even @ context.even
        layers = self.split(states)
        total = self.out.potential(layers[-1]).sum(1) - coupled
        for s in layers[:-1]:
            total = total + self.hidden.potential(s).sum(1)
        return total

    def contrast(self, *, x: Tensor, target: Tensor, phases: Sequence[Phase], form: str) -> Tensor:
        """See `System.contrast`; terms that do not depend on parameters are left out."""
        weights = [phase.weight for phase in phases]
        x = x.flatten(1).to(phases[0].states["odd"].real.dtype)
        # The layers of a group are cut out of its rows, which are made once.
        groups = {
            name: couplings.Sides([phase.states[name] for phase in phases], weights, form) for name in ("odd", "even")
        }
        below = self.split({name: side.x() for name, side in groups.items()})
        above = self.split({name: side.d() for name, side in groups.items()})
        sums = self.split({name: side.delta.sum(0, keepdim=True) for name, side in groups.items()})
        first = groups["odd"].driven(x)
        terms: list[Tensor] = []
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            rows, cotangents = (first[0], first[1][:, : self.sizes[1]]) if i == 0 else (below[i - 1], above[i])
            if isinstance(layer, TileModule):
                terms.append(couplings.couple(layer, rows, cotangents))
            else:
                parameters.append(layer.weight)  # type: ignore[arg-type]  # every layer here has a weight
                gradients.append(cotangents.t() @ rows)
            bias = couplings.bias_of(layer, True)
            if bias is not None:
                parameters.append(bias)
                gradients.append(sums[i].flatten())
        if parameters:
            terms.append(couplings.linear(parameters, gradients))
        return sum(terms[1:], terms[0]) / -len(x)
