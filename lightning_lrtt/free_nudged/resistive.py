"""A resistive network: conductances and diodes, relaxed exactly layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_lrtt import _check
from lightning_lrtt.free_nudged.activations import cost_named, one_hot
from lightning_lrtt.free_nudged.system import Phase, States, System


class ResistiveLayer(nn.Module):
    """A crossbar of conductances ``g [d, k] >= 0`` in siemens between k nodes below and d nodes above.

    The power that it dissipates, ``1/2 sum_ij g_ij (v_i - u_j)^2``, is its share of the network's energy.

    Args:
        inputs: k.
        outputs: d.
        scale: Conductances are drawn uniformly from ``[0, scale / sqrt(k + d)]``.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> import torch
        >>> layer = ResistiveLayer(2, 1)
        >>> _ = layer.conductance.data.fill_(2.0)
        >>> layer.power(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]])).item()  # (2 * 2^2 + 2 * 3^2) / 2
        13.0
    """

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        _check.integer("ResistiveLayer", "inputs", inputs, low=1)
        _check.integer("ResistiveLayer", "outputs", outputs, low=1)
        _check.number("ResistiveLayer", "scale", scale, above=0.0)
        self.conductance = nn.Parameter(torch.rand(outputs, inputs) * scale / (inputs + outputs) ** 0.5)

    def power(self, below: Tensor, above: Tensor, conductance: Tensor | None = None) -> Tensor:
        """Half the dissipated power of each sample ``[N]``, differentiable by conductances and node voltages
        (volts).
        """
        g = self.conductance if conductance is None else conductance
        cross = (above * (below @ g.t())).sum(1)
        return 0.5 * ((above**2) @ g.sum(1) + (below**2) @ g.sum(0)) - cross

    @torch.no_grad()
    def project(self) -> None:
        """No conductance below 0: call it after an update."""
        self.conductance.clamp_(min=0.0)


@dataclass(frozen=True)
class _Context:
    conductances: tuple[Tensor, ...]
    inputs: Tensor  # [N, 2 k]
    loads: tuple[Tensor, ...]  # total conductance at each node of a layer ``[d]``; infinite at a node without any
    drive: Tensor  # current of the input into layer 1 [N, d]


class ResistiveMLP(System):
    """Layers of nodes joined by crossbars; half of the hidden nodes carry a diode to ground each way.

    Kirchhoff's laws minimise the dissipated power ``E = sum_l 1/2 sum_ij g^l_ij (v_i - u_j)^2`` within what the diodes
    allow: the first half of a hidden layer stays >= 0 V, the second half <= 0 V. Inputs enter as ``gain (x, -x)``,
    outputs are read as differences of node pairs, and nudging sends currents ``-beta dcost`` into them. Relaxation
    solves the odd layers exactly given the even ones, then the even ones given the odd ones (block coordinate
    descent: the energy never rises; Scellier 2024, "A fast algorithm to simulate nonlinear resistive networks").
    A node without any conductance stays at 0 V.

    Args:
        sizes: Inputs, hidden layers (even numbers), outputs.
        gain: Amplification of the inputs, > 0: passive resistors only average, so signals shrink from layer to layer.
        cost: ``mse`` or ``cross_entropy`` of the outputs.
        scale: See `ResistiveLayer`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> system = ResistiveMLP([3, 4, 2])
        >>> context = system.prepare(x=torch.ones(5, 3), differentiable=False)
        >>> [tuple(s.shape) for s in system.start(x=torch.ones(5, 3), context=context).values()]
        [(5, 4), (5, 4)]
    """

    stackable = True
    clampable = False  # a difference does not fix two nodes

    def __init__(
        self,
        sizes: Sequence[int],
        gain: float = 4.0,
        cost: Literal["mse", "cross_entropy"] = "mse",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if len(sizes) < 2:
            raise _check.fail(name, "sizes", "at least inputs and outputs", list(sizes))
        for size in sizes:
            _check.integer(name, "sizes", size, low=1)
        if any(size % 2 for size in sizes[1:-1]):
            raise _check.fail(name, "sizes", "even for hidden layers, whose halves carry opposite diodes", list(sizes))
        _check.number(name, "gain", gain, above=0.0)
        self.sizes, self.gain = tuple(sizes), gain
        self.cost_function = cost_named(name, cost)
        nodes = [2 * sizes[0], *sizes[1:-1], 2 * sizes[-1]]
        self.layers = nn.ModuleList(ResistiveLayer(a, b, scale) for a, b in itertools.pairwise(nodes))

    @property
    def crossbars(self) -> list[ResistiveLayer]:
        """The layers of conductances, from the inputs up."""
        return cast("list[ResistiveLayer]", list(self.layers))

    @torch.no_grad()
    def project(self) -> None:
        """Bring every conductance back to >= 0."""
        for layer in self.crossbars:
            layer.project()

    # -------------------------------------------------------------- states

    def start(self, *, x: Tensor, context: _Context) -> States:
        """All nodes at 0 V."""
        return {f"v{i}": context.drive.new_zeros(len(x), len(load)) for i, load in enumerate(context.loads, 1)}

    def nodes(self, states: States) -> Tensor:
        """Voltages of the output nodes ``[N, 2 K]``."""
        return states[f"v{len(self.layers)}"]

    def output(self, *, states: States) -> Tensor:
        """Differences of the output node pairs ``[N, K]``."""
        plus, minus = self.nodes(states).chunk(2, 1)
        return plus - minus

    def encode(self, *, target: Tensor) -> Tensor:
        """Class indices as one-hot rows in the parameters' dtype."""
        return one_hot(target, self.sizes[-1], next(self.parameters()).dtype)

    def cost(self, *, states: States, target: Tensor) -> Tensor:
        """Cost of each sample."""
        return self.cost_function.value(self.output(states=states), target)

    def saturation(self, states: States) -> Tensor:
        """Share of hidden nodes whose diode conducts (0 V)."""
        hidden = list(states.values())[:-1]
        if not hidden:
            return super().saturation(states)
        return torch.cat([(v == 0).flatten() for v in hidden]).to(hidden[0].dtype).mean()

    # -------------------------------------------------------------- relaxation

    def prepare(self, *, x: Tensor, differentiable: bool) -> _Context:
        """Conductances of this step, the load of every node and the current of the input."""
        g = tuple(layer.conductance if differentiable else layer.conductance.detach() for layer in self.crossbars)
        x = self.gain * x.flatten(1).to(g[0].dtype)
        inputs = torch.cat([x, -x], 1)
        loads = tuple(w.sum(1) + (g[i + 1].sum(0) if i + 1 < len(g) else 0) for i, w in enumerate(g))
        # A node whose conductances were all projected to 0 floats: every voltage solves Kirchhoff's laws, and currents
        # over its load would be 0 / 0, or infinite under a nudge. It is held at 0 V, where all nodes start, as by a leak
        # to ground; in all phases alike, so that its conductances get a finite gradient and may grow again. An infinite
        # load does that within the division, and backward too.
        loads = tuple(load.masked_fill(load == 0, torch.inf) for load in loads)
        return _Context(g, inputs, loads, inputs @ g[0].t())

    def stack(self, context: _Context, copies: int) -> _Context:
        """The same conductances for ``copies`` batches."""
        return _Context(
            context.conductances, context.inputs.repeat(copies, 1), context.loads, context.drive.repeat(copies, 1)
        )

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
        """``steps`` sweeps: odd layers, then even ones."""
        names, v = list(states), list(states.values())
        for _ in range(steps):
            for first in (0, 1):
                for i in range(first, len(v), 2):
                    v[i] = self._solve(i, context, v, target, beta)
        return dict(zip(names, v, strict=True))

    def _solve(self, i: int, context: _Context, v: list[Tensor], target: Tensor | None, beta: Tensor | None) -> Tensor:
        """Layer i + 1 given its neighbours: currents over loads, then the diodes."""
        g = context.conductances
        current = context.drive if i == 0 else v[i - 1] @ g[i].t()
        if i + 1 < len(v):
            voltage = (current + v[i + 1] @ g[i + 1]) / context.loads[i]
            plus, minus = voltage.chunk(2, 1)
            return torch.cat([plus.clamp(min=0.0), minus.clamp(max=0.0)], 1)
        if beta is not None:
            assert target is not None
            plus, minus = v[i].chunk(2, 1)
            push = beta.view(-1, 1) * self.cost_function.gradient(plus - minus, target)
            current = current - torch.cat([push, -push], 1)
        return current / context.loads[i]

    # -------------------------------------------------------------- energy

    def energy(self, *, x: Tensor, context: _Context, states: States) -> Tensor:
        """Half the dissipated power of each sample."""
        v = [context.inputs, *states.values()]
        return sum(
            (
                layer.power(v[i], v[i + 1], g)
                for i, (layer, g) in enumerate(zip(self.crossbars, context.conductances, strict=True))
            ),
            torch.zeros_like(v[0][:, 0]),
        )

    def contrast(self, *, x: Tensor, target: Tensor, phases: Sequence[Phase], form: str) -> Tensor:
        """See `System.contrast`; the input's drive is not needed."""
        total: Any = 0.0
        x = self.gain * x.flatten(1).to(next(self.parameters()).dtype)
        inputs = torch.cat([x, -x], 1)
        with torch.autocast(x.device.type, enabled=False):  # powers of whole states are subtracted: see System.contrast
            for phase in phases:
                v = [inputs, *phase.states.values()]
                for i, layer in enumerate(self.crossbars):
                    total = total + complex(phase.weight).real * layer.power(v[i], v[i + 1]).mean()
        return total  # type: ignore[no-any-return]  # a sum of tensors
