"""What a source of labelled images is, wherever its images come from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvar_core.data.decoding import check_image, read_rgb
from mvar_core.data.transforms import random_resized_crop, resize_and_crop
from mvar_core.io.pixels import Pixels

CHECKED_AT_ONCE = 4096
"""Images whose checks wait in line at a time: a thread pool keeps something for each of them."""

Report = Callable[[int, int], None]
"""Called with the number of things done and the total."""

Randoms = Sequence[np.random.Generator | None]
"""One entry for each crop: None is the centre crop, a generator chooses size and place of a random one."""


def reading_threads() -> int:
    """How many threads read image files: decoding frees the interpreter, and some of them wait for the disk."""
    return min(16, (os.cpu_count() or 1) + 2)


class ImageSource(ABC):
    """Labelled images that can be read one by one, in any order.

    Attributes:
        name: What the user typed.
        split: Which split of the source this is.
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
    def crops(self, index: int, image_shape: tuple[int, int], smallest: float, randoms: Randoms) -> list[Pixels]:
        """Several crops of one image, which is decoded once: uint8 (H, W, 3) each.

        Args:
            index: Which image.
            image_shape: Height and width of the results.
            smallest: Smallest random crop, as a fraction of the picture's shorter side.
            randoms: One entry for each crop.

        Raises:
            DataError: The image cannot be read.
        """

    def read(self, index: int, image_shape: tuple[int, int]) -> Pixels:
        """One image, resized and cropped to `image_shape` (height, width): uint8 (H, W, 3)."""
        return self.crops(index, image_shape, 1, [None])[0]

    def check(  # noqa: B027 - nothing to check is a fair default
        self, progress: Report | None = None, indices: Sequence[int] | None = None
    ) -> None:
        """Look for images that cannot be read before slow work starts.

        Args:
            progress: Called with images checked and images to check.
            indices: Which images; all by default.

        Raises:
            DataError: An image is damaged, or is not an image.
        """

    def item_bytes(self, index: int) -> int:
        """Size of an item where it is stored; 0 where that says nothing."""
        return 0

    def fingerprint(self) -> str:
        """SHA-256 over the names, labels and stored sizes of all items: equal for equal sources, wherever they are."""
        digest = hashlib.sha256("\t".join(self.class_names).encode("utf-8", "surrogateescape"))
        for index, (name, label) in enumerate(zip(self.item_names, self.labels, strict=True)):
            digest.update(f"\n{name}\t{label}\t{self.item_bytes(index)}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class StoredSource(ImageSource):
    """Images that are stored as files of any size, on their own or within larger files."""

    @abstractmethod
    def open(self, index: int) -> IO[bytes]:
        """The file of an image, open for reading."""

    def where(self, index: int) -> str:
        """What messages call an image."""
        return self.item_names[index]

    def picture(self, index: int) -> Image.Image:
        """One whole image, RGB and upright.

        Raises:
            DataError: The image cannot be read.
        """
        return read_rgb(lambda: self.open(index), self.where(index))

    def crops(self, index: int, image_shape: tuple[int, int], smallest: float, randoms: Randoms) -> list[Pixels]:
        """Several crops of one image, see `ImageSource.crops`."""
        picture = self.picture(index)
        return [
            np.asarray(resize_and_crop(picture, image_shape))
            if random is None
            else random_resized_crop(picture, image_shape, smallest, random)
            for random in randoms
        ]

    def stored_shapes(self, indices: Iterable[int], progress: Report | None = None) -> list[tuple[int, int]]:
        """Height and width of images where they are stored; every header is read, and the end of every file looked for.

        Raises:
            DataError: An image is missing, cut off short, or not an image.
        """

        def shape_of(index: int) -> tuple[int, int]:
            return check_image(lambda: self.open(index), self.where(index))

        chosen = list(indices)
        shapes = []
        with ThreadPoolExecutor(reading_threads()) as pool:
            try:
                for start in range(0, len(chosen), CHECKED_AT_ONCE):
                    for shape in pool.map(shape_of, chosen[start : start + CHECKED_AT_ONCE]):
                        shapes.append(shape)
                        if progress is not None:
                            progress(len(shapes), len(chosen))
            finally:
                pool.shutdown(cancel_futures=True)
        return shapes

    def digest(self, index: int) -> str:
        """SHA-256 of an image's stored bytes."""
        digest = hashlib.sha256()
        with self.open(index) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def check(self, progress: Report | None = None, indices: Sequence[int] | None = None) -> None:
        """Open images, read their headers and look whether their ends are there."""
        self.stored_shapes(range(len(self)) if indices is None else indices, progress)
