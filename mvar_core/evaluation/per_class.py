"""Which classes are drawn well and which are not: one score per class.

Letters: N, M images of a class in the two sets, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.statistics import FeatureSet

KID_CLASS_MINIMUM = 20
"""Images of a class in both sets from which on its KID says more than its noise."""

KID_CLASS_MAXIMUM = 1000
"""Images of a class that KID reads at most; of more, as many are drawn."""


@dataclass(frozen=True)
class ClassScore:
    """How far a class is from the reference.

    Attributes:
        label: Index of the class.
        name: Its name.
        num_samples: Its images that are judged.
        num_reference: Its images in the reference.
        score: Distance from the reference, 0 at best; KID may fall below. None where a set has no image of the class.
        measure: What the score is, "kid" or "mean_distance"; the same for all classes of a table.
    """

    label: int
    name: str
    num_samples: int
    num_reference: int
    score: float | None
    measure: str


def per_class(
    samples: FeatureSet,
    sample_labels: NDArray[np.int64],
    reference: FeatureSet,
    reference_labels: NDArray[np.int64],
    class_names: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> list[ClassScore]:
    """Score each class that either set has, worst first; classes that one set lacks come last, without a score.

    The measure is KID (unbiased, kernel (xᵀy/F + 1)³, of all images of the class, up to 1000) where both sets have at
    least 20 images of every class that they share, and else, for all classes, the Euclidean distance between the mean
    features.

    Args:
        samples: The images that are judged, with their features.
        sample_labels: Their classes, (N,).
        reference: What they are judged by, with its features.
        reference_labels: Its classes, (M,).
        class_names: One name per class; None numbers them.
        seed: Decides which images KID reads of a class of more than 1000.

    Raises:
        DataError: A set's features are unknown, or labels do not match.
    """
    sample_rows = _features("sample", samples, sample_labels)
    reference_rows = _features("reference", reference, reference_labels)
    if sample_rows.shape[1] != reference_rows.shape[1]:
        raise DataError(
            f"The two sets have {sample_rows.shape[1]} and {reference_rows.shape[1]} features; they were measured"
            " differently.",
            "Measure both with the same --features.",
        )
    labels = np.union1d(sample_labels, reference_labels).tolist()
    if labels[0] < 0:
        raise DataError(f"Labels must not be negative, found {labels[0]}.")
    members = {
        label: (np.flatnonzero(sample_labels == label), np.flatnonzero(reference_labels == label)) for label in labels
    }
    shared = [counts for counts in ((len(ours), len(theirs)) for ours, theirs in members.values()) if min(counts) > 0]
    measure = "kid" if shared and min(map(min, shared)) >= KID_CLASS_MINIMUM else "mean_distance"
    scores = []
    for label, (ours, theirs) in members.items():
        score = None
        if len(ours) and len(theirs):
            if measure == "kid":
                ours_read, theirs_read = _at_most(ours, seed, label, 0), _at_most(theirs, seed, label, 1)
                score = unbiased_kernel_distance(sample_rows[ours_read], reference_rows[theirs_read])
            else:
                difference = sample_rows[ours].double().mean(dim=0) - reference_rows[theirs].double().mean(dim=0)
                score = float(difference.norm())
        name = class_names[label] if class_names is not None and label < len(class_names) else str(label)
        scores.append(ClassScore(label, name, len(ours), len(theirs), score, measure))
    return sorted(scores, key=lambda row: (row.score is None, -(row.score or 0.0), row.label))


def unbiased_kernel_distance(samples: Float[Tensor, "N F"], reference: Float[Tensor, "M F"]) -> float:
    """Unbiased squared maximum mean discrepancy of two whole sets, kernel (xᵀy/F + 1)³ (Gretton et al. 2012, eq. 3).

    Raises:
        DataError: A set has fewer than two images.
    """
    if min(len(samples), len(reference)) < 2:
        raise DataError(f"KID needs at least 2 images in both sets, found {len(samples)} and {len(reference)}.")
    ours, theirs = samples.double(), reference.double()

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (first @ second.T / first.shape[1] + 1) ** 3

    def within(rows: Tensor) -> Tensor:
        values = kernel(rows, rows)
        return (values.sum() - values.diagonal().sum()) / (len(rows) * (len(rows) - 1))

    return float(within(ours) + within(theirs) - 2 * kernel(ours, theirs).mean())


def _features(role: str, images: FeatureSet, labels: NDArray[np.int64]) -> Tensor:
    if images.features is None:
        raise DataError(f"Scores per class need the features of the {role} set's images, which are not known.")
    if labels.shape != (len(images.features),) or len(labels) == 0:
        raise DataError(
            f"The {role} set has {len(images.features)} images and labels of shape {labels.shape}; expected one label"
            " per image, and some."
        )
    return images.features


def _at_most(rows: NDArray[np.int64], seed: int, label: int, role: int) -> Tensor:
    """The images that KID reads of a class; the draw does not depend on the other classes."""
    if len(rows) > KID_CLASS_MAXIMUM:
        rows = np.sort(np.random.default_rng((seed, label, role)).choice(rows, KID_CLASS_MAXIMUM, replace=False))
    return torch.from_numpy(rows)
