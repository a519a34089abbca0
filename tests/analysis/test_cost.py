from __future__ import annotations

import pytest
import torch
from tiny import small_config
from torch.utils.flop_counter import FlopCounterMode

from mvar_core.analysis.cost import cached_tokens, cost_of
from mvar_core.config import Machine, ModelConfig
from mvar_core.config.presets import load_config
from mvar_core.errors import ConfigError
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE


def plan(config, *, dtype="bfloat16", device="cpu", memory=None, **options):
    """The cost on a machine that need not be here."""
    return cost_of(config, Machine(dtype=dtype, device=device, memory=memory), **options)


def visible(config, query, key):
    """Whether a token attends to another, both as indices among all L tokens; written from the definition alone."""
    places = [
        (scale, y, x)
        for scale, grid in enumerate(config.pyramid.grids)
        for y in range(grid.height)
        for x in range(grid.width)
    ]
    (query_scale, *query_place), (key_scale, *key_place) = places[query], places[key]
    prefixes = config.attention.scale_prefixes
    if key_scale > query_scale:
        return False
    if key_scale < query_scale:
        return prefixes == "all" or query_scale - key_scale < prefixes
    window = config.windows[query_scale]
    for own, other, side in zip(query_place, key_place, config.pyramid.grids[query_scale], strict=True):
        if window and window < side:
            low = own - window // 2
            while low < 0:
                low += 1
            while low + window > side:
                low -= 1
            if not low <= other < low + window:
                return False
    return True


CASES = [
    ((1, 2, 4), "all", ()),
    ((1, 2, 4), 1, (0, 0, 3)),
    ((1, 2, 3, 5), 2, (0, 0, 0, 3)),
    ((1, 2, 3, 6), 3, (0, 0, 3, 5)),
    ((1, (2, 3), (4, 6)), "all", (0, 3, 5)),
    ((1, 2, 4), 1, (0, 7, 9)),
]


@pytest.mark.parametrize(("patch_sizes", "prefixes", "windows"), CASES)
def test_attention_macs_equal_a_count_pair_by_pair(patch_sizes, prefixes, windows):
    config = small_config(patch_sizes, prefixes, windows)
    sizes, length = config.transformer, config.pyramid.num_tokens
    macs = 0
    for _layer in range(sizes.depth):
        for query in range(length):
            for _output in range(3 * sizes.embed_dim):  # q, k, v: one dot product over the width each
                macs += sizes.embed_dim
            for key in range(length):
                if visible(config, query, key):
                    macs += sizes.num_heads * sizes.head_dim  # q·k
                    macs += sizes.num_heads * sizes.head_dim  # probability times v
    result = plan(config)
    assert result.attention_gmacs == pytest.approx(macs / 1e9, rel=1e-12)
    assert sum(row["attention_gmacs"] for row in result.scales) == pytest.approx(macs / 1e9, rel=1e-12)
    spans = config.pyramid.spans
    for row, span in zip(result.scales, spans, strict=True):
        seen = {sum(visible(config, query, key) for key in range(length)) for query in range(span.start, span.stop)}
        assert seen == {row["keys_per_query"]}


