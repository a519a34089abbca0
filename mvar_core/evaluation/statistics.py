"""What is known of a set of images: features, and their mean and covariance, gathered batch by batch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.features import FeatureExtractor, exact_matmul

BLOCK_ROWS = 256

Progress = Callable[[int, int], None]


class Statistics(TypedDict):
    """The Gaussian that stands for a set of features, in float64: mean (F,) and unbiased covariance (F, F)."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]


class StreamingStatistics:
    """Mean and covariance of rows that arrive in batches, without keeping the rows.

    Rows are merged in blocks of a fixed number, so the result does not depend on how they were batched (Chan, Golub
    and LeVeque 1979 for the merge).

    Args:
        first: Index of the first row among all images, by which an image that cannot be used is named.
    """

    def __init__(self, first: int = 0) -> None:
        self.count = 0
        self._first = first
        self._mean: NDArray[np.float64] | None = None
        self._scatter: NDArray[np.float64] | None = None
        self._merged = 0
        self._waiting: list[NDArray[np.float64]] = []

    def update(self, features: Tensor) -> None:
        """Add a batch of features, (B, F).

        Raises:
            DataError: Features that are not finite; names the first such image.
        """
        check_finite(features, self._first + self.count)
        rows = features.detach().cpu().numpy().astype(np.float64)
        self.count += len(rows)
        self._waiting.append(rows)
        if self.count - self._merged >= BLOCK_ROWS:
            waiting = np.concatenate(self._waiting)
            whole = len(waiting) // BLOCK_ROWS * BLOCK_ROWS
            for start in range(0, whole, BLOCK_ROWS):
                self._merge(waiting[start : start + BLOCK_ROWS])
            self._waiting = [waiting[whole:]]

    def result(self) -> Statistics:
        """Mean and unbiased covariance of all rows so far.

        Raises:
            DataError: Fewer than two rows.
        """
        if self.count < 2:
            raise DataError(f"A covariance needs at least 2 images, found {self.count}.")
        total = StreamingStatistics()
        total._mean, total._scatter, total._merged = self._mean, self._scatter, self._merged
        rest = np.concatenate(self._waiting) if self._waiting else np.empty((0, 0))
        if len(rest):
            total._merge(rest)
        assert total._mean is not None
        assert total._scatter is not None
        return Statistics(mu=total._mean, sigma=total._scatter / (self.count - 1))

    def _merge(self, block: NDArray[np.float64]) -> None:
        mean = block.mean(axis=0)
        centered = block - mean
        self._merge_moments(len(block), mean, centered.T @ centered)

    def _merge_moments(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        if self._mean is None or self._scatter is None:
            self._mean, self._scatter, self._merged = mean, scatter, count
            return
        total = self._merged + count
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + np.outer(delta, delta) * (self._merged * count / total)
        self._mean = self._mean + delta * (count / total)
        self._merged = total


def merge_statistics(parts: Sequence[tuple[int, Statistics]]) -> Statistics:
    """Mean and covariance of the union of sets of at least two rows, whose own are known (Chan et al. 1979)."""
    merged = StreamingStatistics()
    for count, part in parts:
        merged._merge_moments(count, part["mu"], part["sigma"] * (count - 1))
        merged.count += count
    return merged.result()


def check_finite(features: Tensor, first: int = 0) -> None:
    """Raise DataError that names the first image, counted from `first`, whose features (B, F) are not finite."""
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not bool(finite.all()):
        index = first + int((~finite).nonzero()[0, 0])
        raise DataError(
            f"The features of image {index} (counted from 0) are not finite numbers.",
            "Check that image and the extractor's weights.",
        )


def content_keys(images: Tensor) -> Tensor:
    """A number for each image that puts a set into one order, however it was ordered: int64 (B,) of uint8 (B, 3, H, W).

    It is a fixed random projection of the image's bytes, in whole numbers and so exact. A hash would do for images that
    are equal to the bit; this one also hardly changes where another machine decodes a pixel one level higher.
    """
    rows = images.detach().cpu().flatten(1).numpy().astype(np.int64)
    return torch.from_numpy(rows @ _projection(rows.shape[1]))


@lru_cache(maxsize=4)
def _projection(length: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=0)).integers(-(2**20), 2**20, length)


