import math

import pytest
import torch

from mvar_core.config import ModelConfig
from mvar_core.config.presets import load_config
from mvar_core.models.blocks import KeyValueCache
from mvar_core.models.transformer import Transformer
from mvar_core.runtime import generator

SETTINGS = [
    "transformer.depth=2",
    "transformer.embed_dim=32",
    "transformer.num_heads=2",
    "transformer.num_classes=5",
    "transformer.gate_init=1.0",
    "tokenizer.codebook_size=16",
]


def build(*settings: str) -> tuple[Transformer, ModelConfig]:
    config = load_config("digits", [*SETTINGS, *settings]).model
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        model.head.weight.mul_(50)
    return model, config


def random_inputs(config: ModelConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tokens = config.pyramid.num_tokens - config.pyramid.grids[0].tokens
    inputs = torch.randn(batch, tokens, config.tokenizer.latent_channels, generator=random)
    return torch.arange(batch) % 5, inputs


ATTENTION = [
    ("attention.scale_prefixes=all", "attention.windows=[0,0,0,0]"),
    ("attention.scale_prefixes=1", "attention.windows=[0,0,3,3]"),
    ("attention.scale_prefixes=2", "attention.windows=[0,0,0,5]"),
    ("attention.scale_prefixes=3", "attention.windows=[0,0,3,0]"),
]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", [(), ("transformer.shared_adaln=true",), ("transformer.l2_attention=false",)])
def test_scale_by_scale_equals_packed(attention: tuple[str, ...], variant: tuple[str, ...]) -> None:
    model, config = build(*attention, *variant)
    labels, inputs = random_inputs(config)
    with torch.no_grad():
        packed = model.eval()(labels, inputs)
        conditioning, cache = model.condition(labels), KeyValueCache(len(labels))
        offset = config.pyramid.grids[0].tokens
        for scale, span in enumerate(config.pyramid.spans):
            part = inputs[:, span.start - offset : span.stop - offset] if scale else inputs[:, :0]
            stream = model.hidden_states(range(scale, scale + 1), part, conditioning, cache=cache.rows())
            alone = model.head_logits(stream, conditioning)
            model.drop_unseen(cache, scale)
            assert torch.allclose(alone, packed[:, span], atol=1e-5)
            later = model.first_visible[scale + 1] if scale + 1 < config.pyramid.num_scales else None
            if later is not None:
                assert cache.scales == set(range(later, scale + 1))
    if config.attention.scale_prefixes == 1:
        assert cache.num_bytes == 0


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_token_sees_what_the_configuration_says(attention: tuple[str, ...]) -> None:
    """Changing one input changes the logits of exactly the tokens that see it, in a model of one block."""
    model, config = build(*attention, "transformer.depth=1")
    labels, inputs = random_inputs(config, batch=1)
    offset = config.pyramid.grids[0].tokens
    scales = config.pyramid.scale_of_token
    for changed in (offset, offset + 5, offset + 10, config.pyramid.num_tokens - 1):
        other = inputs.clone()
        other[:, changed - offset] += 1
        with torch.no_grad():
            differs = (model.eval()(labels, inputs) != model(labels, other)).any(-1)[0]
        for token in range(config.pyramid.num_tokens):
            scale = scales[token]
            pattern, span = config.patterns[scale], config.pyramid.spans[scale]
            first_key = span.start - pattern.prefix_tokens
            keys = [first_key + key for key in pattern.visible_keys(token - span.start)]
            assert differs[token].item() == (changed in keys), (token, changed)


def test_gradients_reach_every_parameter() -> None:
    for variant in ((), ("transformer.shared_adaln=true",)):
        model, config = build(*variant)
        labels, inputs = random_inputs(config)
        model(labels, inputs).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_dropout_follows_the_generator() -> None:
    model, config = build("transformer.class_dropout=0.5", "transformer.drop_path=0.5")
    labels, inputs = random_inputs(config, batch=16)
    with torch.no_grad():
        exact = model.train()(labels, inputs)
        first = model(labels, inputs, generator=generator(0))
        assert torch.equal(first, model(labels, inputs, generator=generator(0)))
        assert not torch.equal(first, model(labels, inputs, generator=generator(1)))
        assert torch.equal(exact, model(labels, inputs))
        assert torch.equal(exact, model.eval()(labels, inputs, generator=generator(0)))


def test_a_kept_branch_makes_up_for_the_dropped_ones() -> None:
    """Without the MLPs, rows of the last block are either dropped or doubled at a rate of one half."""
    model, config = build("transformer.drop_path=0.5")
    labels, inputs = random_inputs(config, batch=1)
    labels, inputs = labels.repeat(16), inputs.repeat(16, 1, 1)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.down.weight.zero_()
            block.mlp.down.bias.zero_()
        scales, conditioning = range(config.pyramid.num_scales), model.condition(labels)
        expected = model.eval().hidden_states(scales, inputs, conditioning)[0]
        rows = model.train().hidden_states(scales, inputs, conditioning, generator=generator(0))
    other = next(row for row in rows if not torch.equal(row, rows[0]))
    assert torch.allclose((rows[0] + other) / 2, expected, atol=1e-5)


def test_later_blocks_are_dropped_more_often() -> None:
    model, _ = build("transformer.depth=3", "transformer.drop_path=0.5")
    assert [block.drop_path for block in model.blocks] == [0.0, 0.25, 0.5]


def test_scales_of_heads_end_at_a_hundred() -> None:
    model, config = build()
    labels, inputs = random_inputs(config)

    def logits(scale: float) -> torch.Tensor:
        with torch.no_grad():
            for block in model.blocks:
                block.attention.log_head_scale.fill_(math.log(scale))
            return model.eval()(labels, inputs)

    assert torch.equal(logits(1000), logits(100))
    assert not torch.equal(logits(100), logits(50))


def test_attention_without_normalised_heads_has_the_published_scale() -> None:
    model, config = build("transformer.l2_attention=false")
    scales: set[float] = set()
    with torch.no_grad():
        model.eval()(*random_inputs(config), probe=lambda *found: scales.add(found[-1]))
    assert scales == {0.25 / math.sqrt(16)}


def test_what_a_scale_depends_on_is_followed_down() -> None:
    chain, _ = build("attention.scale_prefixes=2", "attention.windows=[0,0,0,0]")
    alone, _ = build("attention.scale_prefixes=1", "attention.windows=[0,0,0,0]")
    assert [chain.earliest_needed(scale) for scale in range(4)] == [0, 0, 0, 0]
    assert [alone.earliest_needed(scale) for scale in range(4)] == [0, 1, 2, 3]


def test_dropped_labels_become_the_null_label() -> None:
    model, config = build("transformer.class_dropout=0.999999")
    labels, inputs = random_inputs(config)
    with torch.no_grad():
        dropped = model.train()(labels, inputs, generator=generator(0))
        assert torch.equal(dropped, model(torch.full_like(labels, model.null_label), inputs))


def test_weight_decay_leaves_vectors_and_tables_out() -> None:
    model, _ = build("transformer.shared_adaln=true")
    exempt = model.no_decay_names()
    decayed = {name for name, _ in model.named_parameters()} - exempt
    assert all(name.endswith(".weight") for name in decayed)
    assert not any("embedding" in name for name in decayed)
    assert {
        "start_position",
        "position_embedding",
        "blocks.0.modulation_offset",
        "blocks.1.attention.log_head_scale",
    } <= exempt


def test_initialisation_as_published() -> None:
    config = load_config(
        "digits", ["transformer.embed_dim=384", "transformer.num_heads=6", "transformer.gate_init=1e-3"]
    )
    model = Transformer(config.model)
    std = (1 / (3 * 384)) ** 0.5
    depth = config.transformer.depth if config.transformer else 0
    block = model.blocks[0]
    expected = {
        block.attention.qkv.weight: std,
        block.mlp.up.weight: std,
        block.attention.projection.weight: std / (2 * depth) ** 0.5,
        block.mlp.down.weight: std / (2 * depth) ** 0.5,
        block.modulation.weight[: 2 * 384]: std * 1e-3,
        block.modulation.weight[2 * 384 :]: std * 0.5,
        model.head.weight: std * 0.02,
        model.head_modulation.weight: std * 0.5,
        model.class_embedding.weight: std,
    }
    for weight, value in expected.items():
        assert weight.std().item() == pytest.approx(value, rel=0.1)
    assert block.modulation.bias.abs().max() == 0


def test_autocast_keeps_logits_in_float32() -> None:
    model, config = build()
    labels, inputs = random_inputs(config)
    with torch.no_grad():
        exact = model(labels, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(labels, inputs)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert (half - exact).abs().max() / exact.abs().max() < 3e-2
