"""The warning that a tile's learning rate is too large for its input."""

from __future__ import annotations

import math

from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class Stability:
    """Looks at ``tile/<name>/stability`` as it arrives, and warns once a tile.

    Args:
        curvature: Of the loss in a tile's output.
    """

    def __init__(self, curvature: float) -> None:
        self._curvature = curvature
        self._warned: set[str] = set()

    def judge(self, name: str, metrics: dict[str, float]) -> None:
        """Warn if tile ``name`` is beyond the limit; drops an estimate that is not finite."""
        tag = f"tile/{name}/stability"
        estimate = metrics.get(tag, 0.0)
        if not math.isfinite(estimate):
            del metrics[tag]  # a non-finite input; `nonfinite` tells it
        elif self._curvature * estimate > 2.0 and name not in self._warned:
            self._warned.add(name)
            bend = "unit curvature" if self._curvature == 1 else f"curvature {self._curvature:g}"
            rank_zero_warn(
                f"TileMonitor: lr (lambda_max + tr H / r) of tile {name!r} is {estimate:.3g}. As an estimate for a "
                f"loss with {bend} in the tile's output, training diverges above {2 / self._curvature:g}. If the loss "
                "grows, lower lr or tile_lr_scale, or raise the rank; if it does not, give TileMonitor(curvature=...) "
                "what your loss has (softmax cross-entropy: at most 0.5)."
            )
