from __future__ import annotations

import numpy as np
import pytest

from mvar_core.data.bundled import HELD_OUT
from mvar_core.data.images import open_images
from mvar_core.errors import DataError


def places(photograph: np.ndarray, crop: np.ndarray) -> list[tuple[int, int]]:
    """Where in a photograph a crop was cut from: every place with its very pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (1, 4, 3))[: -len(crop) + 1, :, 0]
    tops, lefts = np.nonzero((windows == crop[0, :4]).all(axis=(2, 3, 4)))
    height, width = crop.shape[:2]
    return [
        (top, left)
        for top, left in zip(tops.tolist(), lefts.tolist(), strict=True)
        if np.array_equal(photograph[top : top + height, left : left + width], crop)
    ]


@pytest.mark.parametrize(("split", "count"), [("train", 2048), ("test", 128)])
def test_crops_are_the_photographs_own_pixels_on_their_side_of_the_strip(photographs, split, count):
    source = open_images(f"photographs:{split}")
    assert len(source) == count
    assert source.class_names == ("china", "flower")
    assert np.bincount(source.labels).tolist() == [count // 2, count // 2]
    for index in range(0, count, count // 12):
        crop = source.read(index, (48, 64))
        assert np.array_equal(crop, source.read(index, (48, 64)))
        found = places(photographs[source.labels[index]], crop)
        assert found, index
        for top, _ in found:
            inside = HELD_OUT.start <= top and top + 48 <= HELD_OUT.stop
            outside = top + 48 <= HELD_OUT.start or top >= HELD_OUT.stop
            assert inside if split == "test" else outside, top


def test_random_crops_reach_both_sides_and_never_the_strip(photographs):
    source = open_images("photographs")
    random = np.random.default_rng(0)
    tops = []
    for _ in range(60):
        crop = source.crops(0, (64, 64), 0.5, [random])[0]
        tops.append(places(photographs[0], crop)[0][0])
    assert min(tops) < 40
    assert max(tops) > HELD_OUT.stop
    assert all(top + 64 <= HELD_OUT.start or top >= HELD_OUT.stop for top in tops)
    assert len(set(tops)) > 40


def test_crops_larger_than_the_strip_are_enlarged():
    assert open_images("photographs:test").read(0, (256, 256)).shape == (256, 256, 3)
    assert open_images("photographs").read(0, (300, 512)).shape == (300, 512, 3)


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match=r"photographs has no split 'validation'.*test, train"):
        open_images("photographs", "validation")
