"""What is known of a set of images: features, and their mean and covariance, accumulated batch by batch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.features import FeatureExtractor, check_features, exact_matmul

BLOCK_ROWS = 256


class Statistics(TypedDict):
    """The Gaussian that stands for a set of features, in float64: mean (F,) and unbiased covariance (F, F)."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]


class StreamingStatistics:
    """Mean and covariance of rows that arrive in batches, without keeping the rows.

    Rows are merged in blocks of a fixed number, so the result does not depend on how they were batched. Errors count
    the images from `first`.
    """

    def __init__(self, first: int = 0) -> None:
        self.count = 0
        self._first = first
        self._blocks: Moments | None = None
        self._waiting: list[NDArray[np.float64]] = []

    def update(self, features: Tensor) -> None:
        """Add a batch of features, (B, F); DataError names the first image whose features are not finite."""
        check_finite(features, self._first + self.count)
        self.count += len(features)
        self._waiting.append(features.detach().cpu().numpy().astype(np.float64))
        if sum(map(len, self._waiting)) >= BLOCK_ROWS:
            rows = np.concatenate(self._waiting)
            whole = len(rows) // BLOCK_ROWS * BLOCK_ROWS
            for start in range(0, whole, BLOCK_ROWS):
                self._blocks = _merge(self._blocks, _moments(rows[start : start + BLOCK_ROWS]))
            self._waiting = [rows[whole:]]

    def result(self) -> Statistics:
        """Mean and unbiased covariance of all rows so far, at least two."""
        if self.count < 2:
            raise DataError(f"A covariance needs at least 2 images, found {self.count}.")
        rest = np.concatenate(self._waiting)
        total = _merge(self._blocks, _moments(rest)) if len(rest) else self._blocks
        assert total is not None
        return Statistics(mu=total[1], sigma=total[2] / (self.count - 1))


Moments = tuple[int, NDArray[np.float64], NDArray[np.float64]]
"""Number of rows, their mean (F,), and the sum of the outer products of their deviations from it (F, F)."""


def _moments(rows: NDArray[np.float64]) -> Moments:
    mean = rows.mean(axis=0)
    return len(rows), mean, (rows - mean).T @ (rows - mean)


def _merge(first: Moments | None, second: Moments) -> Moments:
    """Moments of the union (Chan, Golub and LeVeque 1979)."""
    if first is None:
        return second
    (merged, mean, scatter), (count, other_mean, other_scatter) = first, second
    total, delta = merged + count, other_mean - mean
    scatter = scatter + other_scatter + np.outer(delta, delta) * (merged * count / total)
    return total, mean + delta * (count / total), scatter


def merge_statistics(parts: Iterable[tuple[int, Statistics]]) -> Statistics:
    """Mean and covariance of the union of sets of at least two rows, whose own are known."""
    total = reduce(_merge, ((count, part["mu"], part["sigma"] * (count - 1)) for count, part in parts))
    return Statistics(mu=total[1], sigma=total[2] / (total[0] - 1))


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


@dataclass(frozen=True)
class FeatureSet:
    """What is known of a set of images: enough to compare it with another set; None is what is not known.

    Attributes:
        weights_hash: SHA-256 of the network's weights, which a file of statistics does not say; nor does it `count`.
        statistics: Mean and covariance of the features, of at least two images.
        features: (N, F), the features themselves.
        logits: (N, K), what the network classifies the images as.
        labels: int64 (N,), the images' classes.
        content_keys: int64 (N,), see `content_keys`: ties random choices to images rather than to their positions.
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
        """Images that are behind the statistics, or else those whose features are known."""
        return len(self.features) if self.count is None and self.features is not None else self.count

    @property
    def width(self) -> int | None:
        """Number of features, F."""
        if self.features is not None:
            return self.features.shape[1]
        return None if self.statistics is None else len(self.statistics["mu"])


def collect(
    extractor: FeatureExtractor,
    batches: Iterable[Tensor],
    total: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    keep_features: bool = True,
    first: int = 0,
) -> FeatureSet:
    """Run an extractor over all images, once.

    What stays in memory: the statistics, whose size does not depend on the number of images; the logits in float32,
    which the shuffled inception score reads (4 MB per thousand images for Inception's 1008 classes, 40 kB for ten);
    and, only with `keep_features`, the features in float32 (8 MB per thousand images for Inception's 2048).

    Batches are uint8 images (B, 3, H, W), `total` of them; errors count them from `first`. Precision, recall, KID and
    scores per class need the features themselves; FID, sFID and the inception score need none. DataError for no images,
    another number of them, images of the wrong kind, or features that are not finite.
    """
    rows: dict[str, Any] = {}
    pool, spatial = StreamingStatistics(first), StreamingStatistics(first)
    count = 0
    widths: list[int | None] = []

    with exact_matmul():
        for images in batches:
            if count + len(images) > total:
                raise DataError(f"There are more images than the {total} that were expected.")
            batch = extractor(images)
            check_features(batch, extractor, len(images))
            found = [None if each is None else each.shape[1] for each in batch]
            if found != (widths := widths or found):
                raise DataError(f"The network {extractor.name} returns features of other widths than {widths}.")
            kept = {"content_keys": content_keys(images)}
            pool.update(batch.pool)
            if keep_features:
                kept["features"] = batch.pool.detach().cpu().float()
            if batch.logits is not None:
                check_finite(batch.logits, first + count)
                kept["logits"] = batch.logits.detach().cpu().float()
            if batch.spatial is not None:
                spatial.update(batch.spatial)
            for name, values in kept.items():
                # One buffer for all images: joining a list of batches would take the memory twice.
                if name not in rows:
                    rows[name] = torch.empty(total, *values.shape[1:], dtype=values.dtype)
                rows[name][count : count + len(images)] = values
            count += len(images)
            if progress:
                progress(count, total)
    if count == 0 or count != total:
        raise DataError(f"There are {count} images to measure; expected {total or 'at least 1'}.")
    return FeatureSet(
        extractor=extractor.name,
        weights_hash=extractor.weights_hash,
        count=count,
        statistics=pool.result() if count > 1 else None,
        spatial=spatial.result() if spatial.count > 1 else None,
        **rows,
    )
