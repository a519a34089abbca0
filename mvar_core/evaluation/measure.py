"""One pass over a set of images, shared by the processes of a job; and what images are compared with.

A process measures a contiguous block of the images. Features that a cache knows are not measured again. One npz layout
serves the cache and references, which say what they were measured with: mu, sigma, mu_s, sigma_s in float64, laid out
as in the ADM evaluator's files; features (N, F) and logits (N, K) in float32; labels and content_keys (N,) int64; each
where known; and `record`, a JSON text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from mvar_core import __version__
from mvar_core.config.presets import load_config
from mvar_core.data.evaluation_images import EvaluationImages, ImageShape, open_evaluation_images
from mvar_core.data.images import split_name
from mvar_core.distributed import world
from mvar_core.errors import DataError, MvarError, one_line
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.statistics import FeatureSet, Statistics, collect, merge_statistics
from mvar_core.io.files import atomic_path
from mvar_core.io.npz import read_npz
from mvar_core.progress import Progress, stage
from mvar_core.untrusted import check_whole, parse_json

logger = logging.getLogger("mvar")

IMAGES_PER_PROCESS = 2
"""A process needs a covariance of its own to merge."""
DEFAULT_BATCH = 64

FORMAT = "mvar-reference-1"
"""Version of the layout, in references and in caches of features."""

RECORD = "record"
ROWS = {"features": ("float32", 2), "logits": ("float32", 2), "content_keys": ("int64", 1), "labels": ("int64", 1)}


class ImageSet(Protocol):
    """Images that can be measured: read from disk, or made when they are needed."""

    name: str
    count: int
    image_shape: ImageShape
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """The images `start` up to `stop`, uint8 (B, 3, H, W)."""

    def fingerprint(self) -> str | None:
        """What stands for the images in a cache; None where they are not known before they are made."""


@dataclass
class Measurer:
    """Measures sets of images with one network.

    `cache` is a directory of features, an npz file for each content of images and network; a file that cannot be used
    counts as absent. With `keep_features` single images' features are needed, not only their mean and covariance.
    """

    extractor: FeatureExtractor
    cache: str | Path | None = None
    keep_features: bool = True
    batch_size: int | None = None
    progress: Progress | None = None

    def measure(self, images: ImageSet, title: str) -> FeatureSet:
        """Features of all images, in every process; `title` is what the progress is called."""
        path, known = world().run_on_rank_zero(lambda: self._cached(images))
        if known is not None:
            logger.info("%s: features of %s images are taken from the cache.", title, f"{images.count:,}")
            return replace(known, labels=images.labels)
        own = shards(images.count)[world().rank]
        local = collect(
            self.extractor,
            images.batches(self.batch_size or DEFAULT_BATCH, own.start, own.stop),
            len(own),
            stage(self.progress, title),
            keep_features=self.keep_features,
            first=own.start,
        )
        found = merge_features(local, images.count)
        if path is not None and world().is_rank_zero:
            try:
                write_features(path, found, {"key": path.stem})
            except (MvarError, OSError) as error:  # what was measured is worth more than the cache
                logger.warning("The features are not cached: %s", error)
        return replace(found, labels=images.labels)

    def _cached(self, images: ImageSet) -> tuple[Path | None, FeatureSet | None]:
        """The file of these features in the cache, and the features, where it has all that are needed."""
        content = None if self.cache is None else images.fingerprint()
        if self.cache is None or content is None:
            return None, None
        parts = [FORMAT, self.extractor.name, self.extractor.weights_hash, content, images.count]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        path = Path(self.cache) / f"{key}.npz"
        if not os.path.lexists(path):
            return path, None
        try:
            found, description = read_features(path)
            if description != {"key": key}:
                raise DataError(f"{path} holds other features.")
        except DataError as error:
            logger.warning("%s is measured again: %s", path, error.message)
            return path, None
        return path, None if found is None or (self.keep_features and found.features is None) else found


LIMITS = {"num_samples": (2, 1_000_000_000), "kid_subset": (2,), "batch_size": (1,), "seed": (0,)}


def check_values(cache: str | Path | None, **numbers: int | None) -> None:
    """Refuse arguments of an evaluation before anything slow: numbers out of range, a cache that is no directory."""
    for name, value in numbers.items():
        if value is not None:
            check_whole(f"--{name.replace('_', '-')}", value, *LIMITS[name])
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise DataError(f"--cache {cache} is a file; expected a directory.")


def shards(total: int) -> list[range]:
    """The images, of `total`, that each process measures: contiguous blocks in the order of ranks, even to one image.

    DataError in every process, so that none waits, where there are too few images for them.
    """
    count = world().world_size
    if count > 1 and total < IMAGES_PER_PROCESS * count:
        raise DataError(
            f"{total} images are too few for {count} processes, each of which needs {IMAGES_PER_PROCESS}.",
            "Use fewer processes.",
        )
    return [range(total * rank // count, total * (rank + 1) // count) for rank in range(count)]


def merge_features(local: FeatureSet, total: int) -> FeatureSet:
    """The features of all processes, in every process.

    Features, logits, labels and content keys are in the order of the images, bit for bit as one process would have
    them, so that precision, recall, KID and the shuffled inception score are the same. Means and covariances are merged
    rank by rank in float64 (Chan, Golub and LeVeque 1979): they differ from one process's by the rounding of float64
    sums, some 1e-13 relative. Networks may round differently in batches of another size.

    `local` is what this process measured, its block of `shards`; `total` the number of images of all processes.
    DataError where the processes did not measure all images, or measured differently.
    """
    sets = world().all_gather_object(local)
    if len(sets) == 1:
        return local
    counts = [features.count or 0 for features in sets]
    joins: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(("features", "logits", "content_keys"), torch.cat),
        "labels": np.concatenate,
        **dict.fromkeys(("statistics", "spatial"), lambda parts: merge_statistics(zip(counts, parts, strict=True))),
    }

    def description(features: FeatureSet) -> tuple[object, ...]:
        parts = [getattr(features, name) for name in joins]
        shapes = (None if part is None else getattr(part, "shape", (0,))[1:] for part in parts)
        return features.extractor, features.weights_hash, *shapes

    if len(set(map(description, sets))) > 1:
        raise DataError(f"The {len(sets)} processes measured with different extractors or kept different features.")
    if sum(counts) != total:
        raise DataError(f"The {len(sets)} processes measured {sum(counts)} images; expected {total}.")
    known = [name for name in joins if getattr(local, name) is not None]
    merged: dict[str, Any] = {name: joins[name]([getattr(features, name) for features in sets]) for name in known}
    return replace(local, count=total, **merged)


@dataclass(frozen=True)
class ReferenceRecord:
    """What a reference was measured with and of.

    `source` is what the images were called and `content` their fingerprint (None in references of older versions);
    they were measured at `image_shape`, height and width in pixels, and some were `resized` or cropped to it.
    """

    extractor: str
    weights_hash: str
    count: int
    image_shape: tuple[int, int]
    resized: bool
    source: str
    mvar_version: str
    class_names: tuple[str, ...] | None = None
    content: str | None = None


def _record(network: str, weights_hash: str, images: EvaluationImages) -> ReferenceRecord:
    return ReferenceRecord(
        network,
        weights_hash,
        images.count,
        images.image_shape,
        images.stored_shape is not None,
        images.name,
        __version__,
        images.class_names,
        images.fingerprint(),
    )


def save_reference(path: Path, features: FeatureSet, images: EvaluationImages) -> None:
    """Write a reference, whole or not at all: the features of the images, at least two, and a `ReferenceRecord`."""
    if features.statistics is None or features.weights_hash is None:
        raise DataError(f"A reference needs at least 2 images, found {features.num_images}.")
    record = _record(features.extractor, features.weights_hash, images)
    write_features(path, features, {"kind": FORMAT, **asdict(record)})


def is_reference(path: Path, extractor: FeatureExtractor, images: EvaluationImages) -> bool:
    """Whether a file is the reference of these images; False where nothing is there, DataError for another file."""
    if not path.exists():
        return False
    expected = _record(extractor.name, extractor.weights_hash, images)
    with suppress(DataError):
        found = load_reference(path)[1]
        if found and replace(found, source=images.name, mvar_version=__version__) == expected:
            return True
    raise DataError(f"{path} is already there, with other content.", "Choose another --out, or add --overwrite.")


def load_reference(path: Path) -> tuple[FeatureSet | None, ReferenceRecord | None]:
    """Read what an npz file knows of a reference; DataError where it is damaged, or statistics are incomplete.

    That is the features and the record of a file that `save_reference` wrote; statistics alone, of Inception features,
    of a file in the ADM evaluator's layout (mu, sigma, and mu_s, sigma_s for sFID); nothing of other npz files, such as
    those of images.
    """
    features, description = read_features(path)
    if description is None:
        return features, None
    if description.pop("kind", None) != FORMAT:
        raise DataError(f"{path} holds cached features, which are no reference.", "Use a file of make-reference.")
    try:
        record: ReferenceRecord = TypeAdapter(ReferenceRecord).validate_json(json.dumps(description), strict=True)
    except ValueError as error:
        raise DataError(f"{path} is damaged: its record has {one_line(error)[:300]}.", "Make it again.") from None
    if features is None or features.statistics is None:
        raise DataError(f"{path} is damaged: it has no statistics.", "Make it again.")
    if any(getattr(features, name) != getattr(record, name) for name in ("extractor", "weights_hash", "count")):
        raise DataError(f"{path} is damaged: its arrays are not those of its record.", "Make it again.")
    names = record.class_names
    if features.labels is not None and names is not None and len(names) <= features.labels.max():
        raise DataError(f"{path} is damaged: it has labels without a class name.", "Make it again.")
    return features, record


def write_features(path: Path, features: FeatureSet, description: Mapping[str, Any]) -> None:
    """Write a set of features and a description of it to an npz file, whole or not at all."""
    arrays: dict[str, NDArray[Any]] = {}
    for statistics, suffix in ((features.statistics, ""), (features.spatial, "_s")):
        if statistics is not None:
            arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = statistics["mu"], statistics["sigma"]
    for name in ("features", "logits", "content_keys"):
        if (rows := getattr(features, name)) is not None:
            arrays[name] = (rows.float() if rows.is_floating_point() else rows).numpy()
    if features.labels is not None:
        arrays["labels"] = features.labels.astype(np.int64)
    known = {"extractor": features.extractor, "weights_hash": features.weights_hash, "count": features.count}
    arrays[RECORD] = np.array(json.dumps({"format": FORMAT, "set": known, "description": dict(description)}))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_features(path: Path) -> tuple[FeatureSet | None, dict[str, Any] | None]:
    """Features and description of a file that `write_features` wrote; only the statistics, if any, of another npz."""
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", RECORD))
    text: Any = None
    if RECORD in arrays and arrays[RECORD].dtype.kind == "U" and arrays[RECORD].ndim == 0:
        with suppress(DataError):
            text = parse_json(str(arrays[RECORD]), f"{path}, record")
    ours = isinstance(text, dict) and text.get("format") == FORMAT
    pool, spatial = (_gaussian(path, arrays, suffix) for suffix in ("", "_s"))
    if not ours:
        return (None if pool is None else FeatureSet("inception", None, None, pool, spatial, source=str(path))), None
    rows: dict[str, Any] = read_npz(path, ROWS)
    known, description = text.get("set"), text.get("description")
    kinds = [type(known.get(key)) for key in ("extractor", "weights_hash", "count")] if isinstance(known, dict) else []
    if kinds != [str, str, int] or known["count"] < 1 or not isinstance(description, dict):
        raise DataError(f"{path} is damaged: its record is incomplete.", "Make it again.")
    count, width = known["count"], None if pool is None else len(pool["mu"])
    for key, array in rows.items():
        dtype, ndim = ROWS[key]
        fits = array.dtype == dtype and array.ndim == ndim and len(array) == count and np.isfinite(array).all()
        if not fits or (key == "features" and array.shape[1] != (width or array.shape[1])):
            expected = f"{count} rows of finite {dtype}" + (f", {width} each" if key == "features" and width else "")
            found = f"{array.dtype} {array.shape}"
            raise DataError(f"{path} is damaged: {key} is {found}, expected {expected}.", "Make it again.")
    labels = rows.pop("labels", None)
    if labels is not None and labels.min() < 0:
        raise DataError(f"{path} is damaged: it has the label {labels.min()}.", "Make it again.")
    tensors: dict[str, Any] = {key: torch.from_numpy(array) for key, array in rows.items()}
    return FeatureSet(known["extractor"], known["weights_hash"], count, pool, spatial, labels=labels, **tensors), dict(
        description
    )


def _gaussian(path: Path, arrays: Mapping[str, NDArray[Any]], suffix: str) -> Statistics | None:
    mean, covariance = f"mu{suffix}", f"sigma{suffix}"
    missing = [name for name in (mean, covariance) if name not in arrays]
    if len(missing) == 2:
        return None
    if missing:
        raise DataError(f"{path} lacks {missing[0]}, one of {mean} and {covariance}.")
    mu, sigma = arrays[mean], arrays[covariance]
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)) or {mu.dtype.kind, sigma.dtype.kind} != {"f"}:
        found = f"{mean} is {mu.dtype} {mu.shape} and {covariance} {sigma.dtype} {sigma.shape}"
        raise DataError(f"{path}: {found}; expected floats (F,) and (F, F).")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{path}: {mean} or {covariance} holds values that are not finite.")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    scale = np.sqrt(np.abs(np.diag(sigma)))
    tolerance = 1e-4 * max(1e-12, float(scale.max()) ** 2)
    if (
        np.diag(sigma).min() < -tolerance
        or np.abs(sigma - sigma.T).max() > tolerance
        or (np.abs(sigma) - np.outer(scale, scale)).max() > tolerance
    ):
        raise DataError(f"{path}: {covariance} is no covariance: it is not symmetric, or not positive semidefinite.")
    return Statistics(mu=mu, sigma=sigma)


@dataclass(frozen=True)
class Reference:
    """What images are compared with: images, published statistics (with or without images), or features made before.

    `name` is what the user typed. `known` is what a file says: statistics in the ADM evaluator's layout, or all
    features, and then `record` says how `make_reference` measured them.
    """

    name: str
    images: EvaluationImages | None = None
    known: FeatureSet | None = None
    record: ReferenceRecord | None = None

    @classmethod
    def open(cls, text: str, image_shape: ImageShape, kind: str, max_pixels: int | None = None) -> Reference:
        """Check, before anything slow, that the reference is there and fits images of this size and these features."""
        path = Path(text).expanduser()
        if path.suffix.lower() != ".npz":
            return cls(text, open_evaluation_images(text, image_shape, max_pixels))
        known, record = load_reference(path)
        if record is not None:
            return cls(text, None, known, record)
        try:
            images = open_evaluation_images(text, image_shape, max_pixels)
        except DataError:
            if known is None:
                raise
            if kind != "inception":
                raise DataError(
                    f"{text} holds statistics of Inception features and no images, so it cannot serve {kind} features.",
                    "Use --features inception, or images as the reference.",
                ) from None
            images = None
        return cls(text, images, known if kind == "inception" else None)

    @property
    def count(self) -> int | None:
        """Number of images, where it is known before anything is measured."""
        return self.record.count if self.record is not None else None if self.images is None else self.images.count

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The images' classes, where they are known."""
        holder = self.known if self.record is not None else self.images
        return None if holder is None else holder.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where they are known."""
        holder = self.record or self.images
        return None if holder is None else holder.class_names

    def check(self, extractor: FeatureExtractor) -> None:
        """Refuse, before anything is measured, a file of other features, by network, weights or number (DataError)."""
        record, known = self.record, self.known
        if record and (record.extractor, record.weights_hash) != (extractor.name, extractor.weights_hash):
            raise DataError(
                f"{self.name} was measured with {record.extractor} features (weights {record.weights_hash[:12]}),"
                f" the samples are measured with {extractor.name} features (weights {extractor.weights_hash[:12]}).",
                "Choose the --features that it was made with, or make it again: mvar evaluate make-reference.",
            )
        if known is not None and known.width != extractor.dim:
            raise DataError(
                f"{self.name} holds {known.width} features, but {extractor.name} features are {extractor.dim}.",
                "Choose the --features that the file was made with.",
            )

    def measure(self, measurer: Measurer) -> FeatureSet:
        """Features and statistics of the reference; its images are measured only where they are needed."""
        known = self.known
        if self.images is None or (known is not None and not measurer.keep_features):
            assert known is not None
            return known
        measured = measurer.measure(self.images, "reference")
        if known is None:
            return measured
        return replace(measured, count=None, statistics=known.statistics, spatial=known.spatial, source=known.source)


def open_measured_images(
    text: str, limit: int | None = None, image_shape: ImageShape | None = None, max_pixels: int | None = None
) -> EvaluationImages:
    """The first images of a set, as they are; digits, which have no size of their own, at that of their preset."""
    if image_shape is None and split_name(text)[0] == "digits":
        image_shape = load_config("digits").image_shape
    images = open_evaluation_images(text, image_shape, max_pixels)
    if limit is not None and limit < images.count:
        images.count = limit
        images.labels = None if images.labels is None else images.labels[:limit]
    return images
