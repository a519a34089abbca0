"""Mean and covariance of features, gathered batch by batch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.metrics.features import FeatureExtractor

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
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: NDArray[np.float64] | None = None
        self._scatter: NDArray[np.float64] | None = None
        self._merged = 0
        self._waiting: list[NDArray[np.float64]] = []

    def update(self, features: Tensor) -> None:
        """Add a batch of features, (B, F).

        Raises:
            DataError: Features that are not finite.
        """
        rows = features.detach().cpu().numpy().astype(np.float64)
        if not np.isfinite(rows).all():
            raise DataError(
                "Some image's features are not finite numbers.", "Check the images and the extractor's weights."
            )
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
        scatter = centered.T @ centered
        if self._mean is None or self._scatter is None:
            self._mean, self._scatter, self._merged = mean, scatter, len(block)
            return
        total = self._merged + len(block)
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + np.outer(delta, delta) * (self._merged * len(block) / total)
        self._mean = self._mean + delta * (len(block) / total)
        self._merged = total


@dataclass(frozen=True)
class FeatureSet:
    """What is known of a set of images: enough to compare it with another set.

    Attributes:
        extractor: Name of the features.
        weights_hash: SHA-256 of the network's weights; None where a file of statistics does not say.
        count: Number of images; None where a file of statistics does not say.
        statistics: Mean and covariance of the features; None for fewer than two images.
        spatial: Mean and covariance of the spatial features; None where there are none.
        features: (N, F), the features themselves; None where only statistics are known.
        logits: (N, K), what the network classifies the images as; None where unknown.
        source: Where the statistics were read from; None for images that were measured here.
    """

    extractor: str
    weights_hash: str | None
    count: int | None
    statistics: Statistics | None
    spatial: Statistics | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    source: str | None = None

    @property
    def num_images(self) -> int | None:
        """Images that are behind the statistics, or else those whose features are known; None where nothing says."""
        if self.count is not None:
            return self.count
        return None if self.features is None else len(self.features)


def collect(
    extractor: FeatureExtractor,
    batches: Iterable[Tensor],
    total: int,
    progress: Progress | None = None,
) -> FeatureSet:
    """Run an extractor over all images, once.

    Args:
        extractor: The network.
        batches: uint8 images (B, 3, H, W), batch by batch.
        total: How many images there will be, for `progress`.
        progress: Called with the number of images done and the total.

    Raises:
        DataError: No images, images of the wrong kind, or features that are not finite.
    """
    pools: list[Tensor] = []
    logits: list[Tensor] = []
    pool_statistics, spatial_statistics = StreamingStatistics(), StreamingStatistics()
    for images in batches:
        batch = extractor(images)
        pools.append(batch.pool.float())
        if batch.logits is not None:
            logits.append(batch.logits.float())
        if batch.spatial is not None:
            spatial_statistics.update(batch.spatial)
        pool_statistics.update(batch.pool)
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
        features=torch.cat(pools),
        logits=torch.cat(logits) if logits else None,
    )


def read_statistics(path: Path, images: FeatureSet | None = None) -> FeatureSet | None:
    """Read the statistics of a reference file in the ADM evaluator's layout: mu, sigma, and mu_s, sigma_s for sFID.

    Args:
        path: An npz file.
        images: The features of the file's own images (`arr_0`), for precision, recall and KID; None leaves those out.

    Returns:
        The statistics; None where the file has none, and holds images only.

    Raises:
        DataError: Not an npz file, statistics that are incomplete or of shapes that do not fit.
    """
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path} is not an npz file.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            pool = _read_gaussian(archive, path, "mu", "sigma")
            spatial = _read_gaussian(archive, path, "mu_s", "sigma_s")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, ValueError, EOFError, TypeError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read as an npz file: {' '.join(str(error).split())}.") from error
    if pool is None:
        return None
    if images is not None:
        _check_dimension(path, pool, images)
        return replace(images, count=None, statistics=pool, spatial=spatial, source=str(path))
    return FeatureSet("inception", None, None, pool, spatial, source=str(path))


def _check_dimension(path: Path, pool: Statistics, images: FeatureSet) -> None:
    if images.features is not None and images.features.shape[1] != len(pool["mu"]):
        raise DataError(
            f"{path} holds statistics of {len(pool['mu'])} features, but {images.extractor} features are"
            f" {images.features.shape[1]}.",
            "Choose the --features that the file was made with.",
        )


def _read_gaussian(archive: np.lib.npyio.NpzFile, path: Path, mean: str, covariance: str) -> Statistics | None:
    present = [name for name in (mean, covariance) if name in archive.files]
    if not present:
        return None
    if len(present) == 1:
        raise DataError(f"{path} has {present[0]} but lacks {covariance if present[0] == mean else mean}.")
    mu, sigma = archive[mean], archive[covariance]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise DataError(
            f"{path}: {mean} has shape {mu.shape} and {covariance} {sigma.shape}; expected (F,) and (F, F)."
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{path}: {mean} or {covariance} holds numbers that are not finite.")
    return Statistics(mu=mu.astype(np.float64), sigma=sigma.astype(np.float64))
