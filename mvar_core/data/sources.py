"""What a source of labelled images is, wherever its images come from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray

from mvar_core.classes import Classes
from mvar_core.data.decoding import LARGEST_IMAGE, check_image, read_rgb
from mvar_core.data.transforms import random_resized_crop, resize_and_crop
from mvar_core.errors import DataError
from mvar_core.io.pixels import Pixels

Report = Callable[[int, int], None]
"""report(done, total)"""

Randoms = Sequence[np.random.Generator | None]
"""One entry for each crop: None is the centre crop, a generator chooses size and place of a random one."""

Item = TypeVar("Item")
Found = TypeVar("Found")


def in_threads(
    function: Callable[[Item], Found], items: Iterable[Item], ahead: int = 4096
) -> Generator[Found, None, None]:
    """Results of `function` in order; threads compute up to `ahead` of them while the caller works.

    There are a few more threads than cores: decoding releases the interpreter, and some threads wait for the disk.
    """
    pool = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2))
    waiting: deque[Future[Found]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class ImageSource(ABC):
    """Labelled images that can be read one by one, in any order.

    `name` is what the user typed; `labels`, int64 (N,), are the class of each image, and `item_names` its path or id.
    `in_memory` says that reading is so cheap that threads would only be in each other's way.
    """

    in_memory = False
    max_pixels = LARGEST_IMAGE

    def __init__(
        self, name: str, split: str, class_names: Sequence[str], labels: NDArray[np.int64], item_names: Sequence[str]
    ):
        assert len(labels) == len(item_names)
        self.name = name
        self.split = split
        self.class_names = tuple(class_names)
        for class_name in self.class_names:
            if any("\ud800" <= letter <= "\udfff" for letter in class_name):
                raise DataError(f"{name!r} has a class {class_name!r}, whose name is not UTF-8.", "Rename its folder.")
        self.labels = labels
        self.item_names = item_names

    def __len__(self) -> int:
        return len(self.item_names)

    @property
    def classes(self) -> Classes:
        """Names of the classes, as a list to match with others."""
        return Classes.of(self.class_names, origin=self.name)

    @abstractmethod
    def crops(self, index: int, image_shape: tuple[int, int], smallest: float, randoms: Randoms) -> list[Pixels]:
        """Several crops of one image, which is decoded once: uint8 (H, W, 3) each, one for each of `randoms`.

        `smallest` is the smallest random crop, as a fraction of the picture's shorter side.
        """

    def read(self, index: int, image_shape: tuple[int, int]) -> Pixels:
        """One image, resized and cropped to `image_shape` (height, width): uint8 (H, W, 3)."""
        return self.crops(index, image_shape, 1, [None])[0]

    def stored_shapes(
        self, indices: Sequence[int] | None = None, progress: Report | None = None
    ) -> list[tuple[int, int]] | None:
        """Height and width of images, all by default, where they are stored; None for images without a size.

        Every header is read, and the end of every file looked for.
        """
        return None

    def check(self, progress: Report | None = None, indices: Sequence[int] | None = None) -> None:
        """Look for images that cannot be read before slow work starts; arguments and errors as of `stored_shapes`."""
        self.stored_shapes(indices, progress)

    def item_bytes(self, index: int) -> int:
        """Size of an item where it is stored; 0 where that says nothing."""
        return 0

    def captions(self) -> Sequence[str] | None:
        """A text for each image; None where there are none. DataError where only some have one."""
        return None

    def fingerprint(self) -> str:
        """SHA-256 over the names, labels and stored sizes of all items: equal for equal sources, wherever they are."""
        digest = hashlib.sha256("\t".join(self.class_names).encode("utf-8", "surrogateescape"))
        for index, (name, label) in enumerate(zip(self.item_names, self.labels, strict=True)):
            digest.update(f"\n{name}\t{label}\t{self.item_bytes(index)}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def content(self) -> str:
        """What the images are, to the last bit."""
        return f"{self.name}:{self.split} {self.fingerprint()}"


class Subset(ImageSource):
    """Some images of a source, by their numbers there; `held_out` are others to measure on."""

    def __init__(self, source: ImageSource, chosen: Sequence[int], held_out: ImageSource | None = None):
        names = [source.item_names[index] for index in chosen]
        super().__init__(source.name, source.split, source.class_names, source.labels[np.asarray(chosen, int)], names)
        self.source, self.chosen, self.held_out = source, list(chosen), held_out
        self.in_memory, self.max_pixels = source.in_memory, source.max_pixels

    def __str__(self) -> str:
        return f"{self.name}:{self.split}"

    def crops(self, index: int, image_shape: tuple[int, int], smallest: float, randoms: Randoms) -> list[Pixels]:
        """See `ImageSource.crops`."""
        return self.source.crops(self.chosen[index], image_shape, smallest, randoms)

    def stored_shapes(
        self, indices: Sequence[int] | None = None, progress: Report | None = None
    ) -> list[tuple[int, int]] | None:
        """See `ImageSource.stored_shapes`."""
        chosen = self.chosen if indices is None else [self.chosen[index] for index in indices]
        return self.source.stored_shapes(chosen, progress)

    def item_bytes(self, index: int) -> int:
        """See `ImageSource.item_bytes`."""
        return self.source.item_bytes(self.chosen[index])

    def captions(self) -> Sequence[str] | None:
        """See `ImageSource.captions`."""
        found = self.source.captions()
        return None if found is None else [found[index] for index in self.chosen]


def hold_out(source: ImageSource, fraction: float, most: int, seed: int) -> Subset:
    """The images to train on, with others `held_out`: at random, at least one, and never the last of a class."""
    order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(source))
    left = Counter(source.labels.tolist())
    held: list[int] = []
    for index in order.tolist():
        if len(held) < max(1, min(most, round(fraction * len(source)))) and left[int(source.labels[index])] > 1:
            left[int(source.labels[index])] -= 1
            held.append(index)
    if not held:
        raise DataError(f"{source.name} has no class with two images, so that none can be held out.", "Add images.")
    chosen = np.delete(np.arange(len(source)), held).tolist()
    return Subset(source, chosen, Subset(source, sorted(held)))


class StoredSource(ImageSource):
    """Images that are stored as files of any size, on their own or within larger files."""

    @abstractmethod
    def open(self, index: int) -> IO[bytes]:
        """The file of an image, open for reading."""

    def where(self, index: int) -> str:
        """What messages call an image."""
        return self.item_names[index]

    def crops(self, index: int, image_shape: tuple[int, int], smallest: float, randoms: Randoms) -> list[Pixels]:
        """Several crops of one image, see `ImageSource.crops`."""
        picture = read_rgb(lambda: self.open(index), self.where(index), self.max_pixels)
        return [
            np.asarray(resize_and_crop(picture, image_shape))
            if random is None
            else random_resized_crop(picture, image_shape, smallest, random)
            for random in randoms
        ]

    def stored_shapes(
        self, indices: Sequence[int] | None = None, progress: Report | None = None
    ) -> list[tuple[int, int]] | None:
        """See `ImageSource.stored_shapes`."""
        chosen = range(len(self)) if indices is None else indices
        shapes = []

        def shape_of(index: int) -> tuple[int, int]:
            return check_image(lambda: self.open(index), self.where(index), self.max_pixels)

        for shape in in_threads(shape_of, chosen):
            shapes.append(shape)
            if progress is not None:
                progress(len(shapes), len(chosen))
        return shapes

    def content(self) -> str:
        """SHA-256 over the stored bytes of all images in order."""

        def hash_of(index: int) -> str:
            digest = hashlib.sha256()
            with self.open(index) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            return digest.hexdigest()

        return hashlib.sha256("".join(in_threads(hash_of, range(len(self)))).encode()).hexdigest()
