"""The cosine between A B and the gradient that dense training would follow."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lrtt.nn import TileModule


class GradientWatch:
    """For one step: gathers each tile's dense gradient ``G = sum D^T x`` ``[d, k]`` from hooks on its calls.

    The sum goes over all calls and micro-batches of the step. It costs the third matrix product that LR-TT saves, and the
    memory of one dense gradient a tile. Loss scaling and clipping multiply G and change no cosine.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    @property
    def armed(self) -> bool:
        """Whether a step is watched."""
        return bool(self._hooks)

    def arm(self, tiles: Mapping[str, TileModule]) -> None:
        """Watch the coming step."""
        if not self._hooks:
            for name, tile in tiles.items():
                hook = partial(self._forward, name)
                self._hooks.append(tile.register_forward_hook(hook, with_kwargs=True))

    def disarm(self) -> None:
        """Take the hooks away and forget the gradients."""
        while self._hooks:
            self._hooks.pop().remove()
        self._gradients.clear()

    def _forward(self, name: str, tile: TileModule, args: Any, kwargs: Any, y: Tensor) -> None:
        if tile.training and y.requires_grad:  # not in evaluation, nor in the first pass of a checkpointed segment
            x = (args[0] if args else kwargs["x"]).detach()
            y.register_hook(partial(self._backward, name, tile, x))

    @torch.no_grad()
    def _backward(self, name: str, tile: TileModule, x: Tensor, grad: Tensor) -> None:
        ndim = getattr(tile, "ndim", 0)
        if ndim and x.dim() == ndim + 1:
            x, grad = x.unsqueeze(0), grad.unsqueeze(0)
        dtype = tile.A.dtype
        with torch.autocast(x.device.type, enabled=False):
            d = tile.samples(grad.to(dtype))
            total = self._gradients.get(name)
            if total is None:
                total = self._gradients[name] = d.new_zeros(tile.tile_shape)
            for offset, rows in tile.patches(x.to(dtype)):
                total.addmm_(d[offset : offset + rows.shape[0]].t(), rows)

    @torch.no_grad()
    def cosines(self, tiles: Mapping[str, TileModule]) -> dict[str, Tensor]:
        """``tile/<name>/cosine_gradient``: of ``-alpha A B`` and G; 1 is the direction of steepest descent.

        ``<A B, G> = sum (A^T G) * B``; 0 where A B or G is 0.
        """
        found = {}
        for name, tile in tiles.items():
            gradient = self._gradients.get(name)
            if gradient is None:  # not called in this step
                continue
            a, b = (factor.double() for factor in tile.factors())
            inner = ((tile.A.detach().t() @ gradient).double() * b).sum() * (-1.0 if tile.config.alpha > 0 else 1.0)
            square = (((a.t() @ a) @ (b @ b.t())).trace()).clamp(min=0.0)
            length = square.sqrt() * torch.linalg.vector_norm(gradient, dtype=torch.float64)
            found[f"tile/{name}/cosine_gradient"] = torch.where(length > 0, inner / length, 0.0)
        return found
