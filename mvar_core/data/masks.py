"""Boolean masks (H, W) of pictures: read from a file, made from a box, and resized and cropped as the picture is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvar_core.data.decoding import LARGEST_IMAGE, read_rgb
from mvar_core.data.transforms import crop_geometry
from mvar_core.errors import DataError

Mask = NDArray[np.bool_]


def read_mask(path: Path, max_pixels: int = LARGEST_IMAGE) -> Mask:
    """A mask from an image file: what is white, or nearer to white than to black, belongs to it."""
    return np.asarray(read_rgb(path, max_pixels=max_pixels).convert("L")) >= 128


def box_mask(box: tuple[int, int, int, int], shape: tuple[int, int]) -> Mask:
    """A mask of a box x0, y0, x1, y1 in pixels from the upper left corner; x1 and y1 are the first outside."""
    x0, y0, x1, y1 = box
    height, width = shape
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise DataError(
            f"The box {x0},{y0},{x1},{y1} is not inside a picture of {width} pixels width and {height} height.",
            f"Write x0,y0,x1,y1 with 0 ≤ x0 < x1 ≤ {width} and 0 ≤ y0 < y1 ≤ {height}.",
        )
    mask = np.zeros(shape, np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def crop_kept(kept: Mask, image_shape: tuple[int, int]) -> Mask:
    """Where pixels stay in a picture that `resize_and_crop` has brought to `image_shape`, given where they stay in it.

    A pixel stays where every pixel of the stored picture that it shows, even partly, stays.
    """

    def shown(axis: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first stored pixel that each pixel of the crop shows, and the first that it does not show any more."""
        positions = np.arange(starts[axis], starts[axis] + image_shape[axis])
        return positions * kept.shape[axis] // resized[axis], -(-(positions + 1) * kept.shape[axis] // resized[axis])

    resized, starts = crop_geometry((kept.shape[0], kept.shape[1]), image_shape)
    # Sums over all rectangles from the upper left corner tell how many pixels change within any rectangle.
    sums = np.zeros((kept.shape[0] + 1, kept.shape[1] + 1), np.int64)
    sums[1:, 1:] = (~kept).cumsum(0).cumsum(1)
    (upper, lower), (first, end) = shown(0), shown(1)
    changing = sums[lower][:, end] - sums[upper][:, end] - sums[lower][:, first] + sums[upper][:, first]
    stays: Mask = changing == 0
    return stays
