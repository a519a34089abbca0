from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny import small_config

from mvar_core.analysis.attention import AttentionProbe, measure_attention
from mvar_core.analysis.recommendation import WINDOWS
from mvar_core.errors import DataError
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer


def feed(probe, config, scores=None, images=2):
    """Call the probe for every layer and scale, with queries and keys whose products are `scores(query, key)`."""
    sizes = config.transformer
    for layer in range(sizes.depth):
        for scale, pattern in enumerate(config.patterns):
            q = torch.zeros(images, sizes.num_heads, pattern.queries, pattern.keys)
            k = torch.eye(pattern.keys).expand(images, sizes.num_heads, -1, -1)
            if scores is not None:
                for query in range(pattern.queries):
                    for key in range(pattern.keys):
                        q[:, :, query, key] = scores(scale, query, key, pattern)
            probe(layer, scale, q, k, pattern, 1.0)


def test_uniform_attention_has_the_masses_of_counting():
    config = small_config((1, 2, 4))
    probe = AttentionProbe(config)
    feed(probe, config)
    report = probe.report()
    np.testing.assert_allclose(report.scale_mass, [[1, 0, 0], [1 / 5, 4 / 5, 0], [1 / 21, 4 / 21, 16 / 21]], atol=1e-7)
    np.testing.assert_allclose(report.window_mass[1], [1, 1 / 5, 1 / 21], atol=1e-7)
    np.testing.assert_allclose(report.window_mass[3], [1, 4 / 5, 9 / 21], atol=1e-7)
    np.testing.assert_allclose(report.window_mass[5], [1, 4 / 5, 16 / 21], atol=1e-7)
    np.testing.assert_allclose(report.window_share[3], [1, 1, 9 / 16], atol=1e-7)
    np.testing.assert_allclose(report.entropy_by_head[1, 0], [0, math.log(5), math.log(21)], atol=1e-6)
    # Mean distance on the 2×2 grid: itself, two at 1, one at √2.
    assert report.distance_by_head[0, 1, 1] == pytest.approx((2 + math.sqrt(2)) / 4)
    assert report.num_images == 2


