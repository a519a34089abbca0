from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mvar_core.config.presets import load_config
from mvar_core.config.training import TrainConfig
from mvar_core.errors import ConfigError
from mvar_core.pyramid import PUBLISHED_PYRAMIDS, ScalePyramid
from mvar_core.training.metrics import read_metrics
from mvar_core.training.transformer import (
    Curriculum,
    build_curriculum,
    cross_entropy,
    per_scale_means,
    scales_alone,
    train_transformer,
)

ATTENTION = [
    ("attention.scale_prefixes=1", "attention.windows=[0,0,3]"),
    ("attention.scale_prefixes=2", "attention.windows=[0,0,3]"),
    ("attention.scale_prefixes=3", "attention.windows=[0,0,0]"),
    ("attention.scale_prefixes=all", "attention.windows=[0,0,0]"),
    ("attention.scale_prefixes=all", "attention.windows=[0,0,3]"),
]


def batch(config, quantizer, make_tokens):
    tokens, labels = make_tokens(config).batch(np.arange(5))
    return tokens, labels, quantizer.teacher_forcing_inputs(tokens).detach()


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)


def test_joint_pass_equals_the_sum_of_passes_that_see_one_scale_each(make_config, make_models, make_tokens):
    config = make_config("transformer.gate_init=1.0")
    transformer, tokenizer = make_models(config)
    transformer.eval()
    tokens, labels, inputs = batch(config, tokenizer.quantizer, make_tokens)
    joint = build_curriculum(TrainConfig(), config.pyramid).losses(
        transformer, labels, tokens, inputs, step=0, attention="reference", generator=None
    )
    expected = gradients(joint.loss, transformer)
    total = [torch.zeros_like(parameter) for parameter in transformer.parameters()]
    first = config.pyramid.spans[0].stop
    for span in config.pyramid.spans:
        # A scale-Markov model may not look at other scales: theirs are replaced by noise.
        own = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(span.start))
        if span.start >= first:
            own[:, span.start - first : span.stop - first] = inputs[:, span.start - first : span.stop - first]
        logits = transformer(labels, own, attention="reference")
        loss = cross_entropy(logits, tokens)[:, span].sum() / tokens.numel()
        for sum_, gradient in zip(total, gradients(loss, transformer), strict=True):
            sum_ += 0 if gradient is None else gradient
    for sum_, gradient in zip(total, expected, strict=True):
        torch.testing.assert_close(sum_, gradient, rtol=1e-5, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3


def test_every_token_weighs_the_same(make_config, make_models, make_tokens):
    config = make_config()
    transformer, tokenizer = make_models(config)
    tokens, labels, inputs = batch(config, tokenizer.quantizer, make_tokens)
    losses = build_curriculum(TrainConfig(), config.pyramid).losses(
        transformer, labels, tokens, inputs, step=0, attention="reference", generator=None
    )
    sizes = torch.tensor([grid.tokens for grid in config.pyramid]).float()
    assert losses.loss.item() == pytest.approx(float((losses.scale_losses * sizes).sum() / sizes.sum()), rel=1e-5)
    assert not losses.scale_losses.requires_grad


def test_losses_and_accuracies_at_known_logits(make_config):
    pyramid = make_config().pyramid
    tokens = torch.zeros(2, pyramid.num_tokens, dtype=torch.long)
    logits = torch.zeros(2, pyramid.num_tokens, 16)
    logits[:, 1:5, 0] = 100.0
    losses = per_scale_means(cross_entropy(logits, tokens), pyramid)
    torch.testing.assert_close(losses, torch.tensor([math.log(16), 0.0, math.log(16)]))
    smoothed = cross_entropy(logits, tokens, label_smoothing=0.16)[0, 1].item()
    assert smoothed == pytest.approx(0.16 * 15 / 16 * 100)  # smoothing spreads over all 16 codes


def test_interleaved_follows_the_published_schedule_over_100_steps():
    """Of every ten steps eight train scales 1 … 8 together, then one scale 9 and one scale 10 (counted from 1)."""
    config = load_config("mvar-d16-256", ["train.curriculum=interleaved"])
    curriculum = build_curriculum(config.train, config.pyramid, config.patterns)
    published = ([(1, 8)] * 8 + [(9, 9), (10, 10)]) * 10
    found = [(scales.start + 1, scales.stop) for scales in map(curriculum.trained_scales, range(100))]
    assert found == published
    assert curriculum.tokens_per_step() == pytest.approx((8 * 255 + 169 + 256) / 10)


@pytest.mark.parametrize(
    ("ratio_k", "alone", "expected"),
    [
        (1, 2, [(1, 2), (3, 3), (4, 4)] * 2),
        (2, 1, [(1, 3), (1, 3), (4, 4)] * 2),
        (3, 3, [(1, 1), (1, 1), (1, 1), (2, 2), (3, 3), (4, 4)]),
    ],
)
def test_interleaved_on_other_pyramids(ratio_k, alone, expected):
    curriculum = Curriculum(ScalePyramid.from_patch_sizes([1, 2, 4, 8]), ratio_k=ratio_k, alone=alone)
    assert [(s.start + 1, s.stop) for s in map(curriculum.trained_scales, range(6))] == expected


def test_the_scales_that_train_alone_are_the_windowed_ones_at_the_end():
    def alone(windows):
        return scales_alone(ScalePyramid.from_patch_sizes([1, 2, 4, 8]).attention_patterns(1, windows))

    assert [alone(w) for w in ([0, 0, 3, 3], [0, 0, 0, 3], [0, 3, 3, 3], [0, 0, 0, 0], [0, 0, 3, 0])] == [2, 1, 2, 2, 2]
    assert scales_alone(ScalePyramid.from_patch_sizes(PUBLISHED_PYRAMIDS[512]).attention_patterns(1, [7] * 10)) == 2


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5)])
def test_joint_gradients_equal_the_sum_of_those_of_the_interleaved_steps(
    make_config, make_models, make_tokens, attention, weights
):
    """Also where the scale that trains alone sees earlier ones, which are then computed in its pass."""
    config = make_config("transformer.gate_init=1.0", *attention)
    transformer, tokenizer = make_models(config)
    transformer.eval()
    tokens, labels, inputs = batch(config, tokenizer.quantizer, make_tokens)

    def losses(curriculum, step):
        return curriculum.losses(transformer, labels, tokens, inputs, step=step, attention="reference", generator=None)

    joint = losses(build_curriculum(TrainConfig(scale_weights=weights), config.pyramid, config.patterns), 0)
    settings = TrainConfig(curriculum="interleaved", ratio_k=1, scales_alone=2, scale_weights=weights)
    interleaved = build_curriculum(settings, config.pyramid, config.patterns)
    parts = [losses(interleaved, step) for step in range(interleaved.period)]
    assert len(parts) == 3
    expected = gradients(joint.loss, transformer)
    found = zip(*(gradients(part.loss, transformer) for part in parts), strict=True)
    for part, whole in zip(found, expected, strict=True):
        assert all(gradient is not None for gradient in part)  # ranks that share gradients rely on it
        torch.testing.assert_close(sum(part), whole, rtol=1e-5, atol=1e-6)
    assert sum(part.loss for part in parts).item() == pytest.approx(joint.loss.item(), rel=1e-6)
    for scale, part in enumerate(parts):
        trained = [not math.isnan(value) for value in part.scale_losses]
        assert trained == [index == scale for index in range(3)]
        assert [not math.isnan(value) for value in part.scale_accuracies] == trained
        torch.testing.assert_close(part.scale_losses[scale], joint.scale_losses[scale])


