"""Features and statistics in files: references that were measured once, published statistics, a cache of features.

One npz layout serves references, which say what they were measured with, and the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from numpy.typing import NDArray

from mvar_core.errors import DataError, one_line
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.statistics import FeatureSet, Statistics
from mvar_core.io.files import atomic_path

FORMAT = "mvar-reference-1"
"""Version of the layout, in references and in caches of features."""

RECORD_ARRAY = "record"

logger = logging.getLogger("mvar")


@dataclass(frozen=True)
class ReferenceRecord:
    """What a reference was measured with and of.

    Attributes:
        image_shape: Height and width at which they were measured, in pixels.
        resized: Whether some were resized or cropped to that size.
        source: What the images were called.
    """

    extractor: str
    weights_hash: str
    count: int
    image_shape: tuple[int, int]
    resized: bool
    source: str
    mvar_version: str
    class_names: tuple[str, ...] | None = None


def save_reference(path: Path, features: FeatureSet, record: ReferenceRecord) -> None:
    """Write a reference, whole or not at all: statistics, features and labels where known, and the record.

    `mu` and `sigma` (`mu_s`, `sigma_s`) are laid out as in the ADM evaluator's files.

    Raises:
        DataError: The path does not end in .npz, the record does not describe the features, or there are too few
            images for statistics.
    """
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path} does not end in .npz.", "Choose another --out.")
    if features.statistics is None:
        raise DataError(f"A reference needs at least 2 images, found {features.num_images}.")
    described = (record.extractor, record.weights_hash, record.count)
    if (features.extractor, features.weights_hash, features.count) != described:
        raise DataError(
            f"The record says {record.count} images with {record.extractor} features, but there are"
            f" {features.count} with {features.extractor} features."
        )
    write_features(path, features, {"kind": FORMAT, **asdict(record)})


def load_reference(path: Path) -> tuple[FeatureSet, ReferenceRecord] | None:
    """Read a reference that `save_reference` wrote.

    Returns:
        The features and the record; None for an npz file that is not one of ours.

    Raises:
        DataError: No such file, not an npz file, or one of ours that is damaged.
    """
    try:
        content = read_features(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, EOFError, BadZipFile, zlib.error, ValueError) as error:
        raise DataError(f"{path} cannot be read as an npz file: {one_line(error)}.") from error
    if content is None:
        return None
    features, description = content
    if not isinstance(description, dict) or description.pop("kind", None) != FORMAT:
        return None
    try:
        description["image_shape"] = tuple(description["image_shape"])
        if description.get("class_names") is not None:
            description["class_names"] = tuple(description["class_names"])
        record = ReferenceRecord(**description)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: its record is damaged: {error}.", "Make the reference again.") from error
    if features.statistics is None or features.count != record.count or features.weights_hash != record.weights_hash:
        raise DataError(f"{path} is damaged: its arrays are not those of its record.", "Make the reference again.")
    return features, record


def check_reference(
    record: ReferenceRecord, extractor: FeatureExtractor, path: Path, features: FeatureSet | None = None
) -> None:
    """Refuse a reference, the file `path`, that was measured with another network, or with features of another width.

    Raises:
        DataError: Names both extractors, hashes or widths.
    """
    if (record.extractor, record.weights_hash) != (extractor.name, extractor.weights_hash):
        raise DataError(
            f"{path} was measured with {record.extractor} features (weights {record.weights_hash[:12]}), but the"
            f" images are to be measured with {extractor.name} features (weights {extractor.weights_hash[:12]}).",
            "Choose the --features that it was made with, or make it again: mvar evaluate make-reference.",
        )
    if features is not None and features.width is not None and features.width != extractor.dim:
        raise DataError(
            f"{path} holds {features.width} features per image, but {extractor.name} features are {extractor.dim}.",
            "Make it again: mvar evaluate make-reference.",
        )


def read_statistics(path: Path, images: FeatureSet | None = None) -> FeatureSet | None:
    """Read the statistics of a reference file in the ADM evaluator's layout: mu, sigma, and mu_s, sigma_s for sFID.

    Precision, recall and KID also need the features of the file's own `images` (`arr_0`).

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
        raise DataError(f"{path} cannot be read as an npz file: {one_line(error)}.") from error
    if pool is None:
        return None
    if images is not None:
        if images.width not in (None, len(pool["mu"])):
            raise DataError(
                f"{path} holds statistics of {len(pool['mu'])} features, but {images.extractor} features are"
                f" {images.width}.",
                "Choose the --features that the file was made with.",
            )
        return replace(images, count=None, statistics=pool, spatial=spatial, source=str(path))
    return FeatureSet("inception", None, None, pool, spatial, source=str(path))


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


