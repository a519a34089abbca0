from pathlib import Path

import golden_models
import pytest
import torch
from golden_models import GoldenCase
from live_bytes import LiveBytes

from mvar_core import Pipeline
from mvar_core.config import SamplingConfig
from mvar_core.errors import ConfigError
from mvar_core.models import footprint
from mvar_core.sampling.guidance import guidance_strengths, guide
from mvar_core.sampling.sampler import SampledTokens, sample_tokens

LABELS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module", params=["all", 1, 2])
def pipeline(request: pytest.FixtureRequest, golden_mvar: GoldenCase) -> Pipeline:
    """The golden MVAR's weights under several prefix settings, so that caches are used, partly used, and not used."""
    return golden_models.pipeline(golden_mvar, request.param)


@pytest.mark.parametrize(("cfg", "more_smooth"), [(0.0, False), (1.5, False), (1.5, True)])
def test_a_sample_does_not_depend_on_its_batch(pipeline: Pipeline, cfg: float, more_smooth: bool) -> None:
    settings = {"cfg": cfg, "top_k": 30, "top_p": 0.96, "seed": 5, "more_smooth": more_smooth}
    together = pipeline.sample(LABELS, batch_size=8, **settings)
    for batch_size in (1, 3):
        again = pipeline.sample(LABELS, batch_size=batch_size, **settings)
        assert torch.equal(again.tokens, together.tokens)
        assert torch.equal(again.images, together.images)
    alone = pipeline.sample([LABELS[5]], indices=[5], **settings)
    assert torch.equal(alone.images[0], together.images[5])


@pytest.mark.parametrize(("cfg", "more_smooth"), [(0.0, False), (1.5, False), (1.5, True)])
def test_micro_batches_change_nothing(pipeline: Pipeline, cfg: float, more_smooth: bool) -> None:
    settings = SamplingConfig(cfg=cfg, top_k=30, top_p=0.96, more_smooth=more_smooth)

    def sample(*sizes: int) -> SampledTokens:
        quantizer = pipeline.tokenizer.quantizer
        return sample_tokens(pipeline.transformer, quantizer, LABELS, range(8), 5, settings, micro_batches=sizes)

    whole = sample(8, 8, 8, 8)
    for sizes in ((1, 1, 1, 1), (2, 2, 2, 2), (8, 4, 3, 1), (1, 3, 8, 5)):
        cut = sample(*sizes)
        assert torch.equal(cut.tokens_NL, whole.tokens_NL)
        assert torch.equal(cut.fhat_NZhw, whole.fhat_NZhw)


def test_micro_batches_in_bfloat16(mvar_directory: Path) -> None:
    """In half precision products of another size may round otherwise: nearly all tokens stay."""
    half = Pipeline.from_pretrained(mvar_directory, device="cpu", dtype="bfloat16")
    labels = [label % 10 for label in range(96)]
    settings = {"cfg": 1.5, "top_k": 30, "top_p": 0.96}
    whole = half.sample(labels, batch_size=96, **settings).tokens
    assert (half.sample(labels, batch_size=5, **settings).tokens == whole).float().mean() >= 0.999


def test_memory_does_not_grow_with_the_batch(pipeline: Pipeline) -> None:
    """Beside f̂ and tokens, a scale-Markov model holds no more for 48 images than for 8; a VAR holds its cache."""
    quantizer, transformer = pipeline.tokenizer.quantizer, pipeline.transformer
    settings = SamplingConfig(cfg=1.5, top_k=30, top_p=0.96)
    peaks = []
    for count in (8, 48):
        with LiveBytes([*transformer.parameters(), *quantizer.parameters()]) as live:
            sample_tokens(transformer, quantizer, [3] * count, range(count), 0, settings, micro_batches=(8, 4, 2, 1))
        peaks.append(live.peak - count * footprint.image_bytes(pipeline.config))
    if transformer.patterns[-1].prefix_tokens:
        assert peaks[1] > 3 * peaks[0]
    else:
        assert peaks[1] < 1.05 * peaks[0]


