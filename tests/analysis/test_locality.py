from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mvar_core.analysis import locality
from mvar_core.analysis.locality import WINDOWS, LocalityProbe, measure_locality, needed_windows, recommend
from mvar_core.config import ModelConfig
from mvar_core.errors import DataError
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.scales import AttentionPattern, Grid


def small_config(patch_sizes=(1, 2, 4), prefixes="all", windows=(), **transformer):
    last = patch_sizes[-1]
    height, width = (last, last) if isinstance(last, int) else last
    return ModelConfig.model_validate(
        {
            "image_size": [2 * height, 2 * width],
            "patch_sizes": patch_sizes,
            "tokenizer": {
                "codebook_size": 16,
                "latent_channels": 4,
                "base_channels": 8,
                "channel_multipliers": [1, 2],
                "norm_groups": 4,
            },
            "transformer": {"depth": 2, "embed_dim": 8, "num_heads": 2, "num_classes": 3} | transformer,
            "attention": {"scale_prefixes": prefixes, "windows": windows},
        }
    )


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
    probe = LocalityProbe(config)
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
    probe = LocalityProbe(config)
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

    probe = LocalityProbe(config)
    feed(probe, config, before)
    report = probe.report()
    np.testing.assert_allclose(report.scale_mass, [[1, 0, 0], [1, 0, 0], [0, 1, 0]], atol=1e-6)
    assert report.recommended.scale_prefixes == 2
    assert report.recommended.kept_by_prefixes == pytest.approx((1, 1, 1))
    assert np.isfinite(report.window_share[1]).all()


def brute_force(scores_BHLL, config):
    """scale_mass, window_mass, entropy and distance per head from whole L×L maps, position by position."""
    places = [(s, y, x) for s, g in enumerate(config.pyramid.grids) for y in range(g.height) for x in range(g.width)]
    length, scales = len(places), config.pyramid.num_scales
    heads = scores_BHLL.shape[1]
    allowed = np.zeros((length, length), dtype=bool)
    inside = {k: np.zeros((length, length), dtype=bool) for k in WINDOWS}
    apart = np.zeros((length, length))

    def in_window(own, other, side, k):
        k = min(k, side)
        low = max(0, min(own - k // 2, side - k))
        return low <= other < low + k

    for i, (si, yi, xi) in enumerate(places):
        side_y, side_x = config.pyramid.grids[si]
        for j, (sj, yj, xj) in enumerate(places):
            prefixes = config.attention.scale_prefixes
            if sj < si:
                allowed[i, j] = prefixes == "all" or si - sj < prefixes
            elif sj == si:
                window = config.windows[si] or 99
                allowed[i, j] = in_window(yi, yj, side_y, window) and in_window(xi, xj, side_x, window)
                apart[i, j] = math.hypot(yi - yj, xi - xj)
                for k in WINDOWS:
                    inside[k][i, j] = in_window(yi, yj, side_y, k) and in_window(xi, xj, side_x, k)
    scores = np.where(allowed, scores_BHLL.double().numpy(), -np.inf)
    mass = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mass /= mass.sum(axis=-1, keepdims=True)
    of_scale = np.array([place[0] for place in places])
    scale_mass = np.zeros((heads, scales, scales))
    window_mass = np.zeros((heads, scales, len(WINDOWS)))
    entropy, distance = np.zeros((heads, scales)), np.zeros((heads, scales))
    for head in range(heads):
        for s in range(scales):
            rows = mass[:, head][:, of_scale == s]
            count = rows.shape[0] * rows.shape[1]
            for t in range(scales):
                scale_mass[head, s, t] = rows[..., of_scale == t].sum() / count
            for index, k in enumerate(WINDOWS):
                window_mass[head, s, index] = (rows * inside[k][of_scale == s]).sum() / count
            entropy[head, s] = -(rows * np.log(np.where(rows > 0, rows, 1))).sum() / count
            own = rows[..., of_scale == s]
            distance[head, s] = (own * apart[of_scale == s][:, of_scale == s]).sum() / own.sum()
    return scale_mass, window_mass, entropy, distance


CASES = [
    ((1, 2, 4, 5), "all", ()),
    ((1, 2, 3, 5), 1, (0, 0, 0, 3)),
    ((1, 2, 4, 6), 2, (0, 0, 3, 5)),
    ((1, (2, 3), (4, 7)), "all", (0, 3, 5)),
]


@pytest.mark.parametrize("chunk", [1 << 22, 64])
@pytest.mark.parametrize(("patch_sizes", "prefixes", "windows"), CASES)
def test_probe_equals_whole_maps_of_random_queries_and_keys(monkeypatch, chunk, patch_sizes, prefixes, windows):
    monkeypatch.setattr(locality, "CHUNK_NUMBERS", chunk)
    config = small_config(patch_sizes, prefixes, windows)
    length, heads = config.pyramid.num_tokens, config.transformer.num_heads
    noise = torch.Generator().manual_seed(0)
    probe = LocalityProbe(config)
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
    for layer, scores in enumerate(maps):
        scale_mass, window_mass, entropy, distance = brute_force(scores, config)
        np.testing.assert_allclose(report.scale_mass_by_head[layer], scale_mass, atol=1e-6)
        np.testing.assert_allclose(report.window_mass_by_head[layer], window_mass, atol=1e-6)
        np.testing.assert_allclose(report.entropy_by_head[layer], entropy, atol=1e-5)
        np.testing.assert_allclose(report.distance_by_head[layer], distance, atol=1e-5)
    np.testing.assert_allclose(report.scale_mass.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("prefixes", "windows"), [("all", ()), (1, (0, 0, 3)), (2, (0, 0, 3))])
@pytest.mark.parametrize("l2", [True, False])
def test_measured_model_equals_whole_maps(prefixes, windows, l2):
    config = small_config((1, 2, 5), prefixes, windows, l2_attention=l2, gate_init=1.0)
    torch.manual_seed(0)
    transformer, quantizer = Transformer(config), MultiScaleQuantizer(config.tokenizer, config.pyramid)
    torch.nn.init.normal_(quantizer.codebook)
    tokens = torch.randint(16, (5, config.pyramid.num_tokens))
    labels = torch.randint(3, (5,))
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}

    def keep(layer, scale, q, k, pattern, softmax_scale):
        seen.setdefault((layer, scale), []).append(softmax_scale * q.float() @ k.float().transpose(-1, -2))

    calls = []
    batches = [(tokens[:3], labels[:3]), (tokens[3:], labels[3:])]
    report = measure_locality(transformer, quantizer, batches, config, attention="reference", progress=calls.append)
    assert calls == [3, 5]
    assert transformer.training
    transformer.eval()
    with torch.no_grad():
        transformer(labels, quantizer.teacher_forcing_inputs(tokens), attention="reference", probe=keep)
    length = config.pyramid.num_tokens
    for layer in range(2):
        scores = torch.zeros(5, 2, length, length)
        for scale, (pattern, span) in enumerate(zip(config.patterns, config.pyramid.spans, strict=True)):
            scores[:, :, span, span.start - pattern.prefix_tokens : span.stop] = seen[layer, scale][0]
        scale_mass, window_mass, entropy, _ = brute_force(scores, config)
        np.testing.assert_allclose(report.scale_mass_by_head[layer], scale_mass, atol=1e-5)
        np.testing.assert_allclose(report.window_mass_by_head[layer], window_mass, atol=1e-5)
        np.testing.assert_allclose(report.entropy_by_head[layer], entropy, atol=1e-4)


def test_half_precision_queries_are_summed_in_full_precision():
    config = small_config((1, 2, 8), depth=1)
    probe = LocalityProbe(config)
    for scale, pattern in enumerate(config.patterns):
        q = torch.randn(4, 2, pattern.queries, 4, dtype=torch.bfloat16)
        k = torch.randn(4, 2, pattern.keys, 4, dtype=torch.bfloat16)
        probe(0, scale, q, k, pattern, 1.0)
    np.testing.assert_allclose(probe.report().scale_mass.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 2), Grid(5, 5), Grid(8, 8), Grid(3, 6), Grid(7, 4)])