def write_features(path: Path, features: FeatureSet, description: Mapping[str, Any]) -> None:
    """Write a set of features and a description of it to an npz file, whole or not at all.

    Arrays: mu, sigma, mu_s, sigma_s in float64; features (N, F) and logits (N, K) in float32; labels and
    content_keys (N,) int64; each where known; and `record`, a JSON text.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for statistics, suffix in ((features.statistics, ""), (features.spatial, "_s")):
        if statistics is not None:
            arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = statistics["mu"], statistics["sigma"]
    for name in ("features", "logits", "content_keys"):
        if (rows := getattr(features, name)) is not None:
            arrays[name] = (rows.float() if rows.is_floating_point() else rows).numpy()
    if features.labels is not None:
        arrays["labels"] = features.labels.astype(np.int64)
    text = {
        "format": FORMAT,
        "set": {"extractor": features.extractor, "weights_hash": features.weights_hash, "count": features.count},
        "description": dict(description),
    }
    arrays[RECORD_ARRAY] = np.array(json.dumps(text))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_features(path: Path) -> tuple[FeatureSet, Any] | None:
    """Read what `write_features` wrote: the features and the description; None for another npz file.

    Raises:
        OSError, EOFError, BadZipFile, zlib.error, ValueError: The file is absent, damaged or not an npz file.
    """
    if not is_zipfile(path):
        path.stat()  # where there is no file at all, that is the error
        raise ValueError("it is not a zip archive, or not a whole one")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if RECORD_ARRAY not in archive.files or archive[RECORD_ARRAY].dtype.kind != "U":
            return None
        try:
            text = json.loads(str(archive[RECORD_ARRAY]))
        except ValueError:
            return None
        if not isinstance(text, dict) or text.get("format") != FORMAT:
            return None
        try:
            return _feature_set(archive, text["set"]), text["description"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"its record is incomplete: {error}") from error


def _feature_set(archive: np.lib.npyio.NpzFile, known: Mapping[str, Any]) -> FeatureSet:
    def statistics(suffix: str) -> Statistics | None:
        if f"mu{suffix}" not in archive.files:
            return None
        mu, sigma = archive[f"mu{suffix}"], archive[f"sigma{suffix}"]
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"mu{suffix} has shape {mu.shape} and sigma{suffix} {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"mu{suffix} or sigma{suffix} holds numbers that are not finite")
        return Statistics(mu=mu, sigma=sigma)

    count = known["count"]
    rows = {name: archive[name] for name in ("features", "logits", "content_keys", "labels") if name in archive.files}
    for name, array in rows.items():
        if len(array) != count:
            raise ValueError(f"{name} has {len(array)} rows, expected {count}")
    labels = rows.pop("labels", None)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in rows.items()}
    return FeatureSet(
        known["extractor"], known["weights_hash"], count, statistics(""), statistics("_s"), labels=labels, **tensors
    )


def feature_key(extractor: FeatureExtractor, content: str, count: int) -> str:
    """The name of features in a cache: SHA-256 of the network and of the first `count` images of this fingerprint."""
    parts = [FORMAT, extractor.name, extractor.weights_hash, content, count]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class FeatureCache:
    """Features by key, one npz file each in `directory`; a file that cannot be used counts as absent."""

    def __init__(self, directory: Path):
        self.directory = directory

    @classmethod
    def open(cls, directory: str | Path | None) -> FeatureCache | None:
        """The cache in a directory, if there is to be one.

        Raises:
            DataError: The directory is a file.
        """
        if directory is not None and Path(directory).is_file():
            raise DataError(f"--cache {directory} is a file; expected a directory.")
        return None if directory is None else cls(Path(directory))

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.directory / f"{key}.npz"

    def load(self, key: str, *, features: bool = False) -> FeatureSet | None:
        """The features of a key; None where there are none, or only statistics although `features` are needed."""
        path = self.path(key)
        try:
            content = read_features(path)
            if content is None or content[1] != {"key": key}:
                raise ValueError("it holds other features")
        except FileNotFoundError:
            return None
        except (OSError, EOFError, BadZipFile, zlib.error, ValueError) as error:
            logger.warning("%s cannot be used and is measured again: %s.", path, one_line(error))
            return None
        return None if features and content[0].features is None else content[0]

    def save(self, key: str, features: FeatureSet) -> None:
        """Keep features under a key; the file is written whole or not at all."""
        write_features(self.path(key), features, {"key": key})
