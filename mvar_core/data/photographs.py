"""The bundled photographs: crops of the two pictures that scikit-learn ships, real images that need no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mvar_core.data.sources import ImageSource
from mvar_core.data.transforms import Pixels, cut, resize_and_crop
from mvar_core.errors import DataError, nearest

SPLITS = ("train", "test")
CLASS_NAMES = ("china", "flower")
CROPS = {"train": 1024, "test": 64}
"""Crops of each photograph."""
HELD_OUT = slice(256, 384)
"""Columns of the photographs that are the split test; nothing of them is in train."""


class PhotographsSource(ImageSource):
    """Crops of two photographs of 427×640 pixels, a temple and a flower: 2,048 of them to train on, 128 to test on.

    A vertical strip of 128 columns, a fifth of each photograph, is held out: test crops lie within it, training crops
    left or right of it. Crops keep the photographs' own pixels, in any size up to the strip's width; larger sizes are
    enlarged. The split train has two parts beside the strip, and a crop lies in one of them.

    Args:
        split: train or test.

    Raises:
        DataError: Another split.
    """

    in_memory = True

    def __init__(self, split: str = "train"):
        if split not in SPLITS:
            raise DataError(f"photographs has no split {split!r}. {nearest(split, SPLITS)}")
        from sklearn.datasets import load_sample_image

        count = CROPS[split]
        super().__init__(
            name="photographs",
            split=split,
            class_names=list(CLASS_NAMES),
            labels=np.repeat(np.arange(len(CLASS_NAMES), dtype=np.int64), count),
            item_names=[f"photographs/{name}-{split}-{number:04d}" for name in CLASS_NAMES for number in range(count)],
        )
        self._areas: list[list[Pixels]] = []
        for name in CLASS_NAMES:
            pixels = load_sample_image(f"{name}.jpg")
            sides = [pixels[:, : HELD_OUT.start], pixels[:, HELD_OUT.stop :]]
            self._areas.append([pixels[:, HELD_OUT]] if split == "test" else sides)

    def read(self, index: int, image_shape: tuple[int, int]) -> Pixels:
        """One crop of `image_shape` (height, width), always the same for the same index: uint8 (H, W, 3)."""
        return self._crop(index, image_shape, np.random.default_rng((SPLITS.index(self.split), index)))

    def random_crop(
        self, index: int, image_shape: tuple[int, int], smallest: float, random: np.random.Generator
    ) -> Pixels:
        """Another crop of the photograph that the image was cut from, at a place that `random` chooses."""
        return self._crop(index, image_shape, random)

    def _crop(self, index: int, image_shape: tuple[int, int], random: np.random.Generator) -> Pixels:
        areas = self._areas[int(self.labels[index])]
        # Each part as often as it has places, so that every place is as likely.
        places = np.array([max(1, area.shape[1] - image_shape[1] + 1) for area in areas], np.float64)
        area = areas[int(random.choice(len(areas), p=places / places.sum()))]
        if area.shape[0] < image_shape[0] or area.shape[1] < image_shape[1]:
            return np.asarray(resize_and_crop(Image.fromarray(area), image_shape))
        return cut(area, image_shape, random)
