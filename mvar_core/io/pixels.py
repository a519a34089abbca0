"""Images as bytes, as the values that models read (with the one rule that converts them), and as PNG."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvar_core.io.files import atomic_path

Pixels = NDArray[np.uint8]
"""An image as bytes (H, W, 3)."""


def to_uint8(images: Tensor) -> Tensor:
    """Pixels uint8 (B, H, W, 3) of decoded images (B, 3, H, W): clamp, then truncation of (x+1)/2·255, as published."""
    scaled = images.float().clamp(-1, 1).add(1).mul(0.5).mul(255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_uint8(pixels: Tensor | np.ndarray) -> Tensor:
    """Pixels as the models read them: float32 (B, 3, H, W) in [-1, 1] from uint8 (B, H, W, 3).

    `to_uint8` returns exactly these pixels.
    """
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    planes = pixels.permute(0, 3, 1, 2).contiguous()
    return _levels().to(planes.device).index_select(0, planes.flatten().int()).view(planes.shape)


@cache
def _levels() -> Tensor:
    """The number in [-1, 1] for each of the 256 levels, lifted by an ulp where truncation would lose the level."""
    levels = torch.arange(256)
    values = (levels.double() / 127.5 - 1).float()
    while True:
        lost = to_uint8(values.view(1, 1, 1, 256)).flatten() != levels
        if not lost.any():
            return values
        values = torch.where(lost, torch.nextafter(values, torch.ones(())), values)


def make_grid(images: Pixels | Tensor, columns: int, gap: int = 2) -> Pixels:
    """Lay images out in rows of `columns`, `gap` pixels apart, on white: uint8 (N, H, W, 3) → (height, width, 3)."""
    pixels = images.cpu().numpy() if isinstance(images, Tensor) else images
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, image in enumerate(pixels):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(image: Pixels, path: Path) -> None:
    """Write one image as PNG, whole or not at all; missing folders are made."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")