def test_attention_to_itself_needs_neither_prefixes_nor_neighbours():
    config = small_config((1, 2, 4, 8))
    probe = AttentionProbe(config)
    feed(probe, config, lambda scale, query, key, pattern: 40.0 * (key == pattern.prefix_tokens + query))
    report = probe.report()
    np.testing.assert_allclose(report.scale_mass, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(report.window_mass[1], 1, atol=1e-6)
    np.testing.assert_allclose(report.distance_by_head, 0, atol=1e-6)
    assert report.recommended.scale_prefixes == 1
    assert report.recommended.windows == (0, 1, 1, 1)


def test_attention_to_the_scale_before_recommends_two_prefixes():
    config = small_config((1, 2, 4))

    def before(scale, query, key, pattern):
        previous = pattern.prefix_tokens - (config.pyramid.grids[scale - 1].tokens if scale else 0)
        return 40.0 * (previous <= key < pattern.prefix_tokens)

    probe = AttentionProbe(config)
    feed(probe, config, before)
    report = probe.report()
    np.testing.assert_allclose(report.scale_mass, [[1, 0, 0], [1, 0, 0], [0, 1, 0]], atol=1e-6)
    assert report.recommended.scale_prefixes == 2
    assert report.recommended.kept_by_prefixes == pytest.approx((1, 1, 1))
    assert np.isfinite(report.window_share[1]).all()


def brute_force(scores_BHLL, config):
    """All statistics per head from whole L×L maps, position by position, as the definitions say."""
    grids = config.pyramid.grids
    places = [(s, y, x) for s, g in enumerate(grids) for y in range(g.height) for x in range(g.width)]
    length, scales = len(places), len(grids)
    heads = scores_BHLL.shape[1]
    allowed = np.zeros((length, length), dtype=bool)
    inside = np.zeros((len(WINDOWS), length, length), dtype=bool)
    apart = np.zeros((length, length))
    moved = np.zeros((length, length, 2), dtype=int)

    def in_window(centre, other, side, k):
        k = min(k, side)
        low = max(0, min(centre - k // 2, side - k))
        return low <= other < low + k

    for i, (si, yi, xi) in enumerate(places):
        for j, (sj, yj, xj) in enumerate(places):
            if sj > si:
                continue
            side_y, side_x = grids[sj]
            my = math.floor((yi + 0.5) * side_y / grids[si].height)
            mx = math.floor((xi + 0.5) * side_x / grids[si].width)
            prefixes = config.attention.scale_prefixes
            if sj < si:
                allowed[i, j] = prefixes == "all" or si - sj < prefixes
            else:
                assert (my, mx) == (yi, xi)
                window = config.windows[si] or 99
                allowed[i, j] = in_window(yi, yj, side_y, window) and in_window(xi, xj, side_x, window)
                apart[i, j] = math.hypot(yi - yj, xi - xj)
            moved[i, j] = (yj - my + side_y - 1, xj - mx + side_x - 1)
            for index, k in enumerate(WINDOWS):
                inside[index, i, j] = in_window(my, yj, side_y, k) and in_window(mx, xj, side_x, k)
    scores = np.where(allowed, scores_BHLL.double().numpy(), -np.inf)
    mass = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mass /= mass.sum(axis=-1, keepdims=True)
    of_scale = np.array([place[0] for place in places])
    found = {
        "scale_mass": np.zeros((heads, scales, scales)),
        "window_mass": np.zeros((heads, scales, scales, len(WINDOWS))),
        "entropy": np.zeros((heads, scales)),
        "distance": np.zeros((heads, scales)),
        "keys": [np.zeros(tuple(g)) for g in grids],
        "displacements": [np.zeros((2 * g.height - 1, 2 * g.width - 1)) for g in grids],
    }
    for head in range(heads):
        for s in range(scales):
            rows = mass[:, head][:, of_scale == s]
            count = rows.shape[0] * rows.shape[1]
            for t in range(scales):
                part = rows[..., of_scale == t]
                found["scale_mass"][head, s, t] = part.sum() / count
                within = inside[:, of_scale == s][:, :, of_scale == t]
                found["window_mass"][head, s, t] = (part.sum(axis=0) * within).sum(axis=(1, 2)) / count
            found["entropy"][head, s] = -(rows * np.log(np.where(rows > 0, rows, 1))).sum() / count
            own = rows[..., of_scale == s]
            found["distance"][head, s] = (own * apart[of_scale == s][:, of_scale == s]).sum() / own.sum()
    last = mass[:, :, of_scale == scales - 1].mean(axis=(0, 1, 2))
    for t, grid in enumerate(grids):
        found["keys"][t] = last[of_scale == t].reshape(grid)
    rows = mass[:, :, of_scale == scales - 1].mean(axis=(0, 1)) / grids[-1].tokens
    for row, i in enumerate(np.flatnonzero(of_scale == scales - 1)):
        for j, (t, _, _) in enumerate(places):
            found["displacements"][t][tuple(moved[i, j])] += rows[row, j]
    return found


def check_against(report, maps, config, tolerance):
    """Each layer's figures are those of its whole maps; the last scale's maps are means over layers."""
    layers = [brute_force(scores, config) for scores in maps]
    for layer, expected in enumerate(layers):
        for name in ("scale_mass", "window_mass", "entropy", "distance"):
            found = getattr(report, f"{name}_by_head")[layer]
            np.testing.assert_allclose(found, expected[name], atol=tolerance, err_msg=name)
    for found, name in ((report.last_scale_keys, "keys"), (report.last_scale_displacements, "displacements")):
        for scale, map_yx in enumerate(found):
            expected = np.mean([layer[name][scale] for layer in layers], axis=0)
            np.testing.assert_allclose(map_yx, expected, atol=tolerance, err_msg=name)
        assert sum(map_yx.sum() for map_yx in found) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(report.scale_mass.sum(axis=1), 1, atol=1e-6)


CASES = [
    ((1, 2, 4, 5), "all", ()),
    ((1, 2, 3, 5), 1, (0, 0, 0, 3)),
    ((1, 2, 4, 6), 2, (0, 0, 3, 5)),
    ((1, (2, 3), (4, 7)), "all", (0, 3, 5)),
    ((2, (3, 2), (5, 3)), 2, ()),
]


@pytest.mark.parametrize(("patch_sizes", "prefixes", "windows"), [*CASES, ((1,), "all", ())])
def test_an_even_spread_is_over_what_the_model_lets_its_tokens_see(patch_sizes, prefixes, windows):
    config = small_config(patch_sizes, prefixes, windows)
    probe = AttentionProbe(config)
    feed(probe, config, images=1)
    length = config.pyramid.num_tokens
    check_against(probe.report().even, [torch.zeros(1, 1, length, length)], config, 1e-12)


@pytest.mark.parametrize("values_at_once", [1 << 21, 64])
@pytest.mark.parametrize(("patch_sizes", "prefixes", "windows"), CASES)
def test_probe_equals_whole_maps_of_random_queries_and_keys(values_at_once, patch_sizes, prefixes, windows):
    config = small_config(patch_sizes, prefixes, windows)
    length, heads = config.pyramid.num_tokens, config.transformer.num_heads
    noise = torch.Generator().manual_seed(0)
    probe = AttentionProbe(config, values_at_once=values_at_once)
    maps = []
    for layer in range(config.transformer.depth):
        batches = []
        for _ in range(2):  # two batches of three images
            q, k = (torch.randn(3, heads, length, 4, generator=noise) for _ in range(2))
            for scale, (pattern, span) in enumerate(zip(config.patterns, config.pyramid.spans, strict=True)):
                keys = k[:, :, span.start - pattern.prefix_tokens : span.stop]
                probe(layer, scale, q[:, :, span], keys, pattern, 0.7)
            batches.append(0.7 * q @ k.transpose(-1, -2))
        maps.append(torch.cat(batches))
    report = probe.report()
    assert report.num_images == 6
    check_against(report, maps, config, 1e-6)


def measured_and_whole(config, dtype=torch.float32):
    """What is measured of a random model in two batches, and its whole maps from queries and keys that are kept."""
    torch.manual_seed(0)
    transformer, quantizer = Transformer(config), MultiScaleQuantizer(config.tokenizer, config.pyramid)
    torch.nn.init.normal_(quantizer.codebook)
    for block in transformer.blocks:
        block.attention.query_bias.data.normal_()
    transformer.to_compute_dtype(dtype)
    length = config.pyramid.num_tokens
    tokens, labels = torch.randint(16, (5, length)), torch.randint(3, (5,))
    calls = []
    batches = [(tokens[:3], labels[:3]), (tokens[3:], labels[3:])]
    report = measure_attention(transformer, quantizer, batches, config, attention="reference", progress=calls.append)
    assert calls == [3, 6, 8, 10]  # two layers, three images and then two
    assert transformer.training
    maps = torch.zeros(2, 5, 2, length, length)

    def keep(layer, scale, q, k, pattern, softmax_scale):
        span = config.pyramid.spans[scale]
        keys = slice(span.start - pattern.prefix_tokens, span.stop)
        maps[layer, :, :, span, keys] = softmax_scale * q.float() @ k.float().transpose(-1, -2)

    transformer.eval()
    with torch.no_grad():
        transformer(labels, quantizer.teacher_forcing_inputs(tokens), attention="reference", probe=keep)
    return report, maps


@pytest.mark.parametrize("patch_sizes", [(1, 2, 5), (1, (2, 3), (3, 5))])
@pytest.mark.parametrize(("prefixes", "windows"), [("all", ()), (1, (0, 0, 3)), (2, (0, 0, 3)), ("all", (0, 0, 3))])
@pytest.mark.parametrize("l2", [True, False])
def test_measured_model_equals_whole_maps(prefixes, windows, l2, patch_sizes):
    config = small_config(patch_sizes, prefixes, windows, l2_attention=l2, gate_init=1.0)
    report, maps = measured_and_whole(config)
    check_against(report, maps, config, 1e-6)


def test_measured_model_in_bfloat16_equals_whole_maps_of_its_queries_and_keys():
    """Inputs are rounded, what is made of them is not; passes of other batches round a little differently."""
    config = small_config((1, (2, 3), (3, 5)), 2, (0, 0, 3), gate_init=1.0)
    report, maps = measured_and_whole(config, torch.bfloat16)
    check_against(report, maps, config, 2e-2)


def test_half_precision_queries_are_summed_in_full_precision():
    config = small_config((1, 2, 8), depth=1)
    probe = AttentionProbe(config)
    for scale, pattern in enumerate(config.patterns):
        q = torch.randn(4, 2, pattern.queries, 4, dtype=torch.bfloat16)
        k = torch.randn(4, 2, pattern.keys, 4, dtype=torch.bfloat16)
        probe(0, scale, q, k, pattern, 1.0)
    np.testing.assert_allclose(probe.report().scale_mass.sum(axis=1), 1, atol=1e-6)


def test_full_attention_is_recommended_where_all_is_used():
    config = small_config((1, 2, 4))
    probe = AttentionProbe(config)
    feed(probe, config)
    assert probe.report(keep=1.0).recommended.scale_prefixes == "all"
    assert probe.report(keep=1.0).recommended.windows == (0, 0, 0)


def test_report_says_what_is_zero_by_construction_and_is_json():
    config = small_config((1, 2, 4), 1, (0, 0, 3))
    probe = AttentionProbe(config)
    feed(probe, config)
    report = probe.report()
    values = json.loads(json.dumps(report.to_dict()))
    assert len(values["notes"]) == 2
    assert "by construction" in values["notes"][1]
    assert values["window_mass"]["3"][2] == pytest.approx(1)
    assert values["recommended"]["scale_prefixes"] == 1
    assert values["recommended"]["windows"] == [0, 0, 3]
    for layer in values["layers"]:
        for part in (layer, *layer["heads"]):
            assert part["own_scale_mass"] == pytest.approx([1, 1, 1])
            assert part["previous_scale_mass"] == [0, 0, 0]
            assert part["entropy"] == pytest.approx([0, math.log(4), math.log(9)])
            assert len(part["distance"]) == 3
        assert [head["head"] for head in layer["heads"]] == [0, 1]
    assert [layer["layer"] for layer in values["layers"]] == [0, 1]
    assert np.shape(values["window_mass_by_scale"]["7"]) == (3, 3)
    assert np.shape(values["last_scale"]["displacements"][2]) == (7, 7)
    assert np.shape(values["last_scale"]["keys"][1]) == (2, 2)
    whole = AttentionProbe(small_config())
    feed(whole, whole.config)
    assert whole.report().notes == []


def test_no_images_and_bad_keep_are_refused():
    probe = AttentionProbe(small_config())
    with pytest.raises(DataError, match="no images"):
        probe.report()
    feed(probe, probe.config)
    with pytest.raises(DataError, match="keep"):
        probe.report(keep=0)


def constructed(config):
    """A model whose three heads look where they are told by weights alone; in float64, so that nothing is rounded.

    A token's stream holds its own place and its scale, each a one in a row of zeros. Head 0 asks for the place before:
    the matching one of the previous scale (the first scale has none and asks for itself). Head 1 asks for its own
    scale, head 2 for the token FIXED.
    """
    pyramid, sizes = config.pyramid, config.transformer
    length, width, head = pyramid.num_tokens, sizes.embed_dim, sizes.head_dim
    transformer = Transformer(config).to_compute_dtype(torch.float64).eval()
    places = [(s, y, x) for s, g in enumerate(pyramid.grids) for y in range(g.height) for x in range(g.width)]
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "head" not in name:
                parameter.zero_()
        for token, (scale, y, x) in enumerate(places):
            transformer.position_embedding[0, token, token] = 1
            transformer.scale_embedding.weight[scale, length + scale] = 1
            attention = transformer.blocks[0].attention
            query, key = attention.qkv.weight[:width], attention.qkv.weight[width : 2 * width]
            wanted = token
            if scale:
                g, b = pyramid.grids[scale], pyramid.grids[scale - 1]
                wanted = places.index((scale - 1, (2 * y + 1) * b.height // (2 * g.height),
                                       (2 * x + 1) * b.width // (2 * g.width)))  # fmt: skip
            query[wanted, token] = key[token, token] = STRENGTH
            key[head + token, token] = key[2 * head + token, token] = STRENGTH
        for scale in range(pyramid.num_scales):
            query[head + length + scale, length + scale] = key[head + length + scale, length + scale] = STRENGTH
        key[head : head + length] = 0
        attention.query_bias[2 * head + FIXED] = STRENGTH
    return transformer


STRENGTH, FIXED = 300.0, 1


@pytest.mark.parametrize("patch_sizes", [(1, 2, 4), (1, (2, 3), (4, 5)), (2, 3, (5, 4))])
def test_weights_that_look_at_one_place_have_the_figures_of_counting(patch_sizes):
    length = sum(a * b for a, b in (size if isinstance(size, tuple) else (size, size) for size in patch_sizes))
    head = length + len(patch_sizes)
    config = small_config(
        patch_sizes, depth=1, embed_dim=3 * head, num_heads=3, l2_attention=False, num_classes=3, mlp_ratio=0.1
    )
    quantizer = MultiScaleQuantizer(config.tokenizer, config.pyramid)
    tokens = torch.randint(16, (2, length), generator=torch.Generator().manual_seed(0))
    batches = [(tokens, torch.tensor([0, 2]))]
    report = measure_attention(constructed(config), quantizer, batches, config, attention="reference")
    grids, scales = config.pyramid.grids, len(patch_sizes)
    close = {"atol": 1e-6, "rtol": 0}

    before = np.eye(scales, k=-1)
    before[0, 0] = report.scale_mass_by_head[0, 0, 0, 0]
    np.testing.assert_allclose(report.scale_mass_by_head[0, 0], before, **close)
    np.testing.assert_allclose(report.scale_mass_by_head[0, 0].sum(axis=1), 1, **close)
    for index in range(len(WINDOWS)):  # the smallest window holds all
        np.testing.assert_allclose(report.window_mass_by_head[0, 0, 1:, :, index], before[1:], **close)
    np.testing.assert_allclose(report.entropy_by_head[0, 0, 1:], 0, **close)

    np.testing.assert_allclose(report.scale_mass_by_head[0, 1], np.eye(scales), **close)
    np.testing.assert_allclose(report.entropy_by_head[0, 1], [math.log(g.tokens) for g in grids], **close)
    for index, k in enumerate(WINDOWS):
        parts = [min(k, g.height) * min(k, g.width) / g.tokens for g in grids]
        np.testing.assert_allclose(report.window_mass_by_head[0, 1, ..., index], np.diag(parts), **close)
    for scale, grid in enumerate(grids):
        cells = [(y, x) for y in range(grid.height) for x in range(grid.width)]
        mean = np.mean([math.hypot(a[0] - b[0], a[1] - b[1]) for a in cells for b in cells])
        assert report.distance_by_head[0, 1, scale] == pytest.approx(mean, abs=1e-6)

    holder = next(s for s, span in enumerate(config.pyramid.spans) if span.start <= FIXED < span.stop)
    fixed = np.zeros((scales, scales))
    fixed[holder:, holder] = 1
    np.testing.assert_allclose(report.scale_mass_by_head[0, 2, holder:], fixed[holder:], **close)
    np.testing.assert_allclose(report.entropy_by_head[0, 2, holder:], 0, **close)

    last = [np.full(tuple(g), 1 / g.tokens / 3) * (s == scales - 1) for s, g in enumerate(grids)]
    last[holder].flat[FIXED - config.pyramid.spans[holder].start] += 1 / 3
    from_last, into = grids[-1], grids[-2]
    for y in range(from_last.height):
        for x in range(from_last.width):
            place = (
                (2 * y + 1) * into.height // (2 * from_last.height),
                (2 * x + 1) * into.width // (2 * from_last.width),
            )
            last[-2][place] += 1 / from_last.tokens / 3
    for found, expected in zip(report.last_scale_keys, last, strict=True):
        np.testing.assert_allclose(found, expected, **close)
    displaced = report.last_scale_displacements[-2]
    if holder != scales - 2:
        assert displaced[into.height - 1, into.width - 1] == pytest.approx(1 / 3, abs=1e-6)
        assert displaced.sum() == pytest.approx(1 / 3, abs=1e-6)
