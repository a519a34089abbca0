"""What a source of labelled images is, wherever its images come from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mvar_core.data.transforms import Pixels, cut

Progress = Callable[[int, int], None]
"""Called with the number of things done and the total."""


def reading_threads() -> int:
    """How many threads read image files: decoding frees the interpreter, and some of them wait for the disk."""
    return min(16, (os.cpu_count() or 1) + 2)


class ImageSource(ABC):
    """Labelled images that can be read one by one, in any order.

    Attributes:
        name: What the user typed.
        split: Which part of the source this is.
        class_names: One name per class.
        labels: int64 (N,), the class of each image.
        item_names: One path or id per image, N of them.
        in_memory: Whether reading is so cheap that threads would only be in each other's way.
    """

    in_memory = False

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str],
        labels: NDArray[np.int64],
        item_names: Sequence[str],
    ):
        assert len(labels) == len(item_names)
        self.name = name
        self.split = split
        self.class_names = tuple(class_names)
        self.labels = labels
        self.item_names = item_names

    def __len__(self) -> int:
        return len(self.item_names)

    @abstractmethod
    def read(self, index: int, image_shape: tuple[int, int]) -> Pixels:
        """One image, resized and cropped to `image_shape` (height, width): uint8 (H, W, 3).

        Raises:
            DataError: The image cannot be read.
        """

    def random_crop(
        self, index: int, image_shape: tuple[int, int], smallest: float, random: np.random.Generator
    ) -> Pixels:
        """A random crop of one image, resized to `image_shape`: uint8 (H, W, 3).

        A source that does not hand out whole pictures cuts it from the centre crop.

        Args:
            index: Which image.
            image_shape: Height and width of the result.
            smallest: Smallest crop, as a part of the picture's shorter side.
            random: Where size and place are drawn from.

        Raises:
            DataError: The image cannot be read.
        """
        part = random.uniform(smallest, 1) if smallest < 1 else 1.0
        height, width = (round(side / max(part, 0.1)) for side in image_shape)
        return cut(self.read(index, (height, width)), image_shape, random)

    def check(self, progress: Progress | None = None) -> None:  # noqa: B027 - nothing to check is a fair default
        """Look for images that cannot be read before slow work starts.

        Raises:
            DataError: An image is damaged, or is not an image.
        """

    def item_bytes(self, index: int) -> int:
        """Size of an item where it is stored; 0 where that says nothing."""
        return 0

    def fingerprint(self) -> str:
        """SHA-256 over the names, labels and stored sizes of all items: equal for equal sources, wherever they lie."""
        digest = hashlib.sha256("\t".join(self.class_names).encode("utf-8", "surrogateescape"))
        for index, (name, label) in enumerate(zip(self.item_names, self.labels, strict=True)):
            digest.update(f"\n{name}\t{label}\t{self.item_bytes(index)}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
