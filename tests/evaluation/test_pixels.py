from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.demo import (
    DemoClassifier,
    class_mean_images,
    nearest_neighbour_distance,
    pixel_diversity,
    train_classifier,
)
from mvar_core.evaluation.reconstruction import ssim


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 4, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def plain(images: Tensor) -> Tensor:
    """Images as vectors, by the definition."""
    return (images.double() / 255 * 2 - 1).flatten(1) / math.sqrt(3)


def test_diversity_is_the_mean_distance_between_two_images_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(7), torch.tensor([4, 4, 4, 9, 9, 9, 5])
    vectors = plain(images)
    pairs = [[(0, 1), (0, 2), (1, 2)], [(3, 4), (3, 5), (4, 5)]]
    expected = sum(sum(float((vectors[i] - vectors[j]).norm()) for i, j in group) / 3 for group in pairs) / 2
    assert pixel_diversity(images, labels) == pytest.approx(expected, rel=1e-9)
    assert pixel_diversity(images.double() / 127.5 - 1, labels) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("mvar_core.evaluation.demo.BLOCK_IMAGES", 2)
    assert pixel_diversity(images, labels) == pytest.approx(expected, rel=1e-9)


def test_gray_counts_once_however_it_is_stored() -> None:
    gray = pictures(6)[:, :1]
    labels = torch.zeros(6, dtype=torch.int64)
    assert pixel_diversity(gray, labels) == pytest.approx(pixel_diversity(gray.repeat(1, 3, 1, 1), labels))


def test_equal_images_have_no_diversity_and_no_distance() -> None:
    images = pictures(1).repeat(5, 1, 1, 1)
    assert pixel_diversity(images, torch.zeros(5, dtype=torch.int64)) < 1e-5
    assert nearest_neighbour_distance(images, pictures(1)) < 1e-5


def test_diversity_needs_two_images_of_a_class() -> None:
    with pytest.raises(DataError, match="at least 2 images"):
        pixel_diversity(pictures(2), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="2 images and 3 labels"):
        pixel_diversity(pictures(2), torch.tensor([0, 1, 1]))


def test_finds_the_nearest_reference_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images, reference = pictures(9), pictures(11, seed=1)
    table = (plain(images)[:, None] - plain(reference)).norm(dim=2)
    for block in (1024, 4):
        monkeypatch.setattr("mvar_core.evaluation.demo.BLOCK_IMAGES", block)
        assert nearest_neighbour_distance(images, reference) == pytest.approx(float(table.min(dim=1).values.mean()))
    with pytest.raises(DataError, match="one size"):
        nearest_neighbour_distance(images, reference[:, :, :3])


def test_class_means_replace_every_image() -> None:
    images, labels = pictures(5), torch.tensor([2, 0, 2, 0, 2])
    means = class_mean_images(images, labels)
    assert means.dtype == torch.uint8
    assert torch.equal(means[0], images[[0, 2, 4]].double().mean(dim=0).round().to(torch.uint8))
    assert torch.equal(means[0], means[4])
    assert torch.equal(means[1], means[3])
    floats = class_mean_images(images.float() / 127.5 - 1, labels)
    assert torch.allclose(floats[1], (images[[1, 3]].float() / 127.5 - 1).mean(dim=0), atol=1e-6)
    with pytest.raises(DataError, match="uint8, or floating point"):
        nearest_neighbour_distance(images.int(), images.int())


def test_real_digits_have_the_diversity_and_distances_of_one_gray_channel(
    digits: dict[str, tuple[Tensor, Tensor]],
) -> None:
    images, labels = digits["test"]
    assert pixel_diversity(images, labels) == pytest.approx(16.0, abs=0.3)
    assert nearest_neighbour_distance(images, digits["train"][0]) == pytest.approx(7.2, abs=0.2)
    assert pixel_diversity(class_mean_images(images, labels), labels) < 0.01


IMAGES = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
NOT_IMAGES = [
    None, 3, [], IMAGES.numpy(), IMAGES.tolist(), IMAGES[0], IMAGES.to_sparse(), IMAGES.to("meta"), IMAGES[:0],
]  # fmt: skip
NOT_LABELS = [
    None, 3, [0, 1, 2, 3], torch.arange(3), torch.arange(4) - 1, torch.rand(4), torch.zeros(4, 1, dtype=torch.int64),
    torch.full((4,), torch.nan),
]  # fmt: skip


@pytest.mark.parametrize("images", NOT_IMAGES, ids=range(len(NOT_IMAGES)))
def test_what_is_not_images_is_refused(images: Any) -> None:
    labels = torch.arange(4)
    classifier = DemoClassifier(4, (16, 16))
    for measure in (
        lambda: pixel_diversity(images, labels),
        lambda: class_mean_images(images, labels),
        lambda: nearest_neighbour_distance(images, IMAGES),
        lambda: nearest_neighbour_distance(IMAGES, images),
        lambda: ssim(images, IMAGES),
        lambda: train_classifier(images, labels, 4, steps=1),
        lambda: classifier.accuracy(images, labels),
    ):
        with pytest.raises(DataError):
            measure()


@pytest.mark.parametrize("labels", NOT_LABELS, ids=range(len(NOT_LABELS)))
def test_what_is_not_labels_of_the_images_is_refused(labels: Any) -> None:
    for measure in (
        lambda: pixel_diversity(IMAGES, labels),
        lambda: class_mean_images(IMAGES, labels),
        lambda: train_classifier(IMAGES, labels, 4, steps=1),
        lambda: DemoClassifier(4, (16, 16)).accuracy(IMAGES, labels),
    ):
        with pytest.raises(DataError):
            measure()
