"""From a picture to training pixels: resize, crop, views (flip, small affine changes); and masks of pictures.

Shapes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvar_core.config.training import DataConfig
from mvar_core.data.decoding import LARGEST_IMAGE, read_rgb
from mvar_core.errors import DataError
from mvar_core.io.pixels import Pixels

if TYPE_CHECKING:
    from mvar_core.data.sources import ImageSource

Mask = NDArray[np.bool_]
"""Which pixels of a picture (H, W) belong to something."""

_CROPS = 0xC0  # sets the stream of random crops apart from that of the affine changes


def resize_and_crop(image: Image.Image, image_shape: tuple[int, int]) -> Image.Image:
    """Resize a picture until it just covers `image_shape` and cut out the centre.

    The published preparation of images (that of ADM): halve with a box filter while both sides stay at least as long as
    asked, then bicubic, then a centre crop. For a square this brings the shorter side to the square's side.
    """
    height, width = image_shape
    (rows, columns), (top, left) = crop_geometry((image.height, image.width), image_shape)
    return _resize(image, (columns, rows), (width, height)).crop((left, top, left + width, top + height))


def crop_geometry(shape: tuple[int, int], image_shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """What `resize_and_crop` makes of a picture's shape: that of the resized picture, and where the crop begins."""
    (rows, columns), (height, width) = shape, image_shape
    while columns >= 2 * width and rows >= 2 * height:
        rows, columns = rows // 2, columns // 2
    scale = max(height / rows, width / columns)
    rows, columns = max(height, round(rows * scale)), max(width, round(columns * scale))
    return (rows, columns), ((rows - height) // 2, (columns - width) // 2)


def random_resized_crop(
    image: Image.Image, image_shape: tuple[int, int], smallest: float, random: np.random.Generator
) -> Pixels:
    """Resize a picture to a random size that covers `image_shape`, and cut out a random place: uint8 (H, W, 3).

    The crop covers between `smallest` (a fraction) and all of the picture's shorter side (of the side that limits it,
    where `image_shape` is not square). It is never enlarged, unless the picture is smaller than `image_shape`.
    """
    height, width = image_shape
    covering = max(height / image.height, width / image.width)  # resizing by this shows as much as can be shown
    largest = max(covering, min(1.0, covering / smallest if smallest else 1.0))
    # Uniform in the fraction of the picture that is seen, which is covering / scale.
    scale = covering / random.uniform(covering / largest, 1) if largest > covering else covering
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return cut(np.asarray(_resize(image, size, size)), image_shape, random)


def _resize(image: Image.Image, size: tuple[int, int], least: tuple[int, int]) -> Image.Image:
    """Halve an image while it stays at least (width, height) large, then bring it to `size`."""
    while image.width >= 2 * least[0] and image.height >= 2 * least[1]:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def cut(image: Pixels, image_shape: tuple[int, int], random: np.random.Generator) -> Pixels:
    """A random place of an image that is at least `image_shape` large, as a copy."""
    height, width = image_shape
    top = int(random.integers(image.shape[0] - height + 1))
    left = int(random.integers(image.shape[1] - width + 1))
    return np.ascontiguousarray(image[top : top + height, left : left + width])


class Views:
    """The views of every image that become training data: crops, their mirror images, and small affine changes.

    View 0 is the image's centre crop as it is. Its mirror image follows if the configuration asks for flips, then
    `crops` - 1 random crops, each with its mirror image, then `augmented_views` views of the centre crop with a random
    shift, rotation and zoom each; where flips are wanted, every second of them starts from the mirror image. What is
    outside the image repeats its edge. A view depends on (seed, image index, view) alone.
    """

    def __init__(self, data: DataConfig, seed: int = 0):
        self.data = data
        self.seed = seed
        flips = (False, True) if data.flip else (False,)
        crops = ["", *(f"crop-{number}" for number in range(1, data.crops))]
        plain = [(name, crop, flip) for crop, name in enumerate(crops) for flip in flips]
        named = ["-".join(filter(None, (name, "flip" if flip else ""))) or "image" for name, _, flip in plain]
        self.names: tuple[str, ...] = (*named, *(f"augmented-{number + 1}" for number in range(data.augmented_views)))
        # Of each view: the crop that it shows, 0 being the centre, whether it is mirrored, and whether it is augmented.
        self._views = [(crop, flip, False) for _, crop, flip in plain]
        self._views += [(0, flips[number % len(flips)], True) for number in range(data.augmented_views)]

    def __len__(self) -> int:
        return len(self.names)

    def render(
        self, source: ImageSource, image_index: int, image_shape: tuple[int, int], views: Sequence[int]
    ) -> list[Pixels]:
        """Several views of one image, which is read once: uint8 (H, W, 3) each."""
        crops = sorted({self._views[view][0] for view in views})
        randoms = [np.random.default_rng((self.seed, image_index, crop, _CROPS)) if crop else None for crop in crops]
        pixels = dict(zip(crops, source.crops(image_index, image_shape, self.data.crop_scale, randoms), strict=True))
        return [self.apply(pixels[self._views[view][0]], image_index, view) for view in views]

    def apply(self, image: Pixels, image_index: int, view: int) -> Pixels:
        """One view (an index into `names`) of an image of the source, given the crop that it shows."""
        if not 0 <= view < len(self):
            raise IndexError(f"view {view} of {len(self)}")
        _, flip, is_augmented = self._views[view]
        if flip:
            image = np.ascontiguousarray(image[:, ::-1])
        if not is_augmented:
            return image
        uniform = np.random.default_rng((self.seed, image_index, view)).random(4) * 2 - 1
        return affine(
            image,
            shift=(float(uniform[0]) * self.data.shift, float(uniform[1]) * self.data.shift),
            degrees=float(uniform[2]) * self.data.rotate,
            zoom=1 + float(uniform[3]) * self.data.zoom,
        )


def affine(image: Pixels, *, shift: tuple[float, float], degrees: float, zoom: float) -> Pixels:
    """Rotate and zoom an image, uint8 (H, W, 3), about its centre and shift it, bicubic; outside, its edge is repeated.

    The shift is right and down, as fractions of width and height, the rotation counter-clockwise; a zoom above 1 makes
    the content grow.
    """
    height, width = image.shape[:2]
    cosine, sine = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    centre_x, centre_y = width / 2, height / 2
    moved_x, moved_y = centre_x + shift[0] * width, centre_y + shift[1] * height

    def origin(x: float, y: float) -> tuple[float, float]:
        """Where the content of output position (x, y) comes from."""
        x, y = x - moved_x, y - moved_y
        return centre_x + cosine * x - sine * y, centre_y + sine * x + cosine * y

    corners = [origin(x, y) for x in (0, width) for y in (0, height)]
    # Three pixels beyond what the corners reach are enough for the bicubic filter never to see a missing pixel.
    reach = max(max(-x, x - width, -y, y - height) for x, y in corners)
    margin = max(0, math.ceil(reach)) + 3
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    start_x, start_y = origin(0, 0)
    matrix = (cosine, -sine, start_x + margin, sine, cosine, start_y + margin)
    view = Image.fromarray(padded).transform(
        (width, height), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC
    )
    return np.asarray(view)


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
    return np.asarray(changing == 0)
