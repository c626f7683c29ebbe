"""Labelled pictures in rows and columns, for a paper: sources side by side (Figures 2, 6, 7), training (Figure 1)."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from torch import Tensor

from vmpo.disk import write_file
from vmpo.reports.figures import LIGHT

WIDTH, GAP, CAPTION = 1.5, 0.05, 1.35
"""Inches: of a picture, between pictures, and of the prompts at the left."""
DPI = 300
FONT = 7.5  # points, as in the captions of papers
STYLE: dict[str, Any] = {"fontsize": FONT, "color": LIGHT.ink, "parse_math": False}
PIXELS = 160  # narrower pictures are shown pixel by pixel


@dataclass(frozen=True)
class PictureGrid:
    """Pictures (3, H, W) in [0, 1] by rows, the columns' titles and the rows' texts."""

    rows: Sequence[Sequence[Tensor]]
    columns: Sequence[str]
    prompts: Sequence[str]


def _width(line: str) -> float:
    """Inches of a line of text."""
    points, _, _ = text_to_path.get_text_width_height_descent(line, FontProperties(size=FONT), ismath=False)
    return float(points) / 72


def wrapped(text: str, width: float, lines: int) -> str:
    """A text in at most `lines` lines that are at most `width` inches wide, cut with an ellipsis if need be."""
    for letters in range(int(width * 72 / (FONT * 0.4)), 1, -1):
        found = textwrap.wrap(text, letters, max_lines=lines, placeholder="…")
        if all(_width(line) <= width for line in found):
            return "\n".join(found)
    return "…"


def draw_grid(grid: PictureGrid) -> Figure:
    """The figure: a row's height is that of its tallest picture; texts are of the size of a paper's captions."""
    heights = [max(WIDTH * p.shape[1] / p.shape[2] for p in row) for row in grid.rows]
    titles = [wrapped(title, WIDTH, 2) for title in grid.columns]
    top = (max(t.count("\n") for t in titles) + 1) * FONT * 1.3 / 72 + GAP
    total_width = CAPTION + 2 * GAP + len(titles) * (WIDTH + GAP)
    total_height = top + sum(heights) + len(heights) * GAP
    figure = Figure(figsize=(total_width, total_height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    y = total_height - top
    for j, text in enumerate(titles):
        x = CAPTION + 2 * GAP + j * (WIDTH + GAP) + WIDTH / 2
        figure.text(x / total_width, (y + GAP) / total_height, text, ha="center", va="bottom", **STYLE)
    for row, prompt, height in zip(grid.rows, grid.prompts, heights, strict=True):
        y -= height
        centre, lines = (y + height / 2) / total_height, max(1, int((height + GAP) * 72 / (FONT * 1.25)))
        text = wrapped(prompt, CAPTION, lines)
        figure.text((CAPTION + GAP) / total_width, centre, text, ha="right", va="center", **STYLE)
        for j, picture in enumerate(row):
            x = CAPTION + 2 * GAP + j * (WIDTH + GAP)
            box = (x / total_width, y / total_height, WIDTH / total_width, height / total_height)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            pixels = np.asarray(picture.clamp(0, 1).permute(1, 2, 0))
            axes.imshow(pixels, interpolation="nearest" if picture.shape[2] <= PIXELS else "antialiased")
        y -= GAP
    return figure


def save_grid_figure(grid: PictureGrid, path: Path) -> None:
    """Writes the figure as PNG at 300 dots an inch.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()
    draw_grid(grid).savefig(buffer, format="png", metadata={"Software": "vmpo"})
    write_file(path, buffer.getvalue())
