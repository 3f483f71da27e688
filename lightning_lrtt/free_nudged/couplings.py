"""Weights between states, on plain layers or LR-TT tiles: frozen for relaxation, and as outer products for the
update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_lrtt.nn import TileModule

FORMS = ("difference", "direct")


def frozen_weight(layer: nn.Module) -> Tensor:
    """The matrix or kernel that the layer applies, detached: ``C + alpha A B`` of a tile."""
    if isinstance(layer, TileModule):
        return layer.effective_weight()
    return live_weight(layer).detach()


def live_weight(layer: nn.Module) -> Tensor:
    """The same, differentiable by the layer's parameters; by the factors of a tile, whose C no gradient moves."""
    if isinstance(layer, TileModule):
        product = layer.config.alpha * (layer.A @ layer.B)
        weight = layer.weight.detach() + product.view(layer.weight.shape)
        return weight if layer.output_scale is None else weight * layer.output_scale
    return layer.weight  # type: ignore[return-value]  # every layer here has a weight


def bias_of(layer: nn.Module, differentiable: bool) -> Tensor | None:
    """The layer's bias, detached unless ``differentiable``; None if it has none."""
    bias: Tensor | None = getattr(layer, "bias", None)
    return bias if bias is None or differentiable else bias.detach()


def check_layers(layers: Sequence[nn.Module], kinds: tuple[type[nn.Module], ...]) -> None:
    """Require plain layers or digital-read tiles.

    Raises:
        MisconfigurationException: For another layer, or a tile whose reads go through converters, which the frozen
            matrix of a relaxation would bypass.
    """
    for layer in layers:
        if isinstance(layer, TileModule):
            if getattr(layer.config, "io", None) is not None:
                raise MisconfigurationException(
                    "free_nudged: config.io of a coupling's tile must be None, got converters; relaxation multiplies "
                    "by the tile's effective weight and would bypass them"
                )
        elif type(layer) not in kinds:
            raise MisconfigurationException(
                f"free_nudged: couplings must be {', '.join(k.__name__ for k in kinds)} or LR-TT tiles, got "
                f"{type(layer).__name__}"
            )


class _Linear(torch.autograd.Function):
    """``sum_i <g_i, p_i>`` of parameters p and their given gradients g, so with one product for a gradient and none for
    the value.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        parameters = tensors[: len(tensors) // 2]
        # Under autocast the gradients were made in its precision, the parameters were not.
        ctx.gradients = [g.to(p.dtype) for p, g in zip(parameters, tensors[len(parameters) :], strict=True)]
        terms = zip(parameters, ctx.gradients, strict=True)
        return torch.stack([torch.dot(p.detach().flatten(), g.flatten()) for p, g in terms]).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch._foreach_mul(ctx.gradients, grad), *[None] * len(ctx.gradients))


def linear(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar ``sum_i <g_i, p_i>`` whose gradients are the given ones."""
    return _Linear.apply(*parameters, *gradients)  # type: ignore[no-any-return, no-untyped-call]  # autograd's apply is not annotated


def couple(layer: nn.Module, x: Tensor, d: Tensor) -> Tensor:
    """``<d, layer(x)>`` without the bias, differentiable by the layer's parameters only.

    It follows autocast: x or d of each product is a difference of the phases, taken before in the states' precision, so
    that a rounding of 2^-8 is one of the gradient and not of the states. That keeps a tile's read what mixed precision
    makes of any other read.

    On a tile it is the ordinary read, so that backward latches x and d for the pulses; on a plain linear layer only the
    gradient's outer product is computed.

    Shape:
        x ``[M, k]`` (or images), d as the layer's output.
    """
    if isinstance(layer, TileModule):
        return (d * layer.multiply(x)).sum()
    if isinstance(layer, nn.Linear):
        return linear([layer.weight], [d.t() @ x])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    convolved: Tensor = layer._conv_forward(x, layer.weight, None)
    return (d * convolved).sum()