@pytest.mark.parametrize("prefixes", ["all", 1, 2, 3])
@pytest.mark.parametrize(("shared", "l2"), [(False, True), (True, False)])
def test_total_macs_equal_what_torch_multiplies(prefixes, shared, l2):
    # The first scale has 4 tokens: torch runs products over a single key as something that its counter does not count.
    # 16 rows: fewer may be padded. All scales are whole: the reference multiplies what it then masks.
    config = small_config((2, 3, 4), prefixes, (), shared_adaln=shared, l2_attention=l2)
    transformer, tokenizer = Transformer(config).eval(), VQVAE(config.tokenizer, config.pyramid).eval()
    rows = 16
    labels, inputs = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, config.pyramid.num_tokens - 4, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(labels, inputs, attention="reference")
    cost = plan(config)
    assert counter.get_total_flops() == round(2e9 * rows * (cost.total_gmacs - cost.decoder_gmacs))
    tokens = torch.zeros(1, config.pyramid.num_tokens, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokenizer.decode(tokens)
    assert counter.get_total_flops() == round(2e9 * cost.decoder_gmacs)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("middle", [1, 2, 3])
@pytest.mark.parametrize(("shared", "l2"), [(False, True), (True, False)])
def test_parameters_equal_the_built_modules(attention, middle, shared, l2):
    values = small_config((1, (2, 3), (4, 6)), shared_adaln=shared, l2_attention=l2, mlp_ratio=3).model_dump()
    values["tokenizer"] |= {"attention": attention, "middle_blocks": middle, "encoder_blocks": 3, "residual_convs": 2}
    config = ModelConfig.model_validate(values)
    result = plan(config)
    assert result.parameters == sum(p.numel() for p in Transformer(config).parameters())
    assert result.tokenizer_parameters == sum(p.numel() for p in VQVAE(config.tokenizer, config.pyramid).parameters())


def test_published_attention_cost():
    # 16·(3·1024²·680 + 2·1024·Σ keys), with Σ keys by hand: VAR sees 1·1 + 4·5 + 9·14 + … + 256·680.
    ends = [1, 5, 14, 30, 55, 91, 155, 255, 424, 680]
    sides = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    pairs = sum(side * side * end for side, end in zip(sides, ends, strict=True))
    expected = 16 * (3 * 1024**2 * 680 + 2 * 1024 * pairs) / 1e9
    assert plan(load_config("var-d16-256")).attention_gmacs == pytest.approx(expected)
    pairs = sum(side**4 for side in sides[:8]) + (169 + 256) * 49
    expected = 16 * (3 * 1024**2 * 680 + 2 * 1024 * pairs) / 1e9
    assert plan(load_config("mvar-d16-256")).attention_gmacs == pytest.approx(expected)


def test_kv_cache():
    var, mvar = load_config("var-d16-256"), load_config("mvar-d16-256")
    assert plan(var, batch_size=64, dtype="bfloat16").kv_cache_bytes == 2 * 16 * 1024 * 680 * 128 * 2
    assert plan(var, batch_size=64, dtype="float32", guided=False).kv_cache_bytes == 2 * 16 * 1024 * 680 * 64 * 4
    assert plan(mvar, batch_size=64).kv_cache_bytes == 0
    assert all(row["kv_cache_bytes"] == 0 for row in plan(mvar).scales)
    two = load_config("var-d16-256", ["attention.scale_prefixes=2"])
    assert plan(two, guided=False).kv_cache_bytes == 2 * 16 * 1024 * 256 * 2
    three = load_config("var-d16-256", ["attention.scale_prefixes=3"])
    assert [cached_tokens(three, scale) for scale in range(10)] == [1, 5, 13, 25, 41, 61, 100, 164, 269, 425]


def test_totals_are_the_sum_of_their_parts():
    result = plan(load_config("mvar-d16-256"))
    transformer = sum(row["total_gmacs"] for row in result.scales) + result.conditioning_gmacs
    assert result.total_gmacs == pytest.approx(transformer + result.decoder_gmacs)
    assert result.guided_gmacs == pytest.approx(2 * transformer + result.decoder_gmacs)
    assert all(row["total_gmacs"] > row["attention_gmacs"] for row in result.scales)
    assert sum(result.parts_gmacs.values()) == pytest.approx(result.total_gmacs)
    assert {"projections", "attention", "mlp", "head", "conditioning", "quantizer", "decoder"} < set(result.parts_gmacs)
    for row in result.scales:
        assert sum(row["parts_gmacs"].values()) == pytest.approx(row["total_gmacs"])
    # The paper counts q, k, v and the products, not the output projection.
    paper = 3 / 4 * result.parts_gmacs["projections"] + result.parts_gmacs["attention"]
    assert paper == pytest.approx(result.attention_gmacs)


def test_memory_orders_models_as_they_must_be():
    var, mvar = load_config("var-d16-256"), load_config("mvar-d16-256")
    peaks = [plan(var, batch_size=batch).sample_peak_bytes for batch in (1, 8, 64)]
    assert peaks == sorted(set(peaks))
    large = plan(var, batch_size=64)
    assert large.sample_peak_bytes > large.weight_bytes + large.kv_cache_bytes
    assert plan(mvar, batch_size=64).sample_peak_bytes < large.sample_peak_bytes
    # Weights alone: half precision but for the head, its modulation and the quantizer.
    in_float32 = 2 * (1024**2 + 1024) + 1024 * 4096 + 4096 + 4096 * 32 + 4 * (9 * 32 * 32 + 32)
    tokenizer = VQVAE(var.tokenizer, var.pyramid).drop_encoder()
    sampling = large.parameters + sum(parameter.numel() for parameter in tokenizer.parameters())
    assert large.weight_bytes == 2 * sampling + 2 * in_float32
    # Weights of a scale-Markov model and one scale's micro-batch, whatever the batch.
    few, many = (plan(mvar, batch_size=batch) for batch in (8, 64))
    assert many.sample_peak_bytes < 1.05 * few.sample_peak_bytes
    assert plan(var, batch_size=64).sample_peak_bytes > 2 * plan(var, batch_size=8).sample_peak_bytes
    assert many.image_bytes * 500 < large.image_bytes * 5


def test_largest_batch_fits_and_one_more_does_not():
    config = load_config("mvar-d16-256")
    gib = 1 << 30
    result = plan(config, device_memory=24 * gib)
    for more in (0, 1):
        sampled = plan(config, batch_size=result.largest_batch + more, memory=24 * gib)
        assert sampled.images_together == result.largest_batch
        assert sampled.sample_peak_bytes <= 24 * gib
        trained = plan(config, batch_size=result.largest_train_batch + more)
        assert (trained.train_peak_bytes <= 24 * gib) == (more == 0)
    none = plan(config, device_memory=1 << 20)
    assert none.largest_batch == none.largest_train_batch == 0
    assert result.train_batch_size == config.train.batch_size
    assert plan(config).largest_batch is None


def test_tokenizer_alone_has_a_plan():
    config = small_config().model_copy(update={"transformer": None})
    result = plan(config, device_memory=1 << 30)
    assert result.parameters == 0
    assert result.attention_gmacs == 0
    assert result.total_gmacs == result.decoder_gmacs > 0
    assert result.train_peak_bytes is None
    assert result.largest_batch > 0


def test_a_memory_budget_makes_micro_batches_smaller():
    config = load_config("mvar-d16-256")
    free = plan(config, batch_size=64, device="cuda")
    tight = plan(config, batch_size=64, device="cuda", memory=900_000_000)
    assert tight.sample_peak_bytes <= 900_000_000 < free.sample_peak_bytes
    assert tight.images_together == free.images_together == 64
    sizes = [[row["micro_batch"] for row in result.scales] for result in (tight, free)]
    assert all(less <= more for less, more in zip(*sizes, strict=True))
    assert sizes[0][-1] < sizes[1][-1]
    with pytest.raises(ConfigError, match="one image of mvar-d16-256 needs"):
        plan(config, memory=500_000_000)


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"dtype": "int8"}, {"device_memory": 0}, {"memory": 0}, {"device": "tpu"}]
)
def test_values_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        plan(small_config(), **bad)


def test_to_dict_has_the_promised_keys():
    result = plan(load_config("digits")).to_dict()
    promised = "parameters attention_gmacs total_gmacs kv_cache_bytes sample_peak_bytes train_peak_bytes scales"
    assert set(promised.split()) <= set(result)
    row = (
        "side tokens window keys_per_query attention_gmacs total_gmacs kv_cache_bytes"
        " parts_gmacs micro_batch activation_bytes"
    )
    assert [set(scale) for scale in result["scales"]] == [set(row.split())] * 4
    assert [scale["window"] for scale in result["scales"]] == [0, 0, 0, 3]
