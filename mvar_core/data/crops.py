"""Random crops and flips, drawn anew whenever an image is read."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.config.training import DataConfig
from mvar_core.data.sources import ImageSource, reading_threads
from mvar_core.io.pixels import Pixels, from_uint8


class RandomCrops:
    """The images of a source as random crops, and as their mirror images every second time where flips are wanted.

    Size, place and flip follow from (seed, step, row), so a run that resumes sees what it would have seen.

    Args:
        source: Where the images come from; row r is its image r.
        image_shape: Height and width to bring crops to.
        data: `crop_scale` and `flip`.
        seed: Of everything that is drawn.
    """

    def __init__(self, source: ImageSource, image_shape: tuple[int, int], data: DataConfig, seed: int = 0):
        self.source = source
        self.image_shape = image_shape
        self.data = data
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, rows: NDArray[np.int64], step: int = 0) -> Tensor:
        """Crops of some rows for a step: float32 (B, 3, H, W) in [-1, 1].

        Raises:
            DataError: An image cannot be read.
        """
        # A batch that is larger than the data holds a row several times, each with a crop of its own; otherwise a
        # row's crop does not depend on the rest of the batch, which several processes may share.
        seen: Counter[int] = Counter()
        tasks = []
        for row in map(int, rows):
            tasks.append((row, np.random.default_rng((self.seed, step, row, seen[row]))))
            seen[row] += 1
        if self.source.in_memory:
            return from_uint8(np.stack([self._draw(*task) for task in tasks]))
        with ThreadPoolExecutor(min(len(tasks), reading_threads())) as pool:
            return from_uint8(np.stack(list(pool.map(self._draw, *zip(*tasks, strict=True)))))

    def _draw(self, row: int, random: np.random.Generator) -> Pixels:
        pixels = self.source.random_crop(row, self.image_shape, self.data.crop_scale, random)
        mirrored = self.data.flip and random.random() < 0.5
        return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels
