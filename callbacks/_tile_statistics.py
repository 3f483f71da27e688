"""Numbers about tiles, as float64 tensors on their device: nothing here reads anything back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning_lrtt.callbacks._cell_bounds import CellBounds
from torch import Tensor

from lightning_lrtt.nn import TileModule

_POWERS = 4  # squarings of a small Gram matrix: its 16th power
_ROUNDS = 8  # of the power iteration; the estimate of a largest eigenvalue is good to some percent by then
_SMALL = 256  # largest Gram matrix that is squared


@torch.no_grad()
def measure(tiles: Mapping[str, TileModule], bounds: CellBounds) -> dict[str, Tensor]:
    """Norms, effective rank, range of C and shares at bounds of tiles on one device, by tag."""
    names, modules = list(tiles), list(tiles.values())
    arrays = [m for tile in modules for m in (*tile.factors(), tile.matrix)]
    norms = torch._foreach_norm(arrays, 2, torch.float64)
    products = torch.stack([_product(tile) for tile in modules])
    trace, square = products[:, 0], products[:, 1]
    ab = trace.clamp(min=0.0).sqrt().unbind()
    rank = torch.where(square > 0, trace.square() / square, 0.0).unbind()
    out: dict[str, Tensor] = {}
    for i, (name, tile) in enumerate(zip(names, modules, strict=True)):
        at = f"tile/{name}"
        out |= {f"{at}/norm_{array}": norms[3 * i + j] for j, array in enumerate("ABC")}
        low, high = torch.aminmax(tile.matrix)
        out |= {f"{at}/norm_AB": ab[i], f"{at}/effective_rank_AB": rank[i]}
        out |= {f"{at}/min_C": low, f"{at}/mean_C": tile.matrix.mean(), f"{at}/max_C": high}
        out |= {f"{at}/at_bounds_{array}": share for array, share in bounds.shares(tile).items()}
    return out


def _product(tile: TileModule) -> Tensor:
    """``tr G`` and ``tr G^2`` of ``G = (A^T A)(B B^T)`` ``[r, r]``, whose eigenvalues are A B's squared singular values."""
    a, b = (factor.double() for factor in tile.factors())
    gram = (a.t() @ a) @ (b @ b.t())
    return torch.stack([gram.trace(), (gram * gram.t()).sum()])


@torch.no_grad()
def norms(tile: TileModule) -> dict[str, Tensor]:
    """Frobenius norms of A, B, C and A B.

    ``||A B||^2 = tr((A^T A)(B B^T))``: the product ``[d, k]`` is never made.
    """
    a, b = tile.factors()
    arrays = {"A": a, "B": b, "C": tile.matrix}
    out = {name: torch.linalg.vector_norm(m, dtype=torch.float64) for name, m in arrays.items()}
    out["AB"] = _product(tile)[0].clamp(min=0.0).sqrt()
    return out


@torch.no_grad()
def effective_rank(tile: TileModule) -> Tensor:
    """How many directions A B uses: ``(sum s_i^2)^2 / sum s_i^4`` of its singular values s; 0 for A B = 0.

    The participation ratio, between 1 and r. With ``G = (A^T A)(B B^T)`` it is ``tr(G)^2 / tr(G^2)``, so that neither the
    product nor a decomposition, which would wait for the device, is needed.
    """
    trace, square = _product(tile).unbind()
    return torch.where(square > 0, trace.square() / square, 0.0)


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
        trace = rows.square().sum() / rows.shape[0]
        largest = _squared(rows) * trace if min(rows.shape) <= _SMALL else _iterated(rows)
    return (largest + trace / tile.A.shape[1]).double()


def _squared(rows: Tensor) -> Tensor:
    """The largest eigenvalue of ``rows^T rows``, as a share of its trace, from high powers of the smaller Gram matrix.

    ``<P, P G> / <P, P>`` with ``P = G^16 / tr``: the mean of the eigenvalues under the weights ``lambda^32``.
    """
    gram = rows.t() @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.t()
    unit = gram / gram.trace().clamp(min=torch.finfo(gram.dtype).tiny)
    power = unit
    for _ in range(_POWERS):
        power = power @ power
        power = power / power.trace().clamp(min=torch.finfo(gram.dtype).tiny)
    return (power * (power @ unit)).sum() / power.square().sum().clamp(min=torch.finfo(gram.dtype).tiny)


def _iterated(rows: Tensor) -> Tensor:
    """The largest eigenvalue of ``rows^T rows / N`` by a few rounds of power iteration."""
    n, k = rows.shape
    # A fixed start without structure; no generator is touched, so that watching does not change a run.
    v = torch.arange(1, k + 1, device=rows.device, dtype=rows.dtype).square().cos()
    largest = v.new_zeros(())
    for _ in range(_ROUNDS):
        v = v / torch.linalg.vector_norm(v).clamp(min=torch.finfo(v.dtype).tiny)
        v = rows.t() @ (rows @ v) / n
        largest = torch.linalg.vector_norm(v)
    return largest
