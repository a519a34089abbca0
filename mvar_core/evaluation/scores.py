"""Scores of a set of images against a reference, from features: of all images, and of each class.

The formulas are torch-fidelity's, on float64 features. Letters: N, M images of the two sets, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.errors import ConfigError, DataError, nearest
from mvar_core.evaluation.features import described
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.evaluation.statistics import FeatureSet, Statistics, check_finite
from mvar_core.untrusted import check_whole

METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "kid")

INCEPTION_SPLITS = 10
NEIGHBOURHOOD, NEIGHBOURHOOD_BLOCK = 3, 256
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
SEEDS = 2**32
"""How many seeds numpy's older generator, which torch-fidelity uses, accepts."""

KID_CLASS_MINIMUM, KID_CLASS_MAXIMUM = 20, 1000
"""Images of a class in both sets from which on its KID says more than its noise; and how many of them it reads."""


def check_metrics(names: str | Sequence[str]) -> tuple[str, ...]:
    """The metrics asked for, each once, in the order of METRICS; names, also as one comma list, or "all"."""
    if isinstance(names, str):
        names = METRICS if names == "all" else [name.strip() for name in names.split(",")]
    if not isinstance(names, (list, tuple)) or not names:
        raise ConfigError(f"--metrics {names!r:.80} names no metric. {nearest('', METRICS)}")
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"There is no metric {name!r:.80}. {nearest(str(name), METRICS)}")
    return tuple(metric for metric in METRICS if metric in names)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """‖μ₁-μ₂‖² + tr(Σ₁+Σ₂-2(Σ₁Σ₂)^½), the FID of two Gaussians (Heusel et al. 2017, equation 6).

    Equal Gaussians give 0 up to rounding, of either sign: some 1e-5 where there are fewer images than features.
    """
    _check_widths(len(first["mu"]), len(second["mu"]))
    for gaussian in (first, second):
        if not (np.isfinite(gaussian["mu"]).all() and np.isfinite(gaussian["sigma"]).all()):
            raise DataError("The mean or covariance of a set is not finite.", "Check its images and the network.")
    metric = fidelity_module("metric_fid")
    doubles = ({name: np.asarray(each[name], np.float64) for name in ("mu", "sigma")} for each in (first, second))
    return float(metric.fid_statistics_to_metric(*doubles, verbose=False)[metric.KEY_METRIC_FID])


def inception_score(
    logits: Float[Tensor, "N K"], *, seed: int = 0, splits: int = INCEPTION_SPLITS
) -> tuple[float, float]:
    """exp(E KL(p(y|x) ‖ p(y))), mean and standard deviation over the splits (Salimans et al. 2016).

    The images are shuffled first: unshuffled, images in the order of their classes leave few classes in a split.
    """
    _check_rows(logits)
    if len(logits) < check_whole("splits", splits, 1):
        raise DataError(f"The inception score in {splits} splits needs at least as many images, found {len(logits)}.")
    options = {"splits": splits, "shuffle": True, "rng_seed": seed % SEEDS}
    return _fidelity("isc", ("ISC_MEAN", "ISC_STD"), logits, **options)


def precision_recall(
    samples: Float[Tensor, "N F"], reference: Float[Tensor, "M F"], *, neighbourhood: int = NEIGHBOURHOOD
) -> tuple[float, float]:
    """Precision and recall of the k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019)."""
    _check_pair(samples, reference, check_whole("neighbourhood", neighbourhood, 1) + 1, "Precision and recall need")
    options = {"prc_neighborhood": neighbourhood, "prc_batch_size": NEIGHBOURHOOD_BLOCK, "save_cpu_ram": True}
    return _fidelity("prc", ("PRECISION", "RECALL"), samples, reference, **options, verbose=False)


def check_counts(
    metrics: Sequence[str], num_samples: int, num_reference: int | None, kid_subset_size: int | None = None
) -> None:
    """Refuse, before anything is measured, metrics for which there are too few images (DataError)."""
    neighbours, kid = NEIGHBOURHOOD + 1, kid_subset_size or 2
    pairs = {"fid": 2, "sfid": 2, "precision": neighbours, "recall": neighbours, "kid": kid}
    samples = {**pairs, "inception_score": INCEPTION_SPLITS}
    for what, count, needs in (("samples", num_samples, samples), ("reference images", num_reference, pairs)):
        lacking = [name for name in metrics if count is not None and count < needs.get(name, 0)]
        if lacking:
            wanted = ", ".join(f"{name} needs {needs[name]}" for name in lacking)
            raise DataError(f"There are {count} {what}: {wanted}.", "Use more images, or leave out those --metrics.")


