from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mvar_core.data.images import open_images
from mvar_core.errors import DataError


def test_the_split_is_stratified_disjoint_and_complete():
    train, test = open_images("digits"), open_images("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert set(train.item_names).isdisjoint(test.item_names)
    assert len({*train.item_names, *test.item_names}) == 1797
    shares = np.bincount(test.labels) / np.bincount(np.concatenate([train.labels, test.labels]))
    assert np.allclose(shares, 0.2, atol=0.005)
    assert train.class_names == tuple("0123456789")
    assert train.labels.dtype == np.int64


def test_labels_and_pixels_are_the_data_sets():
    digits = load_digits()
    source = open_images("digits:test")
    for index in (0, 17, 359):
        original = int(source.item_names[index].removeprefix("digits/"))
        assert source.labels[index] == digits.target[original]
        pixels = source.read(index, (8, 8))
        assert np.array_equal(pixels[..., 0], np.rint(digits.images[original] * 255 / 16))
        assert (pixels == pixels[..., :1]).all()


def test_the_split_is_always_the_same():
    names = open_images("digits:test").item_names
    assert names[:4] == ["digits/0021", "digits/0024", "digits/0028", "digits/0034"]
    assert open_images("digits").fingerprint() == open_images("digits", "train").fingerprint()
    assert open_images("digits").fingerprint() != open_images("digits:test").fingerprint()


@pytest.mark.parametrize("image_shape", [(32, 32), (16, 48)])
def test_digits_come_in_any_size(image_shape):
    pixels = open_images("digits").read(3, image_shape)
    assert pixels.shape == (*image_shape, 3)
    assert pixels.dtype == np.uint8
    assert pixels.max() > 200


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match=r"digits has no split 'validation'.*test, train"):
        open_images("digits", "validation")