def test_a_step_on_one_scale_processes_only_what_that_scale_needs(make_config, make_models, make_tokens):
    processed = {}
    for prefixes in (1, 2, "all"):
        config = make_config(f"attention.scale_prefixes={prefixes}")
        transformer, tokenizer = make_models(config)
        _, labels, inputs = batch(config, tokenizer.quantizer, make_tokens)
        sizes = []
        transformer.blocks[0].register_forward_hook(lambda module, args, output, into=sizes: into.append(output.shape))
        logits = transformer(labels, inputs, scales=range(2, 3), attention="reference")
        assert logits.shape[1] == 16
        processed[prefixes] = sizes[0][1]
    assert processed == {1: 16, 2: 21, "all": 21}


def test_scale_weights_are_relative(make_config, make_models, make_tokens):
    config = make_config()
    transformer, tokenizer = make_models(config)
    tokens, labels, inputs = batch(config, tokenizer.quantizer, make_tokens)
    found = {}
    for weights in ((), (3.0, 3.0, 3.0), (0.0, 1.0, 0.0)):
        found[weights] = build_curriculum(TrainConfig(scale_weights=weights), config.pyramid).losses(
            transformer, labels, tokens, inputs, step=0, attention="reference", generator=None
        )
    assert found[3.0, 3.0, 3.0].loss.item() == pytest.approx(found[()].loss.item(), rel=1e-6)
    assert found[0.0, 1.0, 0.0].loss.item() == pytest.approx(found[()].scale_losses[1].item(), rel=1e-6)


@pytest.mark.parametrize(
    "setting", ["train.scale_weights=[1,2]", "train.scale_weights=[0,0,0]", "train.scale_weights=[1,-1,1]",
                "train.scales_alone=3", "train.ratio_k=0"]
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make_config, setting):
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        make_config(setting)


def test_an_interleaved_run_logs_every_scale_and_validates_all_of_them(make_config, make_models, make_tokens, tmp_path):
    config = make_config(
        "train.curriculum=interleaved", "train.ratio_k=2", "train.steps=6", "train.log_every=1",
        "train.checkpoint_every=6",
    )  # fmt: skip
    transformer, tokenizer = make_models(config)
    result = train_transformer(
        transformer, tokenizer, make_tokens(config), config, tmp_path, validation=make_tokens(config, rows=5, seed=1),
    )  # fmt: skip
    lines = read_metrics(tmp_path / "metrics.jsonl")
    trained = [[loss is not None for loss in line["scale_loss"]] for line in lines if "scale_loss" in line]
    assert trained == [[True, True, False], [True, True, False], [False, False, True]] * 2
    assert all(loss is not None for loss in lines[-1]["val_scale_loss"])
    assert math.isfinite(result.val_loss)
