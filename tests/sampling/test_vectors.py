"""Sampling by vectors: a sample depends on (seed, index, vector, settings, weights) alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config import SamplingConfig
from mvar_core.config.presets import load_config
from mvar_core.errors import ConfigError
from mvar_core.pipeline import Pipeline
from mvar_core.sampling.published_style import sample_published_style
from mvar_core.sampling.sampler import sample_tokens

SETTINGS = {"cfg": 1.5, "top_k": 30, "top_p": 0.96}


@pytest.fixture(scope="module", params=[1, 2, "all"])
def pipeline(request) -> Pipeline:
    settings = ["conditioning.kind=vector", "conditioning.dim=24", f"attention.scale_prefixes={request.param}"]
    config = load_config("digits", settings).model
    return Pipeline(config, random_tokenizer(config), random_transformer(config))


def vectors(count: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(count, 24, generator=torch.Generator().manual_seed(0)), dim=1)


def test_micro_batches_and_batches_change_nothing(pipeline: Pipeline) -> None:
    given = vectors(5)[[0, 1, 1, 4, 2, 3, 3, 0]]
    settings = SamplingConfig(**SETTINGS)

    def sample(*sizes: int):
        quantizer = pipeline.tokenizer.quantizer
        return sample_tokens(pipeline.transformer, quantizer, given, range(8), 5, settings, micro_batches=sizes)

    whole = sample(8, 8, 8, 8)
    for sizes in ((1, 1, 1, 1), (8, 4, 3, 1), (1, 3, 8, 5)):
        cut = sample(*sizes)
        assert torch.equal(cut.tokens_NL, whole.tokens_NL)
        assert torch.equal(cut.fhat_NZhw, whole.fhat_NZhw)
    together = pipeline.sample(conditions=given, seed=5, **SETTINGS)
    for batch_size in (1, 3):
        assert torch.equal(pipeline.sample(conditions=given, seed=5, batch_size=batch_size, **SETTINGS).images,
                           together.images)  # fmt: skip
    alone = pipeline.sample(conditions=given[6:7], seed=5, indices=[6], **SETTINGS)
    assert torch.equal(alone.images[0], together.images[6])
    assert len({image.numpy().tobytes() for image in together.images}) == 8


def test_the_vector_decides(pipeline: Pipeline) -> None:
    first, second = vectors(2)
    one = pipeline.sample(conditions=first[None], **SETTINGS)
    assert not torch.equal(one.tokens, pipeline.sample(conditions=second[None], **SETTINGS).tokens)
    assert torch.equal(one.tokens, pipeline.sample(conditions=first[None].numpy(), **SETTINGS).tokens)
    assert torch.equal(one.tokens, pipeline.sample(first[None].double(), **SETTINGS).tokens)


def test_guidance_is_between_the_vector_and_none(pipeline: Pipeline) -> None:
    """Greedy tokens are those of guided logits, computed for both halves in a packed pass."""
    given = vectors(3)
    sampled = pipeline.sample(conditions=given, cfg=3.0, top_k=1, top_p=0)
    none = torch.full_like(given, torch.nan)
    conditional, unconditional = pipeline.logits(sampled.tokens, given), pipeline.logits(sampled.tokens, none)
    strengths = torch.tensor([3.0 * pipeline.config.pyramid.ratio(s) for s in pipeline.config.pyramid.scale_of_token])
    guided = torch.lerp(unconditional, conditional, 1 + strengths[:, None])
    found, best = guided.gather(2, sampled.tokens[..., None])[..., 0], guided.max(dim=2).values
    assert torch.allclose(found, best, atol=1e-4)
    assert not torch.allclose(conditional, unconditional)


def test_nothing_is_a_condition_too(pipeline: Pipeline) -> None:
    none = pipeline.transformer.conditioner.null(2)
    sampled = pipeline.sample(conditions=torch.cat([none, vectors(1)]), seed=1, **SETTINGS)
    assert torch.equal(sampled.tokens[:2], pipeline.sample(conditions=none, seed=1, **SETTINGS).tokens)


def test_samples_are_labelled_as_asked(pipeline: Pipeline) -> None:
    assert pipeline.sample(conditions=vectors(2)).labels == (-1, -1)
    assert pipeline.sample(labels=[7, 3], conditions=vectors(2)).labels == (7, 3)


def test_labels_and_other_vectors_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="conditioned on vectors"):
        pipeline.sample(labels=[1, 2])
    with pytest.raises(ConfigError, match="found float32 of shape"):
        pipeline.logits(torch.zeros(1, pipeline.config.pyramid.num_tokens, dtype=torch.long), torch.ones(1, 3))
    with pytest.raises(ConfigError, match="labels .* 2 for 2 vectors"):
        pipeline.sample(labels=[1], conditions=vectors(2))
    with pytest.raises(ConfigError, match="labels, or conditions"):
        pipeline.sample()
    assert len(pipeline.sample(conditions=[]).images) == 0


def test_published_style_sampling_accepts_vectors(pipeline: Pipeline) -> None:
    images = sample_published_style(
        pipeline.transformer,
        pipeline.tokenizer,
        vectors(2),
        SamplingConfig(**SETTINGS),
        torch.Generator().manual_seed(0),
    )
    assert images.shape == (2, 32, 32, 3)


def test_a_saved_model_samples_the_same(pipeline: Pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    sampled = pipeline.sample(conditions=vectors(2), **SETTINGS)
    assert torch.equal(again.sample(conditions=vectors(2), **SETTINGS).images, sampled.images)
    half = Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="bfloat16")
    assert half.sample(conditions=vectors(2), **SETTINGS).images.shape == sampled.images.shape
