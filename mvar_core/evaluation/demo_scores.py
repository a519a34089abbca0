"""Scores of generated digits, and what to compare them with: demo features, diversity, closeness to training images.

Distances are Euclidean between pixels in [-1, 1], divided by the root of the number of channels. So gray images count
once, however many equal channels they are stored in, and a distance is that of one channel's H·W pixels.

Letters: N, M images of two sets, C channels, H, W height and width in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.demo import DemoClassifier, DemoExtractor
from mvar_core.evaluation.features import check_labels, described, is_dense
from mvar_core.evaluation.scores import frechet_distance
from mvar_core.evaluation.statistics import Statistics, collect
from mvar_core.runtime import generator

BLOCK_IMAGES, BLOCK_VALUES = 1024, 2**23
"""Most images, and values of them, that are compared with as many others at once."""

Images = Shaped[Tensor, "N C H W"]
"""uint8 in 0 … 255, or floating point in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class DemoScores:
    """Scores that only together show that a model is good: each alone can be good for a bad model.

    `classifier_accuracy` is the fraction of the samples that the classifier assigns to their class; `demo_fid` the
    Fréchet distance of the samples' demo features to the training images', also of training images resampled with
    replacement (`floor`: the least to expect) and of the mean image of each class (`class_means`: what a model without
    diversity gets). Names that end in `_real` are of real test images; nan is what was not measured. Distances are
    as in the functions below.
    """

    classifier_accuracy: float = math.nan
    classifier_accuracy_real: float = math.nan
    demo_fid: float = math.nan
    demo_fid_floor: float = math.nan
    demo_fid_real: float = math.nan
    demo_fid_class_means: float = math.nan
    pixel_diversity: float = math.nan
    pixel_diversity_real: float = math.nan
    nearest_distance: float = math.nan
    nearest_distance_real: float = math.nan


def score_samples(
    classifier: DemoClassifier,
    samples: tuple[Tensor, Tensor],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> DemoScores:
    """Scores of samples against training and test images; each is images uint8 (N, 3, H, W) and labels (N,)."""
    extractor = DemoExtractor(classifier)

    def gaussian(images: Tensor) -> Statistics:
        statistics = collect(extractor, images.split(512), len(images)).statistics
        assert statistics is not None
        return statistics

    reference = gaussian(train[0])
    resampled = torch.randint(len(train[0]), (len(samples[0]),), generator=generator("floor"))
    return DemoScores(
        classifier_accuracy=classifier.accuracy(*samples),
        classifier_accuracy_real=classifier.accuracy(*test),
        demo_fid=frechet_distance(gaussian(samples[0]), reference),
        demo_fid_floor=frechet_distance(gaussian(train[0][resampled]), reference),
        demo_fid_real=frechet_distance(gaussian(test[0]), reference),
        demo_fid_class_means=frechet_distance(gaussian(class_mean_images(*train)), reference),
        pixel_diversity=pixel_diversity(*samples),
        pixel_diversity_real=pixel_diversity(*test),
        nearest_distance=nearest_neighbour_distance(samples[0], train[0]),
        nearest_distance_real=nearest_neighbour_distance(test[0], train[0]),
    )


def pixel_diversity(images: Images, labels: Int64[Tensor, " N"]) -> float:
    """Mean distance between two different images of a class, averaged over the classes that have two."""
    means = []
    for label in _classes(images, labels):
        vectors = _vectors(images[labels == label])
        if (count := len(vectors)) > 1:
            total = sum(float(torch.cdist(block, vectors).sum()) for block in vectors.split(BLOCK_IMAGES))
            means.append(total / (count * (count - 1)))
    if not means:
        raise DataError("Pixel diversity needs a class with at least 2 images.")
    return sum(means) / len(means)


def nearest_neighbour_distance(images: Images, reference: Shaped[Tensor, "M C H W"]) -> float:
    """Mean distance from an image to the nearest reference image: small where images repeat the reference."""
    return float(nearest_neighbours(images, reference)[0].mean())


def nearest_neighbours(images: Images, reference: Shaped[Tensor, "M C H W"]) -> tuple[Tensor, Tensor]:
    """Distance (N,) from each image to the nearest reference image, and which (N,) that is."""
    _check_pixels(images)
    _check_pixels(reference)
    if len(images) == 0 or len(reference) == 0 or images.shape[1:] != reference.shape[1:]:
        raise DataError(
            "Nearest neighbours need two sets of images of one size, found"
            f" {tuple(images.shape)} and {tuple(reference.shape)}."
        )
    at_once = max(1, min(BLOCK_IMAGES, BLOCK_VALUES // images[0].numel()))
    found = []
    for block in images.split(at_once):
        vectors = _vectors(block)
        parts = [torch.cdist(vectors, _vectors(part)).cpu().min(dim=1) for part in reference.split(at_once)]
        best = torch.stack([part.values for part in parts]).min(dim=0)
        places = torch.stack([part.indices + number * at_once for number, part in enumerate(parts)])
        found.append((best.values, places.gather(0, best.indices[None])[0]))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def class_mean_images(images: Images, labels: Int64[Tensor, " N"]) -> Images:
    """The images, each replaced by the mean image of its class: what a sampler without diversity would generate."""
    classes, means = _classes(images, labels), torch.empty_like(images)
    for label in classes:
        members = labels == label
        mean = images[members].double().mean(dim=0)
        means[members] = (mean if images.is_floating_point() else mean.round()).to(images.dtype)
    return means


def _classes(images: Tensor, labels: Tensor) -> list[int]:
    _check_pixels(images)
    check_labels(images, labels)
    return labels.unique().tolist()


def _check_pixels(images: Tensor) -> None:
    if not is_dense(images, 4) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        expected = "images (N, C, H, W), uint8, or floating point in [-1, 1]"
        raise DataError(f"Distances are of {expected}; found {described(images)}.")


def _vectors(images: Tensor) -> Tensor:
    # float64: torch finds distances through products, which loses those much smaller than the vectors' lengths.
    pixels = images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
    vectors: Tensor = pixels.flatten(1) / float(images.shape[1]) ** 0.5
    return vectors
