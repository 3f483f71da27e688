"""Metrics and Givens rotors: pure functions of their inputs, nothing is changed in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def diagonal(v: Tensor, g: Tensor) -> Tensor:
    """``sum_i g_i v_i^2``: v ``[..., n]``, g ``[n]``."""
    return (v * v) @ g


def full(v: Tensor, g: Tensor) -> Tensor:
    """``v^T G v`` with one matrix ``[n, n]`` for all v ``[..., n]``."""
    return ((v @ g) * v).sum(-1)


def batched(v: Tensor, g: Tensor) -> Tensor:
    """``v^T G_b v`` with a matrix for each sample: v ``[B, ..., n]``, G ``[B, n, n]``."""
    flat = v.reshape(v.shape[0], -1, v.shape[-1])
    return ((flat @ g) * flat).sum(-1).view(v.shape[:-1])


def low_rank(v: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    """``v^T (diag(g) + U diag(D) U^T) v`` without the matrix: g ``[n]``, U ``[n, r]``, D ``[r]`` >= 0.

    Raises:
        ValueError: If shapes do not fit. D is not checked: that would wait for the device.
    """
    if u.dim() != 2 or u.shape[0] != g.shape[0] or d.shape != u.shape[1:]:
        raise ValueError(
            f"low_rank: U must be [n, r] and D [r] for n = {len(g)}, got {list(u.shape)} and {list(d.shape)}"
        )
    return (v * v) @ g + ((v @ u) ** 2) @ d


class GivensRotor(nn.Module):
    """A product of k plane rotations of n coordinates, arranged in layers of disjoint pairs.

    ``P = n // 2`` pairs a layer, ``ceil(k / P)`` layers; pair p of layer l turns ``a = (2 p + l) mod n`` into
    ``b = (a + 1) mod n``: ``va' = cos va - sin vb``, ``vb' = sin va + cos vb``. All pairs of a layer turn at once.

    Args:
        n: Coordinates, >= 2.
        k: Angles, >= 1; the last layer may be incomplete.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        if n < 2 or k < 1:
            raise ValueError(f"GivensRotor: n must be >= 2 and k >= 1, got n = {n}, k = {k}")
        self.n, self.k = n, k
        self.angles = nn.Parameter(torch.zeros(k))
        pairs = n // 2
        index = torch.arange(k)
        first = (2 * (index % pairs) + index // pairs % n) % n
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", (first + 1) % n, persistent=False)
        self.sizes = [min(pairs, k - start) for start in range(0, k, pairs)]

    def forward(self, v: Tensor, angles: Tensor | None = None) -> Tensor:
        """Turn the last dimension of v; differentiable by v and the angles."""
        angles = self.angles if angles is None else angles
        start = 0
        for size in self.sizes:
            span = slice(start, start + size)
            a, b = self.first[span], self.second[span]
            cos, sin = angles[span].cos(), angles[span].sin()
            va, vb = v.index_select(-1, a), v.index_select(-1, b)
            v = v.index_copy(-1, torch.cat([a, b]), torch.cat([cos * va - sin * vb, sin * va + cos * vb], -1))
            start += size
        return v

    def matrix(self, angles: Tensor | None = None) -> Tensor:
        """R ``[n, n]`` with ``forward(v) = v R^T``."""
        return self.forward(torch.eye(self.n, dtype=self.angles.dtype, device=self.angles.device), angles).t()

    @torch.no_grad()
    def project(self) -> None:
        """Wrap the angles to ``[-pi, pi)``."""
        self.angles.copy_(torch.remainder(self.angles + torch.pi, 2 * torch.pi) - torch.pi)
