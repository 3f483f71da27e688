"""Draws docs/performance_step.png from the tables of docs/performance.md: ``python docs/performance.py`` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from figures import save

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PAGE = Path(__file__).with_name("performance.md")
TRAININGS = {
    "dense, fused AdamW": "dense, AdamW",
    "LoRA (peft), fused AdamW": "LoRA (peft), AdamW",
    "LR-TT digital": "LR-TT digital",
    "LR-TT pulsed, light": "LR-TT pulsed, light",
}


def table(heading: str) -> dict[str, list[float]]:
    """The first table whose header begins with ``heading``: numbers of each row by its first cell.

    Raises:
        ValueError: If the page has no such table.
    """
    rows: dict[str, list[float]] = {}
    inside = False
    for line in PAGE.read_text().splitlines():
        if line.startswith(f"| {heading} |"):
            inside = True
        elif inside and line.startswith("|---"):
            continue
        elif inside and line.startswith("|"):
            name, *cells = (cell.strip().strip("*") for cell in line.replace("\\|", "¦").strip("|").split("|"))
            rows[name.replace("¦", "|")] = [float(cell) for cell in cells if cell.replace(".", "", 1).isdigit()]
        elif inside:
            return rows
    raise ValueError(f"{PAGE.name} must have a table that begins with {heading!r}; its script reads the figures there")


def main() -> None:
    """Draws the time of a step beside its peers, and what a pulsed step is made of."""
    times, parts = table("training"), table("part of a step")
    figure, (left, right) = plt.subplots(2, 1, figsize=(8, 3.6), height_ratios=(4, 1.3), layout="constrained")
    shown = [times[name][0] for name in TRAININGS]
    colors = ["0.6" if "LR-TT" not in name else "tab:blue" for name in TRAININGS]
    bars = left.barh(list(TRAININGS.values()), shown, color=colors)
    left.bar_label(bars, [f"{ms:.3f} ms" for ms in shown], padding=3, fontsize=8)
    left.invert_yaxis()
    left.axvline(shown[0], color="0.6", linewidth=0.8, linestyle=":")
    left.set_xlim(0, 1.15 * max(shown))
    left.set_title("one training step, 4096 x 4096, 4096 samples, bf16 autocast", fontsize=9)
    begin = 0.0
    for (name, found), color in zip(parts.items(), plt.get_cmap("tab20").colors, strict=False):
        right.barh(["light"], found[0], left=begin, color=color, label=f"{name.split(' (')[0]}: {found[0]:.0f}")
        begin += found[0]
    right.set_title("a pulsed step with light pulses, µs", fontsize=9)
    right.set_yticks([])
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, "performance_step.png", dpi=90)


if __name__ == "__main__":
    main()