def test_a_sample_depends_on_seed_index_class_and_settings(pipeline: Pipeline) -> None:
    base = pipeline.sample([3], seed=0, cfg=1.0, top_k=0, top_p=0)
    for changed in (
        pipeline.sample([3], seed=1, cfg=1.0, top_k=0, top_p=0),
        pipeline.sample([3], seed=0, cfg=1.0, top_k=0, top_p=0, indices=[1]),
        pipeline.sample([4], seed=0, cfg=1.0, top_k=0, top_p=0),
        pipeline.sample([3], seed=0, cfg=6.0, top_k=0, top_p=0),
    ):
        assert not torch.equal(base.tokens, changed.tokens)


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine", (0, 0, 2.0, 0.5)])
@pytest.mark.parametrize("scales", [None, (2, 3), (2, 2)])
def test_guidance_schedules_follow_their_definition(
    pipeline: Pipeline, schedule: str | tuple[float, ...], scales: tuple[int, int] | None
) -> None:
    """Greedy tokens of each scale are those of guided logits, computed for both halves in a packed pass."""
    settings = pipeline.sampling_settings(cfg=3.0, top_k=1, top_p=0, cfg_schedule=schedule, cfg_scales=scales)
    tokens = pipeline.sample(LABELS, cfg=3.0, top_k=1, top_p=0, cfg_schedule=schedule, cfg_scales=scales).tokens
    conditional = pipeline.logits(tokens, LABELS)
    unconditional = pipeline.logits(tokens, [pipeline.transformer.null_label] * len(LABELS))
    pyramid = pipeline.config.pyramid
    for strength, span in zip(guidance_strengths(settings, pyramid), pyramid.spans, strict=True):
        guided = guide(conditional[:, span], unconditional[:, span], strength)
        assert torch.equal(guided.argmax(-1), tokens[:, span])


def test_features_are_those_of_the_tokens(pipeline: Pipeline) -> None:
    quantizer = pipeline.tokenizer.quantizer
    sampled = sample_tokens(
        pipeline.transformer, quantizer, LABELS, range(8), 0, SamplingConfig(top_k=20), keep_stages=True
    )
    assert torch.allclose(quantizer.decode(sampled.tokens_NL), sampled.fhat_NZhw, atol=1e-5)
    assert sampled.stages_NSZhw is not None
    assert sampled.stages_NSZhw.shape[1] == pipeline.config.pyramid.num_scales
    assert torch.equal(sampled.stages_NSZhw[:, -1], sampled.fhat_NZhw)


def test_stages_end_in_the_image(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    samples = pipeline.sample(
        [1, 2, 3], top_k=5, stages=True, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    assert samples.stages is not None
    assert samples.stages.shape == (3, 4, 64, 64, 3)
    assert torch.equal(samples.stages[:, -1], samples.images)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_impossible_settings(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="top-k is 65, but the codebook has 64"):
        pipeline.sample([0], top_k=65)
    with pytest.raises(ConfigError, match=r"top_p.*1\.5"):
        pipeline.sample([0], top_p=1.5)
    with pytest.raises(ConfigError, match=r"cfg.*-1"):
        pipeline.sample([0], cfg=-1)
    with pytest.raises(ConfigError, match="class 11 does not exist"):
        pipeline.sample([11])
    with pytest.raises(ConfigError, match="indices .* 2 for 2 labels"):
        pipeline.sample([1, 2], indices=[0])
    assert pipeline.sample([]).images.shape == (0, 64, 64, 3)


def test_bfloat16(mvar_directory: Path) -> None:
    """Half precision changes the odd token, not the sampler."""
    full = Pipeline.from_pretrained(mvar_directory, device="cpu", dtype="float32")
    half = Pipeline.from_pretrained(mvar_directory, device="cpu", dtype="bfloat16")
    assert half.transformer.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    assert half.transformer.head.weight.dtype == torch.float32
    assert half.tokenizer.quantizer.codebook.dtype == torch.float32
    settings = {"cfg": 0.0, "top_k": 1}
    tokens, expected = half.sample(LABELS, **settings).tokens, full.sample(LABELS, **settings).tokens
    assert torch.equal(tokens[:, 0], expected[:, 0])
    logits, exact = half.logits(expected, LABELS), full.logits(expected, LABELS)
    assert logits.dtype == torch.float32
    assert ((logits - exact).abs().max() / exact.abs().max()) < 2e-2


def test_micro_batches_that_are_filled_up_change_nothing(pipeline: Pipeline) -> None:
    settings = SamplingConfig(cfg=1.5, top_k=30, top_p=0.96)
    quantizer, sizes = pipeline.tokenizer.quantizer, (8, 5, 3, 3)
    seen: set[tuple[int, ...]] = set()
    forward = pipeline.transformer.hidden_states

    def watched(scales: range, inputs: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        seen.add((scales.start, *inputs.shape[:2]))
        return forward(scales, inputs, *rest, **options)

    plain = sample_tokens(pipeline.transformer, quantizer, LABELS[:7], range(7), 5, settings, micro_batches=sizes)
    pipeline.transformer.hidden_states = watched  # type: ignore[method-assign]
    filled = sample_tokens(
        pipeline.transformer, quantizer, LABELS[:7], range(7), 5, settings, micro_batches=sizes, static_shapes=True
    )
    assert torch.equal(filled.tokens_NL, plain.tokens_NL)
    if not pipeline.transformer.patterns[-1].prefix_tokens:
        assert len(seen) == pipeline.config.pyramid.num_scales
