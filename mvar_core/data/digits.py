"""The bundled data: scikit-learn's 1,797 handwritten digits, real images that need no download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mvar_core.data.sources import ImageSource
from mvar_core.errors import DataError, nearest
from mvar_core.io.pixels import Pixels

SPLITS = ("train", "test")
TEST_IMAGES = 360


class DigitsSource(ImageSource):
    """Handwritten digits (UCI, 8×8 pixels), split by class into 1,437 training and 360 test images.

    Args:
        split: train or test.

    Raises:
        DataError: Another split.
    """

    in_memory = True

    def __init__(self, split: str = "train"):
        if split not in SPLITS:
            raise DataError(f"digits has no split {split!r}. {nearest(split, SPLITS)}")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        targets = digits.target.astype(np.int64)
        parts = train_test_split(np.arange(len(targets)), test_size=TEST_IMAGES, stratify=targets, random_state=0)
        chosen = np.sort(parts[SPLITS.index(split)])
        super().__init__(
            name="digits",
            split=split,
            class_names=[str(digit) for digit in range(10)],
            labels=targets[chosen],
            item_names=[f"digits/{index:04d}" for index in chosen],
        )
        self._pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)

    def read(self, index: int, image_shape: tuple[int, int]) -> Pixels:
        """One digit, white on black, enlarged (bicubic) to `image_shape` (height, width): uint8 (H, W, 3)."""
        height, width = image_shape
        image = Image.fromarray(self._pixels[index]).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image.convert("RGB"))
