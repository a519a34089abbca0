"""Likelihoods: closed forms on constructed models, and brute force over `Pipeline.logits`."""

import copy
import math

import golden_models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import GoldenCase
from live_bytes import LiveBytes

from mvar_core import Pipeline
from mvar_core.analysis.likelihood import LikelihoodReport, log_likelihoods, measure_likelihood
from mvar_core.config import ModelConfig
from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE

CLASSES = 10


@pytest.fixture(scope="module", params=["all", 1])
def pipeline(request: pytest.FixtureRequest, golden_mvar: GoldenCase) -> Pipeline:
    """The golden weights as a VAR and as an MVAR."""
    return golden_models.pipeline(golden_mvar, request.param)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (5, 30), generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([3, 1, 4, 1, 9])


def measured(pipeline: Pipeline, tokens: torch.Tensor, labels: torch.Tensor | None, **options) -> LikelihoodReport:
    batch = options.pop("batch", 5)
    batches = [
        (tokens[start : start + batch], None if labels is None else labels[start : start + batch])
        for start in range(0, len(tokens), batch)
    ]
    return measure_likelihood(pipeline.transformer, pipeline.tokenizer.quantizer, batches, pipeline.config, **options)


def brute_force(pipeline: Pipeline, tokens: torch.Tensor, label: int) -> torch.Tensor:
    """-ln p of every token under one class, by PyTorch's own cross-entropy."""
    logits = pipeline.logits(tokens, [label] * len(tokens)).double()
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def test_equal_to_brute_force(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    report = measured(pipeline, tokens, LABELS, classes=range(CLASSES))
    each = torch.stack([brute_force(pipeline, tokens, label) for label in range(CLASSES)], dim=1)
    nothing = brute_force(pipeline, tokens, pipeline.transformer.null_label)
    own = each[torch.arange(5), LABELS]
    spans = pipeline.config.pyramid.spans
    close = {"rel": 1e-5}
    assert report.num_samples == 5
    assert report.bits_per_token == pytest.approx(own.mean().item() / math.log(2), **close)
    assert report.bits_per_image == pytest.approx(own.sum(1).mean().item() / math.log(2), **close)
    assert report.bits_per_image_error == pytest.approx(own.sum(1).std().item() / math.log(2) / math.sqrt(5), rel=1e-4)
    assert report.bits_per_pixel == pytest.approx(report.bits_per_image / 64**2)
    assert report.bits_per_token_by_scale == pytest.approx(
        [own[:, span].mean().item() / math.log(2) for span in spans], **close
    )
    assert report.bits_per_token_no_class == pytest.approx(nothing.mean().item() / math.log(2), **close)
    assert report.class_information == pytest.approx(
        (nothing - own).sum(1).mean().item() / math.log(2), abs=1e-4 * report.bits_per_image
    )
    assert report.nll_by_class == pytest.approx(
        {str(label): own[label == LABELS].sum(1).mean().item() for label in (1, 3, 4, 9)}, **close
    )
    assert report.samples_by_class == {"1": 2, "3": 1, "4": 1, "9": 1}
    by_scale = []
    for span in spans:
        by_scale.append((each[:, :, : span.stop].sum(-1).argmin(1) == LABELS).double().mean().item())
    assert report.zero_shot_accuracy_by_scale == pytest.approx(by_scale)
    assert report.zero_shot_accuracy == pytest.approx(by_scale[-1])
    ranks = each.sum(-1).argsort(1).argsort(1)[torch.arange(5), LABELS]
    assert report.zero_shot_top5 == pytest.approx((ranks < 5).double().mean().item())


def test_the_likeliest_class_is_chosen(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    scores = pipeline.log_likelihoods(tokens, torch.arange(CLASSES).expand(5, -1)).sum(-1)
    assert scores.shape == (5, CLASSES)
    best = scores.argmax(1)
    assert measured(pipeline, tokens, best, classes=range(CLASSES)).zero_shot_accuracy == 1
    assert measured(pipeline, tokens, scores.argmin(1), classes=range(CLASSES)).zero_shot_accuracy == 0
    assert measured(pipeline, tokens, scores.argmin(1), classes=range(CLASSES)).zero_shot_top5 == 0
    two = sorted({int(best[0]), int(scores[0].argmin())})
    assert measured(pipeline, tokens[:1], best[:1], classes=two).zero_shot_accuracy == 1
    assert measured(pipeline, tokens[:1], best[:1], classes=two[::-1]).zero_shot_accuracy == 1


def test_the_pipeline_scores_one_condition_or_several(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    one = pipeline.log_likelihoods(tokens, LABELS)
    assert one.shape == (5, 4)
    assert one.dtype == torch.float64
    for row in range(5):
        nats = brute_force(pipeline, tokens[row : row + 1], int(LABELS[row]))[0]
        expected = [-nats[span].sum().item() for span in pipeline.config.pyramid.spans]
        assert one[row].tolist() == pytest.approx(expected, rel=1e-5)
    several = pipeline.log_likelihoods(tokens, torch.stack([LABELS, LABELS + 1], dim=1))
    assert torch.allclose(several[:, 0], one, rtol=1e-9)
    assert not torch.allclose(several[:, 1], one)
    assert pipeline.log_likelihoods(tokens[:0], torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 4)
    with pytest.raises(ConfigError, match="tokens of 5 images but conditions of 4"):
        pipeline.log_likelihoods(tokens, LABELS[:4])
    with pytest.raises(ConfigError, match="class 11 does not exist"):
        pipeline.log_likelihoods(tokens, [11] * 5)
    with pytest.raises(DataError, match=r"\(5, 20\)"):
        pipeline.log_likelihoods(tokens[:, :20], LABELS)


def test_order_batches_and_micro_batches_change_nothing(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    whole = measured(pipeline, tokens, LABELS, classes=range(CLASSES)).to_dict()
    order = torch.tensor([4, 2, 0, 3, 1])
    for other in (
        measured(pipeline, tokens, LABELS, classes=range(CLASSES), batch=2, pairs_at_once=3),
        measured(pipeline, tokens, LABELS, classes=range(CLASSES), pairs_at_once=1),
        measured(pipeline, tokens[order], LABELS[order], classes=range(CLASSES)),
    ):
        for name, value in other.to_dict().items():
            if isinstance(value, dict):
                assert value == pytest.approx(whole[name], rel=1e-12)
            else:
                assert np.allclose(np.asarray(value, float).ravel(), np.asarray(whole[name], float).ravel(), rtol=1e-12)


def test_memory_does_not_grow_with_the_classes(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    quantizer, transformer = pipeline.tokenizer.quantizer, pipeline.transformer
    peaks = []
    for candidates in (2, 60):
        conditions = (torch.arange(candidates) % 10).expand(5, -1)
        with LiveBytes([*transformer.parameters(), *quantizer.parameters()]) as live:
            log_likelihoods(transformer, quantizer, tokens, conditions, pairs_at_once=4)
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] < 58 * 5 * (8 + 4 * 8 + 8) + 10_000, "labels and scores alone"


def test_without_competing_classes_or_labels(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    whole = measured(pipeline, tokens, LABELS, classes=range(CLASSES))
    plain = measured(pipeline, tokens, LABELS)
    assert plain.bits_per_token == pytest.approx(whole.bits_per_token)
    assert plain.nll_by_class == pytest.approx(whole.nll_by_class)
    assert (plain.zero_shot_accuracy, plain.classes_scored) == (None, 0)
    nothing = measured(pipeline, tokens, None)
    assert nothing.bits_per_token == pytest.approx(whole.bits_per_token_no_class)
    assert (nothing.nll_by_class, nothing.class_information, nothing.zero_shot_accuracy) == (None, None, None)


def constructed(codebook: int = 16) -> Pipeline:
    """A model whose head ignores everything but its bias."""
    config = ModelConfig.model_validate(
        {
            "image_size": (8, 16),
            "patch_sizes": [1, (2, 3), (4, 8)],
            "tokenizer": {
                "codebook_size": codebook, "latent_channels": 4, "base_channels": 8, "channel_multipliers": [1, 2],
                "encoder_blocks": 1, "decoder_blocks": 1, "middle_blocks": 1, "attention": False, "norm_groups": 4,
            },
            "transformer": {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 6},
            "attention": {"scale_prefixes": 1},
            "class_names": ["a", "b", "c", "d", "e", "f"],
        }
    )  # fmt: skip
    transformer = Transformer(config)
    torch.nn.init.zeros_(transformer.head.weight)
    torch.nn.init.zeros_(transformer.head.bias)
    return Pipeline(config, VQVAE(config.tokenizer, config.pyramid), transformer)


def test_uniform_logits_take_the_codebooks_bits() -> None:
    pipeline = constructed()
    tokens = torch.randint(0, 16, (3, 39), generator=torch.Generator().manual_seed(0))
    report = measured(pipeline, tokens, torch.tensor([0, 5, 5]), classes=range(6))
    assert report.bits_per_token == pytest.approx(4, abs=1e-12)
    assert report.uniform_bits_per_token == 4
    assert report.bits_per_token_by_scale == pytest.approx([4, 4, 4], abs=1e-12)
    assert report.bits_per_image == pytest.approx(4 * 39)
    assert report.bits_per_pixel == pytest.approx(4 * 39 / 128)
    assert report.nll_by_class == pytest.approx({"a": 39 * math.log(16), "f": 39 * math.log(16)})
    assert report.class_information == pytest.approx(0, abs=1e-9)
    assert report.zero_shot_accuracy == pytest.approx(1 / 3), "of equal classes the first is chosen"


def test_classes_of_one_name_are_kept_apart() -> None:
    pipeline = constructed()
    pipeline.config = pipeline.config.model_copy(update={"class_names": ("a", "b", "a", "d", "e", "f")})
    tokens = torch.randint(0, 16, (3, 39), generator=torch.Generator().manual_seed(0))
    assert measured(pipeline, tokens, torch.tensor([0, 2, 2])).samples_by_class == {"a": 1, "a (#2)": 2}


def test_a_certain_model_needs_no_bits_where_it_is_right_and_many_where_it_is_wrong() -> None:
    pipeline = constructed()
    pipeline.transformer.head.bias.data[7] = 40.0
    sure = torch.full((2, 39), 7)
    assert measured(pipeline, sure, torch.tensor([1, 2])).bits_per_token == pytest.approx(0, abs=1e-12)
    wrong = sure.clone()
    wrong[0, 0] = 3
    report = measured(pipeline, wrong, torch.tensor([1, 2]))
    assert report.bits_per_token_by_scale == pytest.approx([20 / math.log(2), 0, 0], rel=1e-6, abs=1e-12)
    assert report.nll_by_class == pytest.approx({"b": 40, "c": 0}, abs=1e-9)


def test_what_cannot_be_scored(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    with pytest.raises(DataError, match="no images"):
        measured(pipeline, tokens[:0], None)
    with pytest.raises(DataError, match="class 10; the model has classes 0 … 9"):
        measured(pipeline, tokens, LABELS + 1)
    with pytest.raises(DataError, match="class 3, which is not among"):
        measured(pipeline, tokens, LABELS, classes=[1, 4, 9])
    mixed = [(tokens, LABELS), (tokens, None)]
    with pytest.raises(DataError, match="some do not"):
        measure_likelihood(pipeline.transformer, pipeline.tokenizer.quantizer, mixed, pipeline.config)


def test_weights_that_are_not_finite_and_wrong_labels_are_refused(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    for labels in (LABELS[:3], LABELS.double(), LABELS[:, None], LABELS + CLASSES):
        with pytest.raises(DataError):
            measured(pipeline, tokens, labels, classes=range(CLASSES))
    with pytest.raises(ConfigError, match="class"):
        measured(pipeline, tokens, LABELS, classes=[*range(CLASSES), CLASSES])
    broken = copy.deepcopy(pipeline)
    broken.transformer.head.weight.data[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        broken.log_likelihoods(tokens, LABELS)