class Sides:
    """One group of states as the rows that couplings are sent: ``sum d_i x_i^T = Re sum_k weight_k upper_k lower_k^T``
    for the `x` of the states below and the `d` of those above.

    ``difference``: with the means m over the phases and ``D = Re sum_k weight_k s_k`` (the weights sum to 0), two
    phases of opposite weight give exactly ``m D'^T + D m'^T``: every product holds a difference, so no traffic
    cancels. More phases add ``sum_k weight_k (s_k - m)(s_k' - m')^T``. ``direct``: the products of each phase as they
    are.

    Args:
        states: One tensor ``[N, ...]`` a phase.
        weights: One a phase.
        form: ``difference`` or ``direct``.

    Attributes:
        delta: D, real ``[N, ...]``: what a bias is sent.
    """

    def __init__(self, states: Sequence[Tensor], weights: Sequence[complex], form: str) -> None:
        self.delta = _combine(states, weights)
        self._weights, self._differs = [complex(w) for w in weights], form == "difference"
        self._complex = states[0].is_complex()
        self._mean = _mean(states) if self._differs else self.delta
        self._rest = list(states) if not self._differs else []
        if self._differs and len(states) > 2:
            self._rest = [s - self._mean for s in states]

    def x(self) -> Tensor:
        """As inputs ``[M, ...]``."""
        rows = [part for s in self._rest for part in ((s.real, s.imag) if self._complex else (s,))]
        return torch.cat([self._mean, self.delta, *rows] if self._differs else rows)

    def d(self) -> Tensor:
        """As outputs ``[M, ...]``."""
        rows = []
        for s, w in zip(self._rest, self._weights, strict=False):
            if self._complex:  # Re((p + iq)(a + ib)(a' + ib')) = (p a - q b) a' - (p b + q a) b'
                rows += [w.real * s.real - w.imag * s.imag, -(w.real * s.imag + w.imag * s.real)]
            else:
                rows.append(s * w.real)
        return torch.cat([self.delta, self._mean, *rows] if self._differs else rows)

    def driven(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and d of the coupling to an input ``[N, ...]`` that is the same in all phases: in ``difference`` form only
        the difference is sent.
        """
        if self._differs:
            return x, self.delta
        rows = [part for _ in self._rest for part in ((x, torch.zeros_like(x)) if self._complex else (x,))]
        return torch.cat(rows), self.d()


def outer_terms(
    lower: Sequence[Tensor], upper: Sequence[Tensor], weights: Sequence[complex], form: str, driven: bool = False
) -> tuple[Tensor, Tensor]:
    """x and d of `Sides` for one coupling.

    Args:
        lower: States on the input side, one tensor ``[N, ...]`` a phase.
        upper: States on the output side.
        weights: One a phase.
        form: ``difference`` or ``direct``.
        driven: Whether ``lower`` is the same in all phases, as the input is.

    Returns:
        x ``[M, ...]`` and d ``[M, ...]``.
    """
    above = Sides(upper, weights, form)
    return above.driven(lower[0]) if driven else (Sides(lower, weights, form).x(), above.d())


def difference(states: Sequence[Tensor], weights: Sequence[complex]) -> Tensor:
    """``Re sum_k weight_k s_k``: what a bias is sent."""
    return _combine(states, weights)


def _real(s: Tensor) -> Tensor:
    return s.real if s.is_complex() else s


def _mean(states: Sequence[Tensor]) -> Tensor:
    if len(states) == 2:
        return 0.5 * (_real(states[0]) + _real(states[1]))
    return _real(torch.stack(list(states)).mean(0))


def _combine(states: Sequence[Tensor], weights: Sequence[complex]) -> Tensor:
    w = [complex(weight) for weight in weights]
    if len(w) == 2 and w[0] == -w[1] and w[0].imag == 0:
        return (_real(states[0]) - _real(states[1])) * w[0].real
    parts = [
        s.real * v.real - s.imag * v.imag if s.is_complex() else s * v.real for s, v in zip(states, w, strict=True)
    ]
    return torch.stack(parts).sum(0)
