from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mvar_core.config.training import DataConfig
from mvar_core.data.transforms import Views, affine, resize_and_crop


def test_a_photograph_is_halved_then_resized_then_cropped(photographs):
    photograph = Image.fromarray(photographs[0])  # 640 wide, 427 high
    expected = photograph.resize((320, 213), Image.Resampling.BOX).resize((160, 106), Image.Resampling.BOX)
    expected = expected.resize((round(160 * 64 / 106), 64), Image.Resampling.BICUBIC)
    left = (expected.width - 64) // 2
    expected = expected.crop((left, 0, left + 64, 64))
    assert np.array_equal(resize_and_crop(photograph, (64, 64)), expected)


def test_a_tall_photograph_is_cropped_above_and_below(photographs):
    photograph = Image.fromarray(photographs[1]).rotate(90, expand=True)
    result = resize_and_crop(photograph, (256, 256))
    resized = photograph.resize((256, round(640 * 256 / 427)), Image.Resampling.BICUBIC)
    top = (resized.height - 256) // 2
    assert np.array_equal(result, resized.crop((0, top, 256, top + 256)))


@pytest.mark.parametrize("image_shape", [(32, 32), (48, 32), (32, 80), (1, 1), (500, 700), (427, 640)])
def test_the_size_is_the_one_asked_for(photographs, image_shape):
    assert np.asarray(resize_and_crop(Image.fromarray(photographs[0]), image_shape)).shape == (*image_shape, 3)


def test_an_image_of_the_right_size_is_untouched(photographs):
    image = photographs[0][:64, :48]
    assert np.array_equal(resize_and_crop(Image.fromarray(image), (64, 48)), image)


def test_a_wide_target_covers_without_stretching():
    checks = np.zeros((64, 64, 3), np.uint8)
    checks[16:48] = 255
    result = np.asarray(resize_and_crop(Image.fromarray(checks), (32, 64)))
    assert (result[:, 10] > 127).all()  # rows 16 to 48 of the original: the middle, at its own scale


def test_views_are_named_and_counted():
    assert Views(DataConfig()).names == ("image",)
    assert Views(DataConfig(flip=True, augmented_views=2)).names == ("image", "flip", "augmented-1", "augmented-2")
    assert len(Views(DataConfig(augmented_views=4))) == 5


def test_first_views_are_the_image_and_its_mirror_image(photographs):
    image = photographs[0][:32, :40]
    views = Views(DataConfig(flip=True))
    assert np.array_equal(views.apply(image, 3, 0), image)
    assert np.array_equal(views.apply(image, 3, 1), image[:, ::-1])


def test_a_view_depends_on_seed_image_and_view_alone(photographs):
    image = photographs[0][100:132, 200:232]
    data = DataConfig(augmented_views=3)
    first = Views(data, seed=5).apply(image, 7, 2)
    np.random.seed(0)
    assert np.array_equal(Views(data, seed=5).apply(image, 7, 2), first)
    for other in (
        Views(data, 6).apply(image, 7, 2),
        Views(data, 5).apply(image, 8, 2),
        Views(data, 5).apply(image, 7, 1),
    ):
        assert not np.array_equal(other, first)
    assert np.abs(first.astype(int) - image).mean() < 25  # a small change


def test_with_flips_every_second_augmented_view_is_of_the_mirror_image():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    views = Views(DataConfig(flip=True, augmented_views=4))
    bright_left = [bool(views.apply(image, 0, view)[:, :8].mean() > 127) for view in range(len(views))]
    assert bright_left == [True, False, True, False, True, False]


def test_there_is_no_view_beyond_the_last(photographs):
    with pytest.raises(IndexError, match="view 1 of 1"):
        Views(DataConfig()).apply(photographs[0], 0, 1)


def test_affine_of_nothing_is_the_image(photographs):
    image = photographs[1][:33, :48]
    assert np.array_equal(affine(image, shift=(0, 0), degrees=0, zoom=1), image)


def test_affine_shifts_right_and_down_and_repeats_the_edge(photographs):
    image = photographs[1][:32, :64]
    moved = affine(image, shift=(4 / 64, 2 / 32), degrees=0, zoom=1)
    assert np.array_equal(moved[2:, 4:], image[:-2, :-4])
    assert np.array_equal(moved[0, 4:], image[0, :-4])
    assert np.array_equal(moved[2:, 0], image[:-2, 0])


def test_affine_rotates_counter_clockwise(photographs):
    image = photographs[1][:32, :32]
    turned = affine(image, shift=(0, 0), degrees=90, zoom=1)
    assert np.abs(turned.astype(int) - np.rot90(image)).max() <= 1


def test_affine_zooms_about_the_centre():
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:30, 10:30] = 255
    larger = affine(image, shift=(0, 0), degrees=0, zoom=1.5)
    assert int((larger[20, :, 0] > 127).sum()) == 30
    assert np.array_equal(larger, larger[::-1, ::-1])


@pytest.mark.parametrize("degrees", [5, 45, 170])
@pytest.mark.parametrize("zoom", [0.3, 1, 2])
def test_a_flat_image_stays_flat(degrees, zoom):
    image = np.full((24, 40, 3), 200, np.uint8)
    assert (affine(image, shift=(0.4, -0.6), degrees=degrees, zoom=zoom) == 200).all()
