import numpy as np
import pytest
from PIL import Image

from mvar_core.data.transforms import box_mask, crop_geometry, crop_kept, read_mask, resize_and_crop
from mvar_core.errors import DataError

SIZES = [(16, 16), (16, 40), (40, 16), (33, 70), (70, 131), (9, 7), (257, 200), (15, 17)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wanted", [(16, 16), (8, 24)])
def test_the_geometry_is_that_of_the_crop(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """A bright half is found where the geometry says, in the pixels that resizing and cropping make."""
    (rows, columns), (top, left) = crop_geometry(size, wanted)
    assert 0 <= top <= rows - wanted[0]
    assert 0 <= left <= columns - wanted[1]
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 2 + 1] = 255
    made = np.asarray(resize_and_crop(Image.fromarray(pixels), wanted))
    assert made.shape == (*wanted, 3)
    edge = (size[0] // 2 + 1) * rows / size[0] - top
    brighter = (made[:, 0, 0] > 127).sum()
    assert abs(brighter - min(max(edge, 0), wanted[0])) <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wanted", [(16, 16), (8, 24)])
def test_a_pixel_stays_where_all_that_it_shows_stays(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    kept = np.random.default_rng(0).random(size) < 0.97
    (rows, columns), (top, left) = crop_geometry(size, wanted)
    found = crop_kept(kept, wanted)
    assert found.shape == wanted
    for y in range(wanted[0]):
        for x in range(wanted[1]):
            # In units of 1/rows of a stored pixel, what is shown is from (top + y)·H to (top + y + 1)·H.
            shown = [
                kept[v, u]
                for v in range(size[0])
                for u in range(size[1])
                if (top + y) * size[0] < (v + 1) * rows
                and v * rows < (top + y + 1) * size[0]
                and (left + x) * size[1] < (u + 1) * columns
                and u * columns < (left + x + 1) * size[1]
            ]
            assert found[y, x] == all(shown)


def test_a_picture_of_the_models_size_keeps_its_mask() -> None:
    kept = np.random.default_rng(0).random((32, 48)) < 0.5
    assert np.array_equal(crop_kept(kept, (32, 48)), kept)


def test_masks_from_files(tmp_path) -> None:
    mask = np.random.default_rng(0).random((12, 20)) < 0.5
    for name, image in {
        "gray": Image.fromarray(mask.astype(np.uint8) * 255),
        "one-bit": Image.fromarray(mask),
        "colour": Image.fromarray((mask[..., None] * np.array([250, 250, 200])).astype(np.uint8)),
    }.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png"), mask)


def test_boxes() -> None:
    mask = box_mask((2, 1, 5, 3), (4, 6))
    assert mask.sum() == 6
    assert mask[1:3, 2:5].all()
    assert box_mask((0, 0, 6, 4), (4, 6)).all()
    for wrong in ((0, 0, 7, 4), (0, 0, 6, 5), (-1, 0, 6, 4), (3, 0, 3, 4), (4, 0, 3, 4)):
        with pytest.raises(DataError, match="6 pixels width and 4 height"):
            box_mask(wrong, (4, 6))
