"""Features and statistics in files: references that were measured once, published statistics, cached features.

One npz layout serves references, which say what they were measured with, and the cache: mu, sigma, mu_s, sigma_s in
float64, laid out as in the ADM evaluator's files; features (N, F) and logits (N, K) in float32; labels and content_keys
(N,) int64; each where known; and `record`, a JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from mvar_core import __version__
from mvar_core.data.evaluation_images import EvaluationImages
from mvar_core.errors import DataError, one_line
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.statistics import FeatureSet, Statistics
from mvar_core.io.files import atomic_path
from mvar_core.io.npz import read_npz
from mvar_core.untrusted import parse_json

FORMAT = "mvar-reference-1"
"""Version of the layout, in references and in caches of features."""

RECORD = "record"
ROWS = {"features": ("float32", 2), "logits": ("float32", 2), "content_keys": ("int64", 1), "labels": ("int64", 1)}


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
