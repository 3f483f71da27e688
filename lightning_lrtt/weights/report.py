"""What a load did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_pretrained`; names are the module's, but for ``unexpected``.

    Attributes:
        loaded: Parameters and buffers that were filled.
        missing: Parameters that the file does not have.
        unexpected: Tensors of the file that nothing takes.
        mismatched: Name -> both shapes, where they differ.
        converted: Name -> how the stored values were changed: decoded, rounded, unpermuted, scaled.
        output_scales: Tile -> its output scale, where the weights exceed the device's bounds.
        clipped: Tile -> fraction of C's cells that were clipped or stand at a bound, for bounded devices.
        bytes: Read from the file.
        seconds: From the first to the last tensor.
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    output_scales: dict[str, float] = field(default_factory=dict)
    clipped: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
