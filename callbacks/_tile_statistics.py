"""Numbers about a tile, as 0-dim float64 tensors on its device: nothing here reads anything back."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt.nn import TileModule
from lightning_lrtt.ops import A, B, C

_ROUNDS = 8  # of the power iteration; the estimate of a largest eigenvalue is good to some percent by then


@torch.no_grad()
def norms(tile: TileModule) -> dict[str, Tensor]:
    """Frobenius norms of A, B, C and A B.

    ``||A B||^2 = tr((A^T A)(B B^T))``: the product ``[d, k]`` is never made.
    """
    a, b = (factor.double() for factor in tile.factors())
    arrays = {"A": a, "B": b, "C": tile.matrix}
    out = {name: torch.linalg.vector_norm(m, dtype=torch.float64) for name, m in arrays.items()}
    out["AB"] = ((a.t() @ a) * (b @ b.t())).sum().clamp(min=0.0).sqrt()
    return out


@torch.no_grad()
def at_bounds(tile: TileModule) -> dict[str, Tensor]:
    """Share of cells that stand at a bound of their device, for the arrays that have one."""
    fast, visible = tile.config.fast_device, tile.config.visible_device
    a, b = tile.factors()
    out = {}
    for name, number, w, device in (("A", A, a, fast), ("B", B, b, fast), ("C", C, tile.matrix, visible)):
        if device is not None:
            count = torch.ops.lrtt.clip_(w, tile.tile_state, tile.hyper, number, False, tile.cells(number))
            out[name] = count.double() / w.numel()
    return out


def effective_gain(tile: TileModule) -> float:
    """Speed of the effective weight in units of SGD at the same lr: ``alpha^2 s_r r E[B^2]``, 1 for gain 'unit'."""
    config = tile.config
    std = config.reinit_std(tile.tile_shape[1])
    power = std**2 if config.fast_device is None else config.fast_device.clipped_power(std)
    return config.alpha**2 * config.factor_scale * tile.A.shape[1] * power


@torch.no_grad()
def curvature(tile: TileModule, x: Tensor) -> Tensor:
    """``lambda_max + tr H / r`` of the second moment ``H = x^T x / N`` of an input of the tile.

    A convolution's input is unfolded as far as the first chunk of its patches goes.
    """
    ndim = getattr(tile, "ndim", 0)
    if ndim and x.dim() == ndim + 1:
        x = x.unsqueeze(0)
    with torch.autocast(x.device.type, enabled=False):
        _, rows = next(iter(tile.patches(x.detach().to(tile.A.dtype))))
        n, k = rows.shape
        # A fixed start without structure; no generator is touched, so that watching does not change a run.
        v = torch.arange(1, k + 1, device=rows.device, dtype=rows.dtype).square().cos()
        largest = v.new_zeros(())
        for _ in range(_ROUNDS):
            v = v / torch.linalg.vector_norm(v).clamp(min=torch.finfo(v.dtype).tiny)
            v = rows.t() @ (rows @ v) / n
            largest = torch.linalg.vector_norm(v)
        trace = rows.square().sum() / n
    return (largest + trace / tile.A.shape[1]).double()
