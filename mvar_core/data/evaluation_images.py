"""Sets of images to be measured: a folder, an npz file or a named source, always read in batches."""

from __future__ import annotations

import hashlib
import logging
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvar_core.data.images import open_images, pixel_batches
from mvar_core.data.sources import ImageSource, StoredSource, reading_threads
from mvar_core.data.transforms import resize_and_crop
from mvar_core.errors import DataError, one_line
from mvar_core.io.files import sha256_of_file
from mvar_core.io.pixels import Pixels

IMAGE_ARRAYS = ("arr_0", "images")
LABEL_ARRAYS = ("labels", "arr_1")
LOSSY_EXTENSIONS = (".jpg", ".jpeg", ".webp")

logger = logging.getLogger("mvar")

ImageShape = tuple[int, int]


class EvaluationImages(ABC):
    """Images of one size that can be read from the start any number of times, never all at once.

    Attributes:
        name: What the user typed.
        image_shape: Height and width in pixels.
        labels: int64 (N,), or None where they are not known.
        num_lossy: How many images are stored with lossy compression, which moves features.
        stored_shape: Height and width that some images have where they are stored, if not `image_shape`.
    """

    def __init__(
        self,
        name: str,
        count: int,
        found: ImageShape,
        wanted: ImageShape | None,
        labels: NDArray[np.int64] | None = None,
        class_names: tuple[str, ...] | None = None,
        num_lossy: int = 0,
    ):
        self.name = name
        self.count = count
        self.image_shape = wanted or found
        self.stored_shape = found if found != self.image_shape else None
        self.labels = labels
        self.class_names = class_names
        self.num_lossy = num_lossy
        if self.stored_shape is not None:
            sizes = shape_text(self.stored_shape), shape_text(self.image_shape)
            logger.warning("%s: images of %s pixels are resized and cropped to %s.", name, *sizes)

    def batches(self, batch_size: int = 64, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The images `start` up to `stop` in order: uint8 (B, 3, H, W); the last batch may be smaller.

        Raises:
            DataError: An image cannot be read.
        """
        stop = self.count if stop is None else min(stop, self.count)
        for pixels in self._read(batch_size, start, stop):
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def fingerprint(self) -> str:
        """SHA-256 that equal images of an equal form have, wherever they are: of their stored bytes and their size."""
        return hashlib.sha256(f"{self._content()} {shape_text(self.image_shape)}".encode()).hexdigest()

    @abstractmethod
    def _read(self, batch_size: int, start: int, stop: int) -> Iterator[Pixels]: ...

    @abstractmethod
    def _content(self) -> str: ...


def open_evaluation_images(text: str, image_shape: ImageShape | None = None) -> EvaluationImages:
    """Open images for evaluation: whatever `open_images` opens, or an npz (`arr_0` or `images`).

    Images are measured as they are: where no `image_shape` is given they must all have one size. With `image_shape`,
    which suits a reference of photographs, images of another size are resized and cropped as for training.

    Raises:
        DataError: No such images, images of several sizes, or an npz without uint8 images (N, H, W, 3).
    """
    path = Path(text).expanduser()
    if path.suffix.lower() == ".npz":
        return _NpzImages(text, path, image_shape)
    return _SourceImages(text, open_images(text), image_shape)


class _SourceImages(EvaluationImages):
    """Images of a folder, of shards, or bundled ones."""

    def __init__(self, text: str, source: ImageSource, wanted: ImageShape | None):
        self.source = source
        stored = isinstance(source, StoredSource)
        found = self._common_shape(wanted)
        has_classes = not stored or len(source.class_names) > 1
        labels, class_names = (source.labels, source.class_names) if has_classes else (None, None)
        num_lossy = sum(name.lower().endswith(LOSSY_EXTENSIONS) for name in source.item_names)
        super().__init__(text, len(source), found, wanted, labels, class_names, num_lossy)

    def _common_shape(self, wanted: ImageShape | None) -> ImageShape:
        """The size that all images have; where one is wanted, the size of one image that differs, if any."""
        source = self.source
        if not isinstance(source, StoredSource):
            if wanted is None:
                raise DataError(f"{source.name} has no image size of its own.", "Specify a size to measure at.")
            return wanted
        shapes = source.stored_shapes(range(len(source)))
        expected = wanted or shapes[0]
        other = next((index for index, shape in enumerate(shapes) if shape != expected), None)
        if other is None:
            return expected
        if wanted is None:
            raise DataError(
                f"{source.name} holds images of several sizes: {source.item_names[0]} is {shape_text(expected)},"
                f" {source.item_names[other]} is {shape_text(shapes[other])} pixels (height×width).",
                "Images are measured as they are, so bring them to one size first.",
            )
        return shapes[other]

    def _read(self, batch_size: int, start: int, stop: int) -> Iterator[Pixels]:
        for pixels, _ in pixel_batches(self.source, self.image_shape, range(start, stop), batch_size):
            yield pixels

    def _content(self) -> str:
        """What the images are: every file's bytes in order, or for bundled data its name."""
        if not isinstance(self.source, StoredSource):
            return f"{self.source.name}:{self.source.split} {self.source.fingerprint()}"
        digest = hashlib.sha256()
        with ThreadPoolExecutor(reading_threads()) as pool:
            for content in pool.map(self.source.digest, range(len(self.source))):
                digest.update(content.encode())
        return digest.hexdigest()


class _NpzImages(EvaluationImages):
    """An array of an npz file, read front to back: nothing but one batch is ever in memory."""

    def __init__(self, text: str, path: Path, wanted: ImageShape | None):
        if not path.is_file():
            raise DataError(f"{text} does not exist.")
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
                array = next((name for name in IMAGE_ARRAYS if name in arrays), None)
                if array is None:
                    found = ", ".join(arrays) or "nothing"
                    hint = "These are statistics of images, which can serve as --reference." if "mu" in arrays else None
                    raise DataError(f"{text} holds no images: expected an array arr_0 or images, found {found}.", hint)
                self.array = f"{array}.npy"
                with archive.open(self.array) as file:
                    self.shape = _read_header(file, f"{text}, array {array}")
                labels = (_read_labels(archive, name, self.shape[0]) for name in LABEL_ARRAYS if name in arrays)
                super().__init__(text, self.shape[0], self.shape[1:], wanted, next(labels, None))
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise _damaged(text, error) from None

    def _read(self, batch_size: int, start: int, stop: int) -> Iterator[Pixels]:
        count, height, width = self.shape
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.array) as file:
                _read_header(file, f"{self.name}, array {self.array}")
                if start:
                    file.seek(start * height * width * 3, 1)
                for first in range(start, stop, batch_size):
                    size = min(batch_size, stop - first)
                    wanted = size * height * width * 3
                    content = file.read(wanted)
                    if len(content) < wanted:
                        raise EOFError(f"it ends within images {first} to {first + size - 1} of {count}")
                    pixels = np.frombuffer(content, np.uint8).reshape(size, height, width, 3)
                    if self.stored_shape is not None:
                        resized = (resize_and_crop(Image.fromarray(image), self.image_shape) for image in pixels)
                        pixels = np.stack([np.asarray(image) for image in resized])
                    yield pixels
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
            raise _damaged(self.name, error) from None

    def _content(self) -> str:
        return sha256_of_file(self.path)


