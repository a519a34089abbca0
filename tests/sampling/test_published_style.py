import pytest
import torch

from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config import SamplingConfig
from mvar_core.config.presets import load_config
from mvar_core.io.pixels import to_uint8
from mvar_core.sampling.published_style import sample_published_style
from mvar_core.sampling.sampler import sample_tokens


@pytest.mark.parametrize("prefixes", ["all", 1])
def test_greedy_images_are_those_of_the_sampler(prefixes):
    config = load_config("digits", [f"attention.scale_prefixes={prefixes}"])
    transformer, tokenizer = random_transformer(config), random_tokenizer(config)
    labels, settings = [1, 5, 1], SamplingConfig(cfg=1.5, top_k=1, top_p=0)
    images = sample_published_style(transformer, tokenizer, labels, settings, torch.Generator().manual_seed(0))
    sampled = sample_tokens(transformer, tokenizer.quantizer, labels, range(3), 0, settings)
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode_features(tokenizer.quantizer.decode(sampled.tokens_NL)))
    assert images.shape == (3, 32, 32, 3)
    assert (images.int() - expected.int()).abs().max() <= 1


def test_half_precision_and_draws():
    config = load_config("digits-var")
    transformer, tokenizer = random_transformer(config), random_tokenizer(config)
    settings = SamplingConfig(cfg=1.0, top_k=30, top_p=0.9)
    first, again, other = (
        sample_published_style(
            transformer, tokenizer, [3, 4], settings, torch.Generator().manual_seed(seed), dtype=torch.bfloat16
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert transformer.input_projection.weight.dtype == torch.float32
