import itertools

import numpy as np
import pytest

from mvar_core.errors import ConfigError
from mvar_core.pyramid import (
    PUBLISHED_PYRAMIDS,
    AttentionPattern,
    Grid,
    ScalePyramid,
    auto_windows,
    check_attention,
    mvar_windows,
    paying_windows,
    read_size,
    read_sizes,
    spread_window,
    window_start,
)


@pytest.mark.parametrize(("image", "tokens"), [(256, 680), (512, 2240), (1024, 9451)])
def test_published_pyramids(image: int, tokens: int) -> None:
    pyramid = ScalePyramid.from_patch_sizes(PUBLISHED_PYRAMIDS[image])
    assert pyramid.num_tokens == tokens
    assert pyramid.latent_grid == (image // 16, image // 16)
    assert pyramid.spans[-1].stop == tokens
    assert len(pyramid.scale_of_token) == tokens


def test_windows_are_shifted_inward() -> None:
    assert [window_start(i, 7, 3) for i in range(7)] == [0, 0, 1, 2, 3, 4, 4]
    pattern = AttentionPattern(Grid(4, 5), window=3, prefix_tokens=2)
    for query in range(pattern.queries):
        keys = pattern.visible_keys(query)
        assert len(keys) == pattern.keys_per_query == 2 + 9
        assert keys == sorted(set(keys))
        assert 2 + query in keys
    assert pattern.visible_keys(0) == [0, 1, *(2 + y * 5 + x for y in range(3) for x in range(3))]
    assert pattern.visible_keys(19)[2:] == [2 + y * 5 + x for y in (1, 2, 3) for x in (2, 3, 4)]


def test_a_window_beyond_an_axis_covers_it() -> None:
    pattern = AttentionPattern(Grid(2, 9), window=5)
    assert pattern.window_grid == (2, 5)
    assert pattern.is_windowed
    assert not AttentionPattern(Grid(2, 4), window=5).is_windowed
    assert not AttentionPattern(Grid(2, 4), window=0).is_windowed


@pytest.mark.parametrize(("prefixes", "expected"), [("all", [0, 1, 5, 14]), (1, [0, 0, 0, 0]), (2, [0, 1, 4, 9])])
def test_prefix_tokens(prefixes: object, expected: list[int]) -> None:
    pyramid = ScalePyramid.from_patch_sizes((1, 2, 3, 4))
    patterns = pyramid.attention_patterns(prefixes, (0, 0, 0, 0))  # type: ignore[arg-type]
    assert [pattern.prefix_tokens for pattern in patterns] == expected


@pytest.mark.parametrize("num_convs", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_scales", [1, 2, 4, 10, 14])
def test_residual_conv_is_the_nearest_tick(num_convs: int, num_scales: int) -> None:
    pyramid = ScalePyramid.from_patch_sizes([1] * num_scales)
    margin = 1 / 12 if num_convs == 4 else 1 / (2 * num_convs)
    ticks = np.linspace(margin, 1 - margin, num_convs)
    for scale in range(num_scales):
        distances = np.abs(ticks - pyramid.ratio(scale))
        assert distances[pyramid.residual_conv_index(scale, num_convs)] == pytest.approx(distances.min(), abs=1e-12)


def test_residual_conv_of_the_published_pyramid() -> None:
    pyramid = ScalePyramid.from_patch_sizes(PUBLISHED_PYRAMIDS[256])
    assert [pyramid.residual_conv_index(scale, 4) for scale in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_non_square_pyramid() -> None:
    pyramid = ScalePyramid.from_patch_sizes((1, (2, 3), (4, 6)))
    assert pyramid.num_tokens == 1 + 6 + 24
    assert pyramid.patch_sizes == (1, (2, 3), (4, 6))
    assert str(pyramid) == "1 2×3 4×6"
    assert pyramid.spelled == "1,2x3,4x6"
    assert read_sizes(pyramid.spelled) == list(pyramid.patch_sizes)


@pytest.mark.parametrize("image", [256, 512, 1024])
def test_a_published_size_has_the_published_pyramid(image: int) -> None:
    assert ScalePyramid.for_image(image, image).patch_sizes == PUBLISHED_PYRAMIDS[image]


@pytest.mark.parametrize("height", [16, 64, 160, 256, 384, 512, 1024, 2048])
@pytest.mark.parametrize("width", [16, 96, 384, 640, 1536])
def test_a_pyramid_for_any_size(height: int, width: int) -> None:
    grids = ScalePyramid.for_image(height, width).grids
    assert grids[0] == (1, 1)
    assert grids[-1] == (height // 16, width // 16)
    for smaller, larger in itertools.pairwise(grids):
        assert smaller != larger
        assert smaller.height <= larger.height
        assert smaller.width <= larger.width
    # Up to rounding, every scale but the first has the image's shape.
    for grid in grids[1:]:
        axes = list(zip(grid, grids[-1], strict=True))
        smallest = max(0 if axis == 1 else (axis - 0.5) / last for axis, last in axes)
        assert smallest <= min((axis + 0.5) / last for axis, last in axes)
    # The two orientations have the same scales.
    assert [grid[::-1] for grid in grids] == list(ScalePyramid.for_image(width, height).grids)


def test_a_non_square_pyramid_keeps_the_published_scales() -> None:
    pyramid = ScalePyramid.for_image(256, 384)
    assert pyramid.spelled == "1,2x3,3x5,4x6,5x8,6x9,8x12,10x15,13x20,16x24"
    assert pyramid.num_tokens == 1030
    with pytest.raises(ConfigError, match="multiples of 16") as error:
        ScalePyramid.for_image(250, 384)
    assert "256x384" in str(error.value)


@pytest.mark.parametrize(
    ("value", "size"), [(16, 16), ("16", 16), ("3x4", (3, 4)), ("3 × 4", (3, 4)), ([4, 4], 4), ((3, 4), (3, 4))]
)
def test_sizes_are_read(value: object, size: object) -> None:
    assert read_size(value) == size


@pytest.mark.parametrize("value", ["", "x4", "3x4x5", "-3", "3.5", True, None, [1, 2, 3], [1.5, 2], {}])
def test_what_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        read_size(value)


def test_windows_pay_where_a_third_of_the_scale_is_in_them() -> None:
    assert paying_windows(ScalePyramid.from_patch_sizes(PUBLISHED_PYRAMIDS[256])) == (0,) * 8 + (7, 7)
    assert paying_windows(ScalePyramid.from_patch_sizes(PUBLISHED_PYRAMIDS[512])) == (0,) * 6 + (7,) * 4
    # A window that is longer than an axis has no more keys than the axis: 7×7 on 3×22 has 21 of 66.
    assert paying_windows(ScalePyramid.from_patch_sizes([(3, 20), (3, 22)])) == (0, 7)
    assert paying_windows(ScalePyramid.from_patch_sizes([4, 6]), 3) == (0, 3)
    assert mvar_windows(ScalePyramid.from_patch_sizes(PUBLISHED_PYRAMIDS[256])) == (0,) * 8 + (7, 7)
    assert mvar_windows(ScalePyramid.from_patch_sizes(PUBLISHED_PYRAMIDS[1024])) == (0,) * 8 + (7,) * 6
    assert mvar_windows(ScalePyramid.from_patch_sizes([1, 2, 3])) == (0, 7, 7)
    assert mvar_windows(ScalePyramid.from_patch_sizes([2])) == (7,)
    with pytest.raises(ConfigError, match="auto:K"):
        auto_windows("auto:", ScalePyramid.from_patch_sizes([4]))


@pytest.mark.parametrize("sizes", [(), (0, 1), (1, 5, 4)])
def test_impossible_pyramids(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="patch_sizes"):
        ScalePyramid.from_patch_sizes(sizes)


@pytest.mark.parametrize(
    ("prefixes", "windows", "message"),
    [
        (0, (0, 0, 0), "1 … 3"),
        (4, (0, 0, 0), "1 … 3"),
        (1, (0, 0, 2), "must be odd"),
        (1, (0, 0, -1), "must be odd"),
        (1, (3, 3), "2 entries"),
    ],
)
def test_impossible_attention(prefixes: int, windows: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_attention(ScalePyramid.from_patch_sizes((1, 2, 4)), prefixes, windows)


def test_one_window_for_all_windowed_scales() -> None:
    assert spread_window(7, (0,) * 10) == (0,) * 8 + (7, 7)
    assert spread_window(5, (0, 0, 0, 3)) == (0, 0, 0, 5)
    assert spread_window(5, (0,)) == (5,)
