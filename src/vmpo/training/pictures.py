"""Picture files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from vmpo.disk import write_file
from vmpo.features.preprocessing import to_pil


def save_image(image: Tensor, path: Path) -> None:
    """Writes a PNG.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()
    to_pil(image[None])[0].save(buffer, format="PNG")
    write_file(path, buffer.getvalue())


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Writes pictures (N, 3, H, W) as one PNG, row by row; a short last row is filled with grey."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    grid = torch.full((3, rows * height, columns * width), 0.5)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        grid[:, top : top + height, left : left + width] = image
    save_image(grid, path)
