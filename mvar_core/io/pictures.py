"""Writing pictures: single files and grids, whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mvar_core.io.files import atomic_path
from mvar_core.io.pixels import Pixels


def save_png(image: Pixels | Tensor, path: Path) -> None:
    """Write one image, uint8 (H, W, 3), as PNG; missing folders are made."""
    with atomic_path(path) as temporary:
        Image.fromarray(_as_array(image)).save(temporary, format="PNG")


def make_grid(images: Pixels | Tensor, columns: int, gap: int = 2) -> Pixels:
    """Lay images out in rows of `columns`, `gap` pixels apart, on white: uint8 (N, H, W, 3) → (height, width, 3)."""
    pixels = _as_array(images)
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, image in enumerate(pixels):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_grid(images: Pixels | Tensor, path: Path, columns: int, gap: int = 2) -> None:
    """Write images as one PNG, `columns` to a row; see `make_grid`."""
    save_png(make_grid(images, columns, gap), path)


def _as_array(images: Pixels | Tensor) -> Pixels:
    return images.cpu().numpy() if isinstance(images, Tensor) else images
