from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mvar_core.config.training import DataConfig
from mvar_core.data.images import RandomCrops, open_images
from mvar_core.data.transforms import random_resized_crop
from mvar_core.io.pixels import to_uint8


def coordinates(height: int, width: int) -> Image.Image:
    """A picture whose red and green say where a pixel lies."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def seen(crop: np.ndarray) -> tuple[float, float]:
    """Which part of the picture's height and width a crop shows."""
    first, last = crop[0, 0].astype(float), crop[-1, -1].astype(float)
    return tuple((last - first)[:2] / 255)


@pytest.mark.parametrize(
    ("shape", "smallest", "expected"),
    [
        ((200, 400), 1.0, (0.95, 1.0)),  # the shorter side whole
        ((200, 400), 0.5, (0.45, 1.0)),
        ((200, 400), 0.0, (0.30, 1.0)),  # down to the picture's own pixels: 64 of 200
        ((32, 32), 0.2, (0.90, 1.0)),  # smaller than asked for: enlarged, but not further
    ],
)
def test_a_crop_shows_between_the_smallest_part_and_the_whole_shorter_side(shape, smallest, expected):
    picture = coordinates(*shape)
    random = np.random.default_rng(0)
    crops = [random_resized_crop(picture, (64, 64), smallest, random) for _ in range(200)]
    assert {crop.shape for crop in crops} == {(64, 64, 3)}
    parts = np.array([seen(crop) for crop in crops])
    assert parts[:, 0].min() >= expected[0]
    assert parts[:, 0].max() <= expected[1]
    if smallest < 0.9 and shape != (32, 32):
        assert parts[:, 0].min() < expected[0] + 0.1
        assert parts[:, 0].max() > 0.9
    if shape[1] > shape[0]:
        lefts = np.array([crop[0, 0, 1] for crop in crops])
        assert lefts.min() < 20
        assert lefts.max() > 110
        np.testing.assert_allclose(parts[:, 0], 2 * parts[:, 1], atol=0.06)  # squares stay squares


@pytest.mark.parametrize("shape", [(200, 240), (240, 120), (90, 250)])
@pytest.mark.parametrize("target", [(32, 64), (64, 32)])
def test_a_crop_of_another_shape_is_not_stretched(shape, target):
    """Red grows along the picture's width and green along its height, alike: so they do in the crop."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.uint8)
    picture = Image.fromarray(np.stack([columns, rows, rows * 0], axis=2))
    for seed in range(5):
        crop = random_resized_crop(picture, target, 0.5, np.random.default_rng(seed)).astype(float)
        assert crop.shape == (*target, 3)
        inner = crop[4:-4, 4:-4]
        right = np.diff(inner[..., 0], axis=1).mean()
        down = np.diff(inner[..., 1], axis=0).mean()
        assert right == pytest.approx(down, rel=0.08)
        assert abs(np.diff(inner[..., 0], axis=0).mean()) < 0.02 * right


def test_crops_follow_from_seed_step_and_row(class_folders):
    source = open_images(str(class_folders))
    data = DataConfig(crop="random", crop_scale=0.3, flip=True)
    rows = np.array([3, 0, 3])
    crops = RandomCrops(source, (16, 16), data, seed=1)
    first = crops.batch(rows, 5)
    assert len(crops) == len(source)
    assert first.shape == (3, 3, 16, 16)
    assert first.dtype == torch.float32
    assert torch.equal(first, RandomCrops(source, (16, 16), data, seed=1).batch(rows, 5))
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first, crops.batch(rows, 6))
    assert not torch.equal(first, RandomCrops(source, (16, 16), data, seed=2).batch(rows, 5))


def test_half_of_the_crops_are_mirrored_where_flips_are_wanted(tmp_path):
    coordinates(16, 16).save(tmp_path / "picture.png")
    source = open_images(str(tmp_path))
    for flip, expected in ((True, (40, 60)), (False, (0, 0))):
        images = RandomCrops(source, (16, 16), DataConfig(crop="random", crop_scale=1, flip=flip)).batch([0] * 100)
        pixels = to_uint8(images)
        mirrored = int((pixels[:, 0, 0, 1] > pixels[:, 0, -1, 1]).sum())
        assert expected[0] <= mirrored <= expected[1]


def test_sources_without_whole_pictures_crop_too():
    crop = open_images("digits").crops(0, (16, 24), 0.5, [np.random.default_rng(0)])[0]
    assert crop.shape == (16, 24, 3)
    assert crop.dtype == np.uint8
