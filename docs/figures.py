"""How the scripts beside this file save their figures: small enough for a repository."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image


def save(figure: Figure, name: str, dpi: int) -> None:
    """Write a figure to docs/ as a PNG of at most 64 colours, which lines and text do not miss.

    Args:
        figure: What was drawn.
        name: File name in docs/.
        dpi: Pixels per inch.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    image = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(Path(__file__).with_name(name), optimize=True)
