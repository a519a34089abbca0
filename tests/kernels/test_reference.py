"""The reference against numbers worked out by hand, and against a masked softmax written another way."""

from __future__ import annotations

import math

import pytest
import torch

from mvar_core.kernels import attend
from mvar_core.pyramid import AttentionPattern, Grid, ScalePyramid


def nearest_positions(position, side, window):
    """The `window` positions nearest to `position`: what a window that shifts inward at the borders holds."""
    return set(sorted(range(side), key=lambda other: abs(other - position))[:window])


def visible(query, key, grid, window):
    """Whether two raster positions of a grid see each other."""
    (y, x), (other_y, other_x) = divmod(query, grid.width), divmod(key, grid.width)
    window = window or max(grid)
    return other_y in nearest_positions(y, grid.height, window) and other_x in nearest_positions(x, grid.width, window)


def masked_softmax(q, k, v, mask, scale):
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v.double()


def test_equal_scores_average_the_window_and_the_prefix():
    values = torch.tensor([100.0, 0.0, 3.0, 6.0, 9.0])[None, None, :, None]
    zeros = torch.zeros_like(values)
    alone = attend(
        zeros[:, :, 1:],
        zeros[:, :, 1:],
        values[:, :, 1:],
        AttentionPattern(Grid(1, 4), 3),
        scale=1.0,
        backend="reference",
    )
    assert alone.flatten().tolist() == [3, 3, 6, 6]
    prefixed = attend(
        zeros[:, :, 1:], zeros, values, AttentionPattern(Grid(4, 1), 3, prefix_tokens=1), scale=1.0, backend="reference"
    )
    assert prefixed.flatten().tolist() == [27.25, 27.25, 29.5, 29.5]


def test_weights_are_the_softmax_of_scaled_products():
    pattern = AttentionPattern(Grid(1, 2))
    q = torch.tensor([2.0, 0.0])[None, None, :, None]
    k = torch.tensor([math.log(3), 0.0])[None, None, :, None]
    v = torch.tensor([8.0, 0.0])[None, None, :, None]
    output = attend(q, k, v, pattern, scale=0.5, backend="reference")
    # Query 0: products 2 ln 3 and 0, halved: weights 3/4 and 1/4. Query 1: equal weights.
    assert output.flatten().tolist() == pytest.approx([6.0, 4.0], rel=1e-6)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(4, 4), Grid(5, 8), Grid(9, 9)])
@pytest.mark.parametrize("window", [0, 1, 3, 5, 11])
@pytest.mark.parametrize("prefix", [0, 3])
def test_equals_a_masked_softmax(make_inputs, grid, window, prefix):
    pattern = AttentionPattern(grid, window, prefix)
    q, k, v, _ = make_inputs(pattern)
    own = [[visible(query, key, grid, window) for key in range(grid.tokens)] for query in range(grid.tokens)]
    mask = torch.cat([torch.ones(grid.tokens, prefix, dtype=torch.bool), torch.tensor(own)], dim=1)
    output = attend(q, k, v, pattern, scale=0.4, backend="reference")
    torch.testing.assert_close(output.double(), masked_softmax(q, k, v, mask, 0.4), rtol=1e-5, atol=1e-6)


def test_accumulates_half_precision_in_float32(make_inputs):
    pattern = AttentionPattern(Grid(16, 16))
    q, k, v, _ = make_inputs(pattern, dtype=torch.bfloat16)
    output = attend(q, k, v, pattern, scale=0.3, backend="reference")
    exact = attend(q.float(), k.float(), v.float(), pattern, scale=0.3, backend="reference")
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.to(torch.bfloat16))


def test_reads_only_what_a_query_sees(make_inputs, attend_with_gradients):
    """NaN in every key and value outside a query's window leaves its output and its gradient as they were."""
    pattern = AttentionPattern(Grid(7, 6), 3, prefix_tokens=2)
    q, k, v, gradient = make_inputs(pattern)
    for query in (0, 8, 20, 41):
        hidden = torch.ones(pattern.keys, dtype=torch.bool)
        hidden[pattern.visible_keys(query)] = False
        poisoned = [x.masked_fill(hidden[:, None], torch.nan) for x in (k, v)]
        clean = attend_with_gradients((q, k, v, gradient), pattern, 0.5, "reference")
        found = attend_with_gradients((q, *poisoned, gradient), pattern, 0.5, "reference")
        assert found[0].isnan().any(), "the poison must reach other queries"
        assert torch.equal(found[0][:, :, query], clean[0][:, :, query])
        assert torch.equal(found[1][:, :, query], clean[1][:, :, query])


@pytest.mark.parametrize("prefixes", [1, 2, "all"])
def test_packed_scales_equal_one_mask_over_the_sequence(make_inputs, prefixes):
    pyramid = ScalePyramid.from_patch_sizes([1, 2, (3, 4), 5])
    windows = (0, 0, 3, 3)
    count = pyramid.num_tokens
    mask = torch.zeros(count, count, dtype=torch.bool)
    for scale, (grid, span) in enumerate(zip(pyramid, pyramid.spans, strict=True)):
        for query in range(grid.tokens):
            first = 0 if prefixes == "all" else max(0, scale - prefixes + 1)
            mask[span.start + query, pyramid.spans[first].start : span.start] = True
            for key in range(grid.tokens):
                mask[span.start + query, span.start + key] = visible(query, key, grid, windows[scale])
    q, k, v, _ = make_inputs(AttentionPattern(Grid(1, count)))
    for backend in ("reference", "auto"):
        outputs = []
        for span, pattern in zip(pyramid.spans, pyramid.attention_patterns(prefixes, windows), strict=True):
            keys = slice(span.start - pattern.prefix_tokens, span.stop)
            outputs.append(attend(q[:, :, span], k[:, :, keys], v[:, :, keys], pattern, scale=0.4, backend=backend))
        output = torch.cat(outputs, dim=2)
        torch.testing.assert_close(output.double(), masked_softmax(q, k, v, mask, 0.4), rtol=1e-5, atol=1e-6)
