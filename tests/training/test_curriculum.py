from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mvar_core.config import TrainConfig
from mvar_core.training.curriculum import build_curriculum, per_scale_means, token_losses


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
        loss = token_losses(logits, tokens)[:, span].sum() / tokens.numel()
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
    losses = per_scale_means(token_losses(logits, tokens), pyramid)
    torch.testing.assert_close(losses, torch.tensor([math.log(16), 0.0, math.log(16)]))
    smoothed = token_losses(logits, tokens, label_smoothing=0.16)[0, 1].item()
    assert smoothed == pytest.approx(0.16 * 15 / 16 * 100)  # smoothing spreads over all 16 codes