def test_needed_windows_agree_with_the_pattern(grid):
    needed = needed_windows(grid, torch.arange(grid.tokens))
    for window in range(1, max(grid) + 3, 2):
        pattern = AttentionPattern(grid, window)
        for query in range(grid.tokens):
            assert (needed[query] <= window).nonzero().flatten().tolist() == pattern.visible_keys(query)


def test_recommendation_weighs_tokens_and_leaves_diffuse_scales_whole():
    grids = (Grid(1, 1), Grid(2, 2), Grid(10, 10))
    # 100 of 105 tokens keep 0.97 on their own scale, the other 4 with a prefix keep nothing: the mean is 0.93.
    scale_mass = np.array([[1, 0, 0], [1.0, 0, 0], [0.0, 0.03, 0.97]])
    window_mass = np.zeros((3, len(WINDOWS)))
    window_mass[0] = 1
    window_mass[2] = 0.97 * np.array([0.5, 0.9, 0.96, 0.97, 0.98, 1, 1, 1])
    recommended = recommend(scale_mass, window_mass, grids, 0.95)
    assert recommended.scale_prefixes == 2
    assert recommended.windows == (0, 1, 5)
    assert recommended.kept_by_windows == pytest.approx((1, 1, 0.96))
    assert recommend(scale_mass, window_mass, grids, 0.93).scale_prefixes == 1
    assert recommend(scale_mass, window_mass, grids, 0.93).windows == (0, 1, 5)
    assert recommend(scale_mass, window_mass, grids, 0.995).windows == (0, 1, 0)


def test_full_attention_is_recommended_where_all_is_used():
    config = small_config((1, 2, 4))
    probe = LocalityProbe(config)
    feed(probe, config)
    assert probe.report(keep=1.0).recommended.scale_prefixes == "all"
    assert probe.report(keep=1.0).recommended.windows == (0, 0, 0)


def test_report_says_what_is_zero_by_construction_and_is_json():
    config = small_config((1, 2, 4), 1, (0, 0, 3))
    probe = LocalityProbe(config)
    feed(probe, config)
    report = probe.report()
    values = json.loads(json.dumps(report.to_dict()))
    assert len(values["notes"]) == 2
    assert "by construction" in values["notes"][1]
    assert values["window_mass"]["3"][2] == pytest.approx(1)
    assert values["recommended"]["scale_prefixes"] == 1
    assert values["recommended"]["windows"] == [0, 0, 3]
    whole = LocalityProbe(small_config())
    feed(whole, whole.config)
    assert whole.report().notes == []


def test_no_images_and_bad_keep_are_refused():
    probe = LocalityProbe(small_config())
    with pytest.raises(DataError, match="no images"):
        probe.report()
    feed(probe, probe.config)
    with pytest.raises(DataError, match="keep"):
        probe.report(keep=0)
