"""Real images that need no download: the digits and the photographs that scikit-learn ships."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mvar_core.data.sources import ImageSource, Randoms
from mvar_core.data.transforms import cut, resize_and_crop
from mvar_core.errors import DataError, nearest
from mvar_core.io.pixels import Pixels

SPLITS = ("train", "test")
TEST_DIGITS = 360
PHOTOGRAPHS = ("china", "flower")
CROPS = {"train": 1024, "test": 64}
"""Crops of each photograph."""
HELD_OUT = slice(240, 336)
"""Rows of the photographs that are the split test; nothing of them is in train."""


class DigitsSource(ImageSource):
    """Handwritten digits (UCI, 8×8 pixels), split by class into 1,437 training and 360 test images."""

    in_memory = True

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits  # here: it takes long to import
        from sklearn.model_selection import train_test_split

        number = _split_number("digits", split)
        digits = load_digits()
        targets = digits.target.astype(np.int64)
        splits = train_test_split(np.arange(len(targets)), test_size=TEST_DIGITS, stratify=targets, random_state=0)
        chosen = np.sort(splits[number])
        names = [f"digits/{index:04d}" for index in chosen]
        super().__init__("digits", split, [str(digit) for digit in range(10)], targets[chosen], names)
        self._pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)

    def crops(self, index: int, image_shape: tuple[int, int], smallest: float, randoms: Randoms) -> list[Pixels]:
        """Crops of one digit, white on black, enlarged (bicubic)."""
        digit = Image.fromarray(self._pixels[index])

        def crop(random: np.random.Generator | None) -> Pixels:
            fraction = random.uniform(smallest, 1) if random is not None and smallest < 1 else 1.0
            height, width = (round(side / max(fraction, 0.1)) for side in image_shape)
            pixels = np.asarray(digit.resize((width, height), Image.Resampling.BICUBIC).convert("RGB"))
            return pixels if random is None else cut(pixels, image_shape, random)

        return [crop(random) for random in randoms]


class PhotographsSource(ImageSource):
    """Crops of two photographs of 427×640 pixels, a temple and a flower: 2,048 of them to train on, 128 to test on.

    A horizontal strip of 96 rows, through temple, lake, trees and flower, is held out: test crops lie within it,
    training crops above or below it. Crops keep the photographs' own pixels where they fit; larger sizes are enlarged.
    """

    in_memory = True

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_sample_image

        self._number = _split_number("photographs", split)
        labels = np.repeat(np.arange(len(PHOTOGRAPHS), dtype=np.int64), CROPS[split])
        names = [f"photographs/{name}-{split}-{number:04d}" for name in PHOTOGRAPHS for number in range(CROPS[split])]
        super().__init__("photographs", split, PHOTOGRAPHS, labels, names)
        rows = [HELD_OUT] if split == "test" else [slice(HELD_OUT.start), slice(HELD_OUT.stop, None)]
        pictures = [load_sample_image(f"{name}.jpg") for name in PHOTOGRAPHS]
        self._areas = [[pixels[area] for area in rows] for pixels in pictures]

    def crops(self, index: int, image_shape: tuple[int, int], smallest: float, randoms: Randoms) -> list[Pixels]:
        """For None always the same crop for the same index; else another crop of the same photograph."""
        areas = self._areas[int(self.labels[index])]
        fitting = [area for area in areas if area.shape[0] >= image_shape[0] and area.shape[1] >= image_shape[1]]
        if not fitting:
            return [np.asarray(resize_and_crop(Image.fromarray(areas[0]), image_shape))] * len(randoms)
        # Each area as often as it has places, so that every place is as likely.
        places = np.array([area.shape[0] - image_shape[0] + 1 for area in fitting], np.float64)
        found = []
        for given in randoms:
            random = given or np.random.default_rng((self._number, index))
            found.append(cut(fitting[int(random.choice(len(fitting), p=places / places.sum()))], image_shape, random))
        return found


def _split_number(name: str, split: str) -> int:
    if split not in SPLITS:
        raise DataError(f"{name} has no split {split!r}. {nearest(split, SPLITS)}")
    return SPLITS.index(split)