def shape_text(shape: tuple[int, ...]) -> str:
    """Height×width, as messages write it."""
    return f"{shape[0]}×{shape[1]}"


def _damaged(text: str, error: Exception) -> DataError:
    return DataError(f"{text} is not a whole npz file: {one_line(error)}.", "Write or download it again.")


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _read_header(file: IO[bytes], where: str) -> tuple[int, int, int]:
    """Number, height and width of the images whose npy header is at the file's position."""
    try:
        shape, fortran_order, dtype = _npy_header(file)
    except ValueError as error:
        raise DataError(f"{where} is not a numpy array: {error}.") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0 or fortran_order:
        order = ", stored in Fortran order" if fortran_order else ""
        raise DataError(
            f"{where} is {dtype} {shape}{order}; expected uint8 images (N, height, width, 3), N at least 1."
        )
    return shape[0], shape[1], shape[2]


def _read_labels(archive: zipfile.ZipFile, name: str, count: int) -> NDArray[np.int64] | None:
    """An array of labels, if it is one: `count` integers."""
    with archive.open(f"{name}.npy") as file:
        try:
            shape, _, dtype = _npy_header(file)
        except ValueError:
            return None
        if shape != (count,) or not np.issubdtype(dtype, np.integer):
            return None
        return np.frombuffer(file.read(), dtype).astype(np.int64)
