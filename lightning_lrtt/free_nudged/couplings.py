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
    """The same, differentiable by the layer's parameters."""
    if isinstance(layer, TileModule):
        product = layer.config.alpha * (layer.A @ layer.B)
        return layer.weight + product.view(layer.weight.shape)
    weight: Tensor = layer.weight  # type: ignore[assignment]  # every layer here has a weight
    return weight


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


class _OuterProduct(torch.autograd.Function):
    """``<d, x W^T>`` by way of ``G = d^T x``, its gradient: one product of the size of W instead of two."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, d: Tensor) -> Tensor:
        gradient = d.t() @ x
        ctx.save_for_backward(gradient)
        ctx.dtype = weight.dtype
        return (gradient * weight.detach()).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.to(ctx.dtype) * grad, None, None


def couple(layer: nn.Module, x: Tensor, d: Tensor) -> Tensor:
    """``<d, layer(x)>`` without the bias, differentiable by the layer's parameters only.

    On a tile it is the ordinary read, so that backward latches x and d for the pulses; on a plain linear layer only the
    gradient's outer product is computed.

    Shape:
        x ``[M, k]`` (or images), d as the layer's output.
    """
    if isinstance(layer, TileModule):
        return (d * layer.multiply(x)).sum()
    if isinstance(layer, nn.Linear):
        product: Tensor = _OuterProduct.apply(layer.weight, x, d)  # type: ignore[no-untyped-call]  # torch's
        return product
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    convolved: Tensor = layer._conv_forward(x, layer.weight, None)
    return (d * convolved).sum()


def outer_terms(
    lower: Sequence[Tensor], upper: Sequence[Tensor], weights: Sequence[complex], form: str, driven: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows x and d with ``sum d_i x_i^T = Re sum_k weight_k upper_k lower_k^T``.

    ``difference``: with the means m over the phases and ``D = Re sum_k weight_k s_k`` (the weights sum to 0), two
    phases of opposite weight give exactly ``m D'^T + D m'^T``: every product holds a difference, so no traffic
    cancels. More phases add ``sum_k weight_k (s_k - m)(s_k' - m')^T``. ``direct``: the products of each phase as they
    are.

    Args:
        lower: States on the input side, one tensor ``[N, ...]`` a phase.
        upper: States on the output side.
        weights: One a phase.
        form: ``difference`` or ``direct``.
        driven: Whether ``lower`` is the same in all phases, as the input is.

    Returns:
        x ``[M, ...]`` and d ``[M, ...]``.
    """
    if form == "direct":
        return _products(lower, upper, weights)
    delta_upper = _combine(upper, weights)
    if driven:
        return _real(lower[0]), delta_upper
    mean_lower, mean_upper = _mean(lower), _mean(upper)
    x = [mean_lower, _combine(lower, weights)]
    d = [delta_upper, mean_upper]
    if len(weights) > 2:
        more_x, more_d = _products([s - mean_lower for s in lower], [s - mean_upper for s in upper], weights)
        x.append(more_x)
        d.append(more_d)
    return torch.cat(x), torch.cat(d)


def difference(states: Sequence[Tensor], weights: Sequence[complex]) -> Tensor:
    """``Re sum_k weight_k s_k``: what a bias is sent."""
    return _combine(states, weights)


def _products(lower: Sequence[Tensor], upper: Sequence[Tensor], weights: Sequence[complex]) -> tuple[Tensor, Tensor]:
    x, d = [], []
    for low, up, weight in zip(lower, upper, map(complex, weights), strict=True):
        if not up.is_complex():
            x.append(low)
            d.append(up * weight.real)
            continue
        # Re((p + iq)(a + ib)(a' + ib')) = (p a - q b) a' - (p b + q a) b'
        a, b = up.real, up.imag
        x += [low.real, low.imag if low.is_complex() else torch.zeros_like(low)]
        d += [weight.real * a - weight.imag * b, -(weight.real * b + weight.imag * a)]
    return torch.cat(x), torch.cat(d)


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
