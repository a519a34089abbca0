"""The bundled photographs: crops of the two pictures that scikit-learn ships, real images that need no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mvar_core.data.sources import ImageSource
from mvar_core.data.transforms import cut, resize_and_crop
from mvar_core.errors import DataError, nearest
from mvar_core.io.pixels import Pixels

SPLITS = ("train", "test")
CLASS_NAMES = ("china", "flower")
CROPS = {"train": 1024, "test": 64}
"""Crops of each photograph."""
HELD_OUT = slice(240, 336)
"""Rows of the photographs that are the split test; nothing of them is in train."""


class PhotographsSource(ImageSource):
    """Crops of two photographs of 427×640 pixels, a temple and a flower: 2,048 of them to train on, 128 to test on.

    A horizontal strip of 96 rows, through temple, lake, trees and flower, is held out: test crops lie within it,
    training crops above or below it. Crops keep the photographs' own pixels where they fit; larger sizes are enlarged.

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
            sides = [pixels[: HELD_OUT.start], pixels[HELD_OUT.stop :]]
            self._areas.append([pixels[HELD_OUT]] if split == "test" else sides)

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
        fitting = [area for area in areas if area.shape[0] >= image_shape[0] and area.shape[1] >= image_shape[1]]
        if not fitting:
            return np.asarray(resize_and_crop(Image.fromarray(areas[0]), image_shape))
        # Each part as often as it has places, so that every place is as likely.
        places = np.array([area.shape[0] - image_shape[0] + 1 for area in fitting], np.float64)
        return cut(fitting[int(random.choice(len(fitting), p=places / places.sum()))], image_shape, random)