def kid_subsets(num_samples: int, num_reference: int, subset_size: int | None = None) -> tuple[int, int]:
    """Number and size of the subsets that KID is averaged over, for sets of these sizes."""
    if subset_size is not None:
        check_whole("subset_size", subset_size, 2)
    size = min(subset_size or KID_SUBSET_SIZE, num_samples, num_reference)
    return (1 if num_samples == num_reference == size else KID_SUBSETS), size


def kernel_distance(
    samples: Float[Tensor, "N F"], reference: Float[Tensor, "M F"], *, seed: int = 0, subset_size: int | None = None
) -> tuple[float, float]:
    """KID: unbiased squared maximum mean discrepancy, kernel (xᵀy/F + 1)³ (Bińkowski et al. 2018).

    Mean and standard deviation over subsets that `seed` decides, of 1000 images, or `subset_size`, or what there is.
    """
    _check_pair(samples, reference, 2, "KID needs")
    subsets, size = kid_subsets(len(samples), len(reference), subset_size)
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed % SEEDS}
    return _fidelity("kid", ("KID_MEAN", "KID_STD"), samples, reference, **options, verbose=False)


def _fidelity(metric: str, keys: tuple[str, str], *features: Tensor, **options: Any) -> tuple[float, float]:
    """Two values of a metric of torch-fidelity."""
    module = fidelity_module(f"metric_{metric}")
    found = getattr(module, f"{metric}_features_to_metric")(*(rows.double() for rows in features), **options)
    first, second = (float(found[getattr(module, f"KEY_METRIC_{key}")]) for key in keys)
    return first, second


def evaluate_features(
    samples: FeatureSet,
    reference: FeatureSet,
    metrics: Sequence[str] = METRICS,
    *,
    seed: int = 0,
    splits: int = INCEPTION_SPLITS,
    kid_subset_size: int | None = None,
) -> dict[str, Any]:
    """All scores that can be computed from two sets; one that cannot is None, with the reason.

    `seed` decides the shuffle of the inception score and the subsets of KID, which are chosen from the images in the
    order of their content: the order in which they were measured does not change a score. Next to the METRICS,
    inception_score_std and kid_std the result has `reasons`, why a score is None, and `settings`, the seed and sizes
    that were used. DataError for two sets that were measured with different networks.
    """
    asked = check_metrics(metrics)
    check_whole("seed", seed)
    hashes = samples.weights_hash, reference.weights_hash
    if samples.extractor != reference.extractor or (hashes[1] is not None and hashes[0] != hashes[1]):
        ours, theirs = ((known or "?")[:12] for known in hashes)
        raise DataError(
            f"The samples were measured with {samples.extractor} features ({ours}), the reference with"
            f" {reference.extractor} features ({theirs}).",
            "Measure both with the same --features.",
        )
    scores: dict[str, Any] = dict.fromkeys((*METRICS, "inception_score_std", "kid_std"))
    reasons = {metric: "not asked for" for metric in METRICS if metric not in asked}
    settings = {"seed": seed, "splits": splits, "neighbourhood": NEIGHBOURHOOD}

    def both(part: str) -> tuple[Any, Any]:
        return _known(samples, "sample", part), _known(reference, "reference", part)

    def kid() -> tuple[float, float]:
        ours, theirs = both("features")
        found = kernel_distance(ours, theirs, seed=seed, subset_size=kid_subset_size)
        settings["kid_subsets"], settings["kid_subset_size"] = kid_subsets(len(ours), len(theirs), kid_subset_size)
        return found

    measures: dict[tuple[str, ...], Callable[[], Sequence[float]]] = {
        ("fid",): lambda: [frechet_distance(*both("statistics"))],
        ("sfid",): lambda: [frechet_distance(*both("spatial"))],
        ("inception_score", "inception_score_std"): lambda: inception_score(
            _known(samples, "sample", "logits"), seed=seed, splits=splits
        ),
        ("precision", "recall"): lambda: precision_recall(*both("features")),
        ("kid", "kid_std"): kid,
    }
    for names, compute in measures.items():
        if wanted := [name for name in names if name in asked]:
            try:
                found = dict(zip(names, compute(), strict=True))
                scores.update({name: found[name] for name in names if name not in reasons})
            except DataError as error:
                reasons.update(dict.fromkeys(wanted, error.message))
    return {**scores, "reasons": reasons, "settings": settings}


@dataclass(frozen=True)
class ClassScore:
    """How far a class is from the reference.

    `score` is the distance, 0 at best (KID may fall below), None where a set has no image of the class; `measure` what
    it is, "kid" or "mean_distance", the same for all classes of a table.
    """

    label: int
    name: str
    num_samples: int
    num_reference: int
    score: float | None
    measure: str