class _Rows:
    """Rows that arrive in batches, in one buffer of the expected size: joining a list would take the memory twice."""

    def __init__(self, expected: int):
        self._expected = expected
        self._buffer: Tensor | None = None
        self._count = 0

    def append(self, rows: Tensor) -> None:
        rows = rows.detach().cpu().float()
        needed = self._count + len(rows)
        if self._buffer is None:
            self._buffer = torch.empty(max(needed, self._expected), rows.shape[1])
        elif needed > len(self._buffer):
            self._buffer = torch.cat([self._buffer[: self._count], torch.empty(needed, rows.shape[1])])
        self._buffer[self._count : needed] = rows
        self._count = needed

    def result(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer[: self._count]


@dataclass(frozen=True)
class FeatureSet:
    """What is known of a set of images: enough to compare it with another set.

    Attributes:
        weights_hash: SHA-256 of the network's weights; None where a file of statistics does not say.
        count: Number of images; None where a file of statistics does not say.
        statistics: Mean and covariance of the features; None for fewer than two images.
        features: (N, F), the features themselves; None where only statistics are known.
        logits: (N, K), what the network classifies the images as; None where unknown.
        labels: int64 (N,), the images' classes; None where unknown.
        content_keys: int64 (N,), see `content_keys`: ties random choices to images rather than to their positions; None
            where unknown.
        source: Where the statistics were read from; None for images that were measured here.
    """

    extractor: str
    weights_hash: str | None
    count: int | None
    statistics: Statistics | None
    spatial: Statistics | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    labels: NDArray[np.int64] | None = None
    content_keys: Tensor | None = None
    source: str | None = None

    @property
    def num_images(self) -> int | None:
        """Images that are behind the statistics, or else those whose features are known; None where nothing says."""
        if self.count is not None:
            return self.count
        return None if self.features is None else len(self.features)

    @property
    def width(self) -> int | None:
        """Number of features, F; None where neither they nor their statistics are known."""
        if self.features is not None:
            return self.features.shape[1]
        return None if self.statistics is None else len(self.statistics["mu"])


def collect(
    extractor: FeatureExtractor,
    batches: Iterable[Tensor],
    total: int,
    progress: Progress | None = None,
    *,
    keep_features: bool = True,
    first: int = 0,
) -> FeatureSet:
    """Run an extractor over all images, once.

    What stays in memory: the statistics, whose size does not depend on the number of images; the logits in float32,
    which the shuffled inception score reads (4 MB per thousand images for Inception's 1008 classes, 40 kB for ten);
    and, only with `keep_features`, the features in float32 (8 MB per thousand images for Inception's 2048).

    Batches are uint8 images (B, 3, H, W), `total` of them; errors count them from `first`. Precision, recall, KID and
    scores per class need the features themselves; FID, sFID and the inception score need none.

    Raises:
        DataError: No images, images of the wrong kind, or features that are not finite.
    """
    features, logits = _Rows(total), _Rows(total)
    keys: list[Tensor] = []
    pool_statistics, spatial_statistics = StreamingStatistics(first), StreamingStatistics(first)
    with exact_matmul():
        for images in batches:
            batch = extractor(images)
            if batch.logits is not None:
                check_finite(batch.logits, first + pool_statistics.count)
                logits.append(batch.logits)
            if batch.spatial is not None:
                spatial_statistics.update(batch.spatial)
            if keep_features:
                features.append(batch.pool)
            pool_statistics.update(batch.pool)
            keys.append(content_keys(images))
            if progress:
                progress(pool_statistics.count, total)
    count = pool_statistics.count
    if count == 0:
        raise DataError("There are no images to measure.")
    return FeatureSet(
        extractor=extractor.name,
        weights_hash=extractor.weights_hash,
        count=count,
        statistics=pool_statistics.result() if count > 1 else None,
        spatial=spatial_statistics.result() if spatial_statistics.count > 1 else None,
        features=features.result(),
        logits=logits.result(),
        content_keys=torch.cat(keys),
    )
