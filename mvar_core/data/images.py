"""Images as training data: opening a source, reading batches."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.config.training import DataConfig
from mvar_core.data.bundled import DigitsSource, PhotographsSource
from mvar_core.data.decoding import LARGEST_IMAGE
from mvar_core.data.folders import FolderSource, split_name
from mvar_core.data.parquet import ParquetSource
from mvar_core.data.shards import IMAGE_KEY, find_shards
from mvar_core.data.sources import ImageSource, in_threads
from mvar_core.data.tar import TarSource
from mvar_core.data.transforms import Views
from mvar_core.errors import DataError, one_line
from mvar_core.io.pixels import Pixels, from_uint8

__all__ = [
    "ImageRows", "ImageSource", "RandomCrops", "Views", "open_images", "pixel_batches", "row_batches", "split_name",
]  # fmt: skip

CACHE_BYTES = 256 * 2**20
"""Largest set of images that `ImageRows` keeps in memory once they have been read."""

READ_AHEAD = 192
"""Images that are being read or wait to be used, three batches of the usual size."""

Rows = Sequence[int] | NDArray[np.int64]


def open_images(source: str | ImageSource, split: str = "train", max_pixels: int | None = None) -> ImageSource:
    """Open what `--data` names: `digits`, `photographs`, a folder of images, tar shards, or parquet or arrow files.

    A folder has one sub-folder per class, or all images in itself, or holds shards, which a pattern can name too:
    `shard-{000..146}.tar`, `shard-*.tar`. A folder called digits is `./digits`. `:test` at the end chooses a split.
    Images of more than `max_pixels` (by default `LARGEST_IMAGE`) are refused when they are read.
    Where samples of tar shards have several images, or tables several columns of them, `NAME:image=KEY` names the
    suffix or the column.
    """
    if isinstance(source, ImageSource):
        return source
    if not source:
        raise DataError("The name of the data is empty.", "Use `digits`, or a folder of images.")
    try:
        given, split = split_name(source, split)
        name, _, image_key = (given, "", "") if Path(given).exists() else given.partition(IMAGE_KEY)
        if name == "digits":
            return DigitsSource(split)
        if name == "photographs":
            return PhotographsSource(split)
        shards = find_shards(name, split)
        if shards is None:
            found: ImageSource = FolderSource(Path(given).expanduser(), split, given)
        else:
            found = (TarSource if shards.suffix == ".tar" else ParquetSource)(shards, image_key or None)
        found.name, found.max_pixels = given, max_pixels or LARGEST_IMAGE
        return found
    except (OSError, RuntimeError) as error:  # links in a circle; "~" without a home
        raise DataError(f"{source[:1000]!r} cannot be read: {one_line(error)[:1000]}.") from None


class ImageRows:
    """Random access to the images and views of a source, brought to `image_shape` (height, width).

    Row r is view r % V of image r // V, where V is the number of views; without views, each image is its only one. A
    set that is small enough is kept in memory once read.
    """

    def __init__(self, source: ImageSource, image_shape: tuple[int, int], views: Views | None = None):
        self.source = source
        self.image_shape = image_shape
        self.views = views or Views(DataConfig())
        self._kept: Pixels | None = None
        if len(self) * image_shape[0] * image_shape[1] * 3 <= CACHE_BYTES:
            self._kept = np.empty((len(self), *image_shape, 3), np.uint8)
            self._known = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self.source) * len(self.views)

    def batch(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The images of B rows, float32 (B, 3, H, W) in [-1, 1], and their labels int64 (B,)."""
        chosen = np.asarray(rows, np.int64)
        labels = torch.from_numpy(self.source.labels[chosen // len(self.views)])
        if self._kept is None:
            return from_uint8(self._read(chosen)), labels
        missing = np.unique(chosen[~self._known[chosen]])
        if len(missing):
            self._kept[missing] = self._read(missing)
            self._known[missing] = True
        return from_uint8(self._kept[chosen]), labels

    def _read(self, rows: NDArray[np.int64]) -> Pixels:
        return next(pixel_batches(self.source, self.image_shape, rows, len(rows), self.views))[0]


class RandomCrops:
    """The images of a source as random crops, half of them mirrored if `data` asks for flips.

    Row r is image r of the source. Size, place and flip follow from (seed, step, row), so a run that resumes sees what
    it would have seen.
    """

    def __init__(self, source: ImageSource, image_shape: tuple[int, int], data: DataConfig, seed: int = 0):
        self.source = source
        self.image_shape = image_shape
        self.data = data
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, rows: NDArray[np.int64], step: int = 0) -> Tensor:
        """Crops of some rows for a step: float32 (B, 3, H, W) in [-1, 1]."""
        # A batch that is larger than the data holds a row several times, each with a crop of its own; otherwise a
        # row's crop does not depend on the rest of the batch, which several processes may share.
        seen: Counter[int] = Counter()
        tasks = []
        for row in map(int, rows):
            tasks.append((row, np.random.default_rng((self.seed, step, row, seen[row]))))
            seen[row] += 1

        def crop(task: tuple[int, np.random.Generator]) -> Pixels:
            row, random = task
            pixels = self.source.crops(row, self.image_shape, self.data.crop_scale, [random])[0]
            mirrored = self.data.flip and random.random() < 0.5
            return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels

        return from_uint8(np.stack(list((map if self.source.in_memory else in_threads)(crop, tasks))))


def pixel_batches(
    source: ImageSource,
    image_shape: tuple[int, int],
    indices: Rows | None = None,
    batch_size: int = 64,
    views: Views | None = None,
) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
    """Images in order, batch by batch; threads read the next ones while the caller works on this batch.

    `indices` are rows, all by default: image indices, or image · V + view where `views` has V views.

    Yields:
        Pixels uint8 (B, H, W, 3) and labels int64 (B,).
    """
    views = views or Views(DataConfig())
    rows = np.arange(len(source) * len(views)) if indices is None else np.asarray(indices, np.int64)
    batches = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    for pixels, kept in row_batches(source, image_shape, batches, views):
        assert pixels is not None
        yield pixels, source.labels[kept // len(views)]


def row_batches(
    source: ImageSource,
    image_shape: tuple[int, int],
    batches: Iterable[NDArray[np.int64]],
    views: Views,
    on_bad: Callable[[int, DataError], None] | None = None,
) -> Iterator[tuple[Pixels | None, NDArray[np.int64]]]:
    """Batches of given rows, as `pixel_batches` reads them.

    `on_bad` is called with the index of an image that cannot be read, and why, and its rows are left out; without it
    the error is raised.

    Yields:
        uint8 (B, H, W, 3), or None where no row of a batch is left, and the rows int64 (B,).
    """
    num_views = len(views)

    def tasks(batch: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Neighbouring rows of one image together, so that its file is decoded once for all of its views."""
        return np.split(batch, np.flatnonzero(np.diff(batch // num_views)) + 1)

    def read(rows: NDArray[np.int64]) -> list[Pixels] | DataError:
        image = int(rows[0]) // num_views
        try:
            return views.render(source, image, image_shape, (rows % num_views).tolist())
        except DataError as error:
            if on_bad is None:
                raise
            return error

    to_read, to_return = itertools.tee(batches)
    every_task = (task for batch in to_read for task in tasks(batch))
    with closing(
        (read(task) for task in every_task) if source.in_memory else in_threads(read, every_task, READ_AHEAD)
    ) as results:
        for batch in to_return:
            pixels, kept = [], []
            for task in tasks(batch):
                result = next(results)
                if isinstance(result, DataError):
                    assert on_bad is not None
                    on_bad(int(task[0]) // num_views, result)
                else:
                    pixels += result
                    kept.append(task)
            yield (np.stack(pixels), np.concatenate(kept)) if pixels else (None, batch[:0])