def per_class_scores(
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
    features. `seed` decides which images KID reads of a class of more than 1000. DataError where a set's features are
    unknown, or its labels, (N,) and (M,), are not one for each image.
    """
    sample_labels, reference_labels = np.asarray(sample_labels), np.asarray(reference_labels)
    sample_rows = _labelled("sample", samples, sample_labels)
    reference_rows = _labelled("reference", reference, reference_labels)
    _check_widths(sample_rows.shape[1], reference_rows.shape[1])
    labels = np.union1d(sample_labels, reference_labels).tolist()
    if labels[0] < 0:
        raise DataError(f"Labels must not be negative, found {labels[0]}.")
    members = [(np.flatnonzero(sample_labels == each), np.flatnonzero(reference_labels == each)) for each in labels]
    shared = [min(len(ours), len(theirs)) for ours, theirs in members]
    measure = "kid" if min(filter(None, shared), default=0) >= KID_CLASS_MINIMUM else "mean_distance"
    scores = []
    for label, (ours, theirs) in zip(labels, members, strict=True):
        score = None
        if len(ours) and len(theirs) and measure == "kid":
            ours_read, theirs_read = _at_most(ours, seed, label, 0), _at_most(theirs, seed, label, 1)
            score = unbiased_kernel_distance(sample_rows[ours_read], reference_rows[theirs_read])
        elif len(ours) and len(theirs):
            difference = sample_rows[ours].double().mean(dim=0) - reference_rows[theirs].double().mean(dim=0)
            score = float(difference.norm())
        name = class_names[label] if class_names is not None and label < len(class_names) else str(label)
        scores.append(ClassScore(label, name, len(ours), len(theirs), score, measure))
    return sorted(scores, key=lambda row: (row.score is None, -(row.score or 0.0), row.label))


def unbiased_kernel_distance(samples: Float[Tensor, "N F"], reference: Float[Tensor, "M F"]) -> float:
    """Unbiased squared maximum mean discrepancy of two whole sets, kernel (xᵀy/F + 1)³ (Gretton et al. 2012, eq. 3)."""
    _check_pair(samples, reference, 2, "KID needs")
    ours, theirs = samples.double(), reference.double()

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (first @ second.T / first.shape[1] + 1) ** 3

    def within(rows: Tensor) -> Tensor:
        values = kernel(rows, rows)
        return (values.sum() - values.diagonal().sum()) / (len(rows) * (len(rows) - 1))

    return float(within(ours) + within(theirs) - 2 * kernel(ours, theirs).mean())


def _known(images: FeatureSet, role: str, part: str) -> Any:
    """A part of what is known of a set; DataError says why it is not known."""
    found, keys = getattr(images, part), images.content_keys
    if found is not None:
        # Rows in an order that follows from the images alone, so that splits and subsets do too.
        return found[keys.argsort(stable=True)] if isinstance(found, Tensor) and keys is not None else found
    if part == "features":
        raise DataError(f"The {role} set is known by its mean and covariance only, not by its images.")
    if part == "logits":
        raise DataError(f"{images.extractor} features have no classes.")
    if part == "spatial" and images.source is not None:
        raise DataError(f"{images.source} has no mu_s and sigma_s.")
    if part == "spatial" and images.extractor != "inception":
        raise DataError(f"{images.extractor} features have no spatial map.")
    raise DataError(f"The {role} set has fewer than 2 images.")


def _check_rows(rows: Tensor) -> None:
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point() or rows.shape[1] == 0:
        raise DataError(f"Features are a matrix of floats, a row per image, found {described(rows)}.")
    check_finite(rows)


def _check_pair(first: Tensor, second: Tensor, least: int, what: str) -> None:
    _check_rows(first)
    _check_rows(second)
    _check_widths(first.shape[1], second.shape[1])
    if min(len(first), len(second)) < least:
        found = f"{len(first)} and {len(second)}"
        raise DataError(f"{what} at least {least} images in both sets, found {found}.")


def _check_widths(first: int, second: int) -> None:
    if first != second:
        raise DataError(
            f"The two sets have {first} and {second} features; they were measured differently.",
            "Measure both with the same --features.",
        )


def _labelled(role: str, images: FeatureSet, labels: NDArray[np.int64]) -> Tensor:
    if images.features is None:
        raise DataError(f"Scores per class need the features of the {role} set's images, which are not known.")
    if labels.shape != (len(images.features),) or len(labels) == 0 or labels.dtype.kind not in "iu":
        raise DataError(
            f"The {role} set has {len(images.features)} images and {labels.dtype} labels of shape {labels.shape};"
            " expected one whole number per image, and some."
        )
    return images.features


def _at_most(rows: NDArray[np.int64], seed: int, label: int, role: int) -> Tensor:
    """The images that KID reads of a class; the choice does not depend on the other classes."""
    if len(rows) > KID_CLASS_MAXIMUM:
        rows = np.sort(np.random.default_rng((seed, label, role)).choice(rows, KID_CLASS_MAXIMUM, replace=False))
    return torch.from_numpy(rows)
