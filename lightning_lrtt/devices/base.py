"""What every device model can say of itself."""

from __future__ import annotations

from typing import ClassVar


class Device:
    """Base of all device models.

    Not a dataclass, so that configuration files may name any subclass by ``class_path``.
    """

    kind: ClassVar[int] = -1  # DeviceKind of the compiled core

    @property
    def granularity(self) -> float:
        """Weight granularity ``g_w``: the step that pulse management counts with."""
        raise NotImplementedError

    @property
    def relaxes(self) -> bool:
        """Whether cells change between updates: decay, diffusion or refresh."""
        return False

    @property
    def planes(self) -> int:
        """Numbers that a cell holds beside the weight that is read: 0, 1 (write noise) or 2 (a pair)."""
        return 0

    def numbers(self) -> dict[str, float]:
        """Every field of the compiled ``DeviceParams`` by name."""
        raise NotImplementedError

    def clipped_power(self, std: float, one_sided: bool = False) -> float:
        """``E[clip(z)^2]`` of ``z ~ N(0, std^2)`` held by cells with this model's bounds.

        Args:
            std: Standard deviation of z.
            one_sided: Held by pairs of such cells, so that the upper bound limits both signs.
        """
        raise NotImplementedError
