"""Scores of generated digits, and what to compare them with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mvar_core.evaluation.demo import DemoClassifier, DemoExtractor
from mvar_core.evaluation.pixels import class_mean_images, nearest_neighbour_distance, pixel_diversity
from mvar_core.evaluation.scores import frechet_distance
from mvar_core.evaluation.statistics import Statistics, collect
from mvar_core.runtime import generator


@dataclass(frozen=True, kw_only=True)
class DemoScores:
    """Scores that only together show that a model is good: each alone can be good for a bad model.

    Names that end in `_real` are of real test images.

    Attributes:
        classifier_accuracy: Fraction of the samples that the classifier assigns to their class.
        demo_fid: Fréchet distance of the samples' demo features to the training images'.
        demo_fid_floor: The same for training images resampled with replacement: the least to expect.
        demo_fid_class_means: The same for the mean image of each class: what a model without diversity gets.
        pixel_diversity: Mean distance between samples of a class.
        nearest_distance: Mean distance from a sample to the nearest training image.
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
