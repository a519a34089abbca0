import numpy as np
import pytest

from mvar_core.errors import ConfigError
from mvar_core.scales import (
    PUBLISHED_PYRAMIDS,
    AttentionPattern,
    Grid,
    ScalePyramid,
    check_attention,
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
