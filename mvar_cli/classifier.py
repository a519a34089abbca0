"""The demo classifier of the bundled digits: found, or trained on the spot."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mvar_core.data.evaluation_images import open_evaluation_images
from mvar_core.evaluation.demo import DemoClassifier, default_demo_path, train_classifier

FILE = "classifier.safetensors"

logger = logging.getLogger("mvar")


def read_digits(split: str, image_shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bundled digits: uint8 (N, 3, H, W) and labels (N,)."""
    images = open_evaluation_images(f"digits:{split}", image_shape)
    assert images.labels is not None
    return torch.cat(list(images.batches(512))), torch.from_numpy(images.labels)


def train_digits_classifier(path: Path, image_shape: tuple[int, int], seed: int = 0) -> DemoClassifier:
    """Train a classifier on the bundled digits and save it."""
    images, labels = read_digits("train", image_shape)
    test = read_digits("test", image_shape)
    classifier = train_classifier(images, labels, int(labels.max()) + 1, seed, test=test)
    classifier.save(path)
    logger.info("Trained the demo classifier of the bundled digits: %.1f %% right on test digits; kept in %s.",
                100 * (classifier.measured_accuracy or 0), path)  # fmt: skip
    return classifier


def find_classifier(named: Path | None, nearby: Sequence[Path], image_shape: tuple[int, int]) -> DemoClassifier:
    """The classifier that was named, else one near the model, else the cached one, trained where it is absent.

    Args:
        named: What the user asked for.
        nearby: Directories to look into.
        image_shape: Height and width of the images.

    Raises:
        CheckpointError: A file that is not a classifier.
    """
    if named is not None:
        return DemoClassifier.load(named)
    for directory in nearby:
        if (directory / FILE).is_file():
            return DemoClassifier.load(directory / FILE)
    path = default_demo_path(image_shape)
    if path.is_file():
        return DemoClassifier.load(path)
    return train_digits_classifier(path, image_shape)
