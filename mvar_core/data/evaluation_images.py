"""Sets of images to be measured: a folder, an npz file or a named source, always read in batches."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.data.decoding import FORMATS, LARGEST_IMAGE
from mvar_core.data.images import open_images, pixel_batches
from mvar_core.data.sources import ImageSource, Report, StoredSource
from mvar_core.errors import DataError, one_line
from mvar_core.io.files import sha256_of_file
from mvar_core.io.npz import read_npz, read_npz_header
from mvar_core.untrusted import open_regular, read_json

IMAGE_ARRAYS = ("arr_0", "images")
LABEL_ARRAYS = ("labels", "arr_1")
SAMPLE, CLASSES_FILE = re.compile(r"\d{5,}_(\d{1,9})\.png"), "classes.json"
"""How `sample` names its pictures, by number and class; and its list of the classes' names."""
LOSSY_EXTENSIONS = tuple(" ".join(FORMATS[kind] for kind in ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")).split())
MOST_IMAGES = 10_000_000
LARGEST_EXPANSION = 1100
"""How many times larger than its file the content of a zip file can be."""

logger = logging.getLogger("mvar")

ImageShape = tuple[int, int]


class EvaluationImages:
    """Images of one size that can be read from the start any number of times, never all at once.

    `name` is what the user typed; `labels`, int64 (N,), and `class_names` are None where they are not known.
    `num_lossy` are stored with lossy compression, which moves features. `stored_shape` is the height and width that
    some images have where they are stored, if not `image_shape`.
    """

    def __init__(self, name: str, source: ImageSource, image_shape: ImageShape | None):
        self.name = name
        self.source = source
        self.count = len(source)
        has_classes = len(source.class_names) != 1
        self.labels: NDArray[np.int64] | None = source.labels if has_classes else None
        self.class_names = source.class_names or None if has_classes else None
        self.num_lossy = sum(item.lower().endswith(LOSSY_EXTENSIONS) for item in source.item_names)
        if image_shape is not None:
            check_shape(image_shape, name)
        shapes = source.stored_shapes() or ([image_shape] if image_shape is not None else [])
        if not shapes:
            raise DataError(f"{name} has no image size of its own.", "Specify a size to measure at.")
        self.image_shape: ImageShape = image_shape or shapes[0]
        self.stored_shape = next((shape for shape in shapes if shape != self.image_shape), None)
        if self.stored_shape is None:
            return
        sizes = shape_text(self.stored_shape), shape_text(self.image_shape)
        if image_shape is None:
            other = source.item_names[shapes.index(self.stored_shape)]
            raise DataError(
                f"{name} holds images of several sizes: {source.item_names[0]} is {sizes[1]}, {other} is {sizes[0]}"
                " pixels (height×width).",
                "Images are measured as they are, so bring them to one size first.",
            )
        logger.warning("%s: images of %s pixels are resized and cropped to %s.", name, *sizes)

    def batches(self, batch_size: int = 64, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The images `start` up to `stop` in order: uint8 (B, 3, H, W); the last batch may be smaller."""
        rows = range(start, self.count if stop is None else min(stop, self.count))
        for pixels, _ in pixel_batches(self.source, self.image_shape, rows, batch_size):
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def fingerprint(self) -> str:
        """SHA-256 that equal images of an equal form have, wherever they are: of their stored bytes and their size."""
        return hashlib.sha256(f"{self.source.content()} {shape_text(self.image_shape)}".encode()).hexdigest()


def open_evaluation_images(
    text: str, image_shape: ImageShape | None = None, max_pixels: int | None = None
) -> EvaluationImages:
    """Open images for evaluation: whatever `open_images` opens, or an npz (`arr_0` or `images`).

    Images are measured as they are: where no `image_shape` is given they must all have one size. With `image_shape`,
    which suits a reference of photographs, images of another size are resized and cropped as for training.
    """
    path = Path(text).expanduser()
    is_npz = path.suffix.lower() == ".npz"
    source = NpzSource(text, path) if is_npz else open_images(text, max_pixels=max_pixels)
    images = EvaluationImages(text, source, image_shape)
    numbers = [SAMPLE.fullmatch(item) for item in source.item_names]
    if images.labels is None and None not in numbers and (path / CLASSES_FILE).is_file():
        names, labels = read_json(path / CLASSES_FILE), np.array([int(number[1]) for number in numbers if number])
        if not isinstance(names, list) or len(names) <= labels.max() or not all(isinstance(n, str) for n in names):
            raise DataError(
                f"{path / CLASSES_FILE} does not name the classes of {text}.", "Remove it, or sample again."
            )
        images.class_names, images.labels = tuple(names), labels
    return images


class NpzSource(StoredSource):
    """The images of an npz file, best read in order: a compressed array has no other; one at a time is in memory.

    Without labels they are of one class; labels have no names.
    """

    in_memory = True  # one file, read front to back: threads would wait for each other

    def __init__(self, text: str, path: Path):
        self.path = path
        try:
            with open_regular(path) as content, zipfile.ZipFile(content) as archive:
                arrays = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
                array = next((name for name in IMAGE_ARRAYS if name in arrays), None)
                if array is None:
                    found = ", ".join(arrays) or "nothing"
                    hint = "These are statistics of images, which can serve as --reference." if "mu" in arrays else None
                    raise DataError(f"{text} holds no images: expected an array arr_0 or images, found {found}.", hint)
                with archive.open(f"{array}.npy") as file:
                    count, self.shape = _images_header(file, f"{text}, array {array}")
                    promised = file.tell() + count * math.prod(self.shape) * 3
                size = archive.getinfo(f"{array}.npy").file_size
                if count > MOST_IMAGES or size != promised or size > LARGEST_EXPANSION * path.stat().st_size:
                    raise DataError(
                        f"{text} claims to hold {count:,} images, which are not there.", "Write or download it again."
                    )
                labels = next((_labels(archive, name, count, text) for name in LABEL_ARRAYS if name in arrays), None)
        except DataError:
            raise
        except Exception as error:  # whatever a damaged archive makes the readers raise
            problem = f"{text} is not a whole npz file: {one_line(error)[:300]}."
            raise DataError(problem, "Write or download it again.") from None
        self._array = array
        self._file: IO[bytes] | None = None
        self._next = 0
        names: Sequence[str] = ("images",)
        if labels is not None:
            listed = read_npz(path, ("class_names",)).get("class_names", np.array([], "U1"))
            if listed.dtype.kind != "U" or listed.ndim != 1 or 0 < len(listed) <= labels.max():
                raise DataError(
                    f"{text}: the array class_names is {listed.dtype} {listed.shape}; expected a text for each label."
                )
            names = listed.tolist()
        items = [f"{array}[{index}]" for index in range(count)]
        numbers = np.zeros(count, np.int64) if labels is None else labels
        super().__init__(text, "train", names, numbers, items)

    def open(self, index: int) -> IO[bytes]:
        """An image as a file in the format PPM, which is its bytes behind a header."""
        if self._file is None or index < self._next:
            self._file, self._next = zipfile.ZipFile(self.path).open(f"{self._array}.npy"), 0  # noqa: SIM115
            _images_header(self._file, self.where(index))
        height, width = self.shape
        size = height * width * 3
        self._file.seek((index - self._next) * size, 1)
        content = self._file.read(size)
        self._next = index + 1
        if len(content) < size:
            raise EOFError("the file ends before it does")
        return io.BytesIO(b"P6 %d %d 255\n" % (width, height) + content)

    def where(self, index: int) -> str:
        """The file, and the place in its array."""
        return f"{self.path}, {self.item_names[index]}"

    def stored_shapes(self, indices: Any = None, progress: Report | None = None) -> list[ImageShape]:
        """The one size that all have, as often as there are images."""
        return [self.shape] * len(self if indices is None else indices)

    def content(self) -> str:
        """SHA-256 of the file."""
        return sha256_of_file(self.path)


def shape_text(shape: tuple[int, ...]) -> str:
    """Height×width, as messages write it."""
    return f"{shape[0]}×{shape[1]}"


def _images_header(file: IO[bytes], where: str) -> tuple[int, ImageShape]:
    """How many images follow the npy header at the file's position, and their height and width."""
    try:
        shape, fortran_order, dtype = read_npz_header(file)
    except ValueError as error:
        raise DataError(f"{where} is not a numpy array: {error}.") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran_order:
        order = ", stored in Fortran order" if fortran_order else ""
        raise DataError(
            f"{where} is {dtype} {shape}{order}; expected uint8 images (N, height, width, 3), at least one."
        )
    check_shape(shape[1:3], where)
    return shape[0], (shape[1], shape[2])


def check_shape(shape: Sequence[int], where: str) -> None:
    """Raise DataError for a height and width that no image has."""
    if min(shape) < 1 or math.prod(shape) > LARGEST_IMAGE:
        raise DataError(f"{where}: images of {shape[0]}×{shape[1]} pixels; expected 1 to {LARGEST_IMAGE:,} pixels.")


def _labels(archive: zipfile.ZipFile, name: str, count: int, text: str) -> NDArray[np.int64] | None:
    """An array of labels, if it is one: `count` integers. An array that is called labels must be one."""
    with archive.open(f"{name}.npy") as file:
        try:
            shape, _, dtype = read_npz_header(file)
            found = f"{dtype} {shape}"
            if shape == (count,) and dtype.kind in "iu":
                labels = np.frombuffer(file.read(count * dtype.itemsize), dtype).astype(np.int64)
                if len(labels) == count and labels.min() >= 0:
                    return labels
                found = "cut short, or has negative ones"
        except ValueError as error:
            found = one_line(error)
    if name == "labels":
        raise DataError(f"{text}: the array labels is {found}; expected {count} whole numbers from 0.")
    return None
