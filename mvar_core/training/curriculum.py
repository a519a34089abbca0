"""What one training step trains: which scales, with which weights.

The joint curriculum trains all scales in one packed pass. The interleaved one is what MVAR was published with: most
steps train the first scales together, the others one of the last scales alone. Given the tokens the scales' losses
simply add up, so both follow the same gradient on average; the joint one follows it in every step.
"""

# Shape suffixes: B batch, L tokens of all scales, l tokens of the trained scales, Z latent channels,
# V codebook entries, S scales, X values of a vector that the model is conditioned on.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.config.training import TrainConfig
from mvar_core.models.transformer import Transformer
from mvar_core.pyramid import AttentionPattern, ScalePyramid
from mvar_core.runtime import RowDraws

CHUNK_ELEMENTS = 1 << 21
"""Logits that are turned into gradients at a time."""
WORTHWHILE_ELEMENTS = 1 << 22
"""Logits below which the three buffers of the usual cross-entropy do not matter."""


class ScaleLosses(NamedTuple):
    """Loss of one batch, with the mean cross-entropy and accuracy (S,) of each scale; nan for scales left out."""

    loss: Tensor
    scale_losses: Tensor
    scale_accuracies: Tensor


def per_scale_means(
    values_Bl: Float[Tensor, "B l"], pyramid: ScalePyramid, scales: range | None = None
) -> Float[Tensor, " S"]:
    """Mean over images and tokens of each scale, from one value per token of `scales` (None: all); nan for others."""
    scales = range(pyramid.num_scales) if scales is None else scales
    offset = pyramid.spans[scales.start].start
    means = values_Bl.new_full((pyramid.num_scales,), math.nan)
    for scale in scales:
        span = pyramid.spans[scale]
        means[scale] = values_Bl[:, span.start - offset : span.stop - offset].mean()
    return means


class Curriculum:
    """Chooses what a step trains; in whichever step a token is trained, its loss weighs 1/L, times its scale's weight.

    With `alone` = n > 0, of every `ratio_k` + n steps `ratio_k` train the first scales together, and n one of the last
    n each. Published are ratio_k = 8 and n = 2 on ten scales: eight steps train scales 1 … 8, the ninth scale 9, the
    tenth scale 10, and so on. Where a scale sees earlier ones (more than one scale prefix, or VAR), those are computed
    in its step too, without a loss of their own but with gradient, so that the steps' gradients always add up to the
    joint one. `alone` is at most all scales but one; 0 trains all of them jointly.

    `label_smoothing` is the probability spread evenly over the codebook; `scale_weights` are relative weights of a
    token's loss, one per scale, scaled so that the mean over an image's tokens is 1, or empty for all alike.
    """

    def __init__(
        self,
        pyramid: ScalePyramid,
        label_smoothing: float = 0.0,
        scale_weights: Sequence[float] = (),
        alone: int = 0,
        ratio_k: int = 1,
    ):
        self.pyramid, self.label_smoothing, self.ratio_k = pyramid, label_smoothing, ratio_k
        self.together = max(1, pyramid.num_scales - alone)
        self.period = ratio_k + pyramid.num_scales - self.together
        self.weights_L: Tensor | None = None
        if scale_weights:
            weights_L = torch.tensor([scale_weights[scale] for scale in pyramid.scale_of_token], dtype=torch.float64)
            self.weights_L = (weights_L / weights_L.mean()).float()

    def trained_scales(self, step: int | None) -> range:
        """The consecutive scales that a step trains, by its place in the period; all of them for None."""
        if step is None:
            return range(self.pyramid.num_scales)
        beyond = step % self.period - self.ratio_k
        return range(self.together) if beyond < 0 else range(self.together + beyond, self.together + beyond + 1)

    def tokens_per_step(self) -> float:
        """Tokens of an image that a step trains, on average over a period."""
        grids = self.pyramid.grids
        trained = (grids[scale].tokens for step in range(self.period) for scale in self.trained_scales(step))
        return sum(trained) / self.period

    def losses(
        self,
        transformer: Transformer,
        conditions: Int[Tensor, " B"] | Float[Tensor, "B X"],
        tokens_BL: Int[Tensor, "B L"],
        inputs_BLZ: Float[Tensor, "B l Z"],
        *,
        step: int | None,
        attention: str,
        generator: torch.Generator | RowDraws | None,
    ) -> ScaleLosses:
        """Losses of one packed pass over the scales that the step trains, or all for step None.

        A pure function of the step, the batch and the generator. The loss is the mean over images of the sum of the
        tokens' losses, each over L: that of a step on some scales is their share of the joint one.
        """
        scales = self.trained_scales(step)
        span = slice(self.pyramid.spans[scales.start].start, self.pyramid.spans[scales.stop - 1].stop)
        chosen = None if len(scales) == self.pyramid.num_scales else scales
        logits_BlV = transformer(conditions, inputs_BLZ, scales=chosen, attention=attention, generator=generator)
        tokens_Bl = tokens_BL[:, span]
        with torch.no_grad():
            hits_Bl = (logits_BlV.argmax(dim=-1) == tokens_Bl).float()
        losses_Bl = cross_entropy(logits_BlV, tokens_Bl, self.label_smoothing)
        del logits_BlV
        by_scale = per_scale_means(losses_Bl.detach(), self.pyramid, scales)
        if self.weights_L is not None:
            losses_Bl = losses_Bl * self.weights_L[span].to(losses_Bl.device)
        share = losses_Bl.shape[1] / self.pyramid.num_tokens
        loss = losses_Bl.mean() if share == 1 else losses_Bl.mean() * share
        return ScaleLosses(loss, by_scale, per_scale_means(hits_Bl, self.pyramid, scales))


def scales_alone(patterns: Sequence[AttentionPattern]) -> int:
    """How many of the last scales the interleaved curriculum trains alone by default.

    Published are the last two, which have windows. So: the windowed scales at the end, two at most; where there are
    none, two.
    """
    windowed = 0
    while windowed < min(2, len(patterns)) and patterns[-1 - windowed].is_windowed:
        windowed += 1
    return windowed or 2


def build_curriculum(
    config: TrainConfig, pyramid: ScalePyramid, patterns: Sequence[AttentionPattern] = ()
) -> Curriculum:
    """The curriculum that the configuration names; `patterns` of attention say which scales are windowed."""
    if config.curriculum == "interleaved":
        alone = config.scales_alone or scales_alone(patterns)
        return Curriculum(pyramid, config.label_smoothing, config.scale_weights, alone, config.ratio_k)
    return Curriculum(pyramid, config.label_smoothing, config.scale_weights)


def cross_entropy(
    logits_NV: Float[Tensor, "*N V"], targets_N: Int[Tensor, " *N"], label_smoothing: float = 0.0
) -> Float[Tensor, " *N"]:
    """Cross-entropy of each token, in float32; `label_smoothing` is the probability spread evenly over the codebook.

    Of many logits that need a gradient, the gradient is written over the logits: they must not be used afterwards, and
    the result can be differentiated once.
    """
    flat_NV, flat_N = logits_NV.flatten(0, -2).float(), targets_N.flatten()
    overwrites = flat_NV.requires_grad and flat_NV.numel() >= WORTHWHILE_ELEMENTS
    if overwrites and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        losses_N: Tensor = _CrossEntropy.apply(flat_NV, flat_N, label_smoothing)
    else:
        losses_N = F.cross_entropy(flat_NV, flat_N, reduction="none", label_smoothing=label_smoothing)
    return losses_N.view_as(targets_N)


class _CrossEntropy(torch.autograd.Function):
    """The gradient by the logits is softmax minus the (smoothed) one-hot target, times that of the loss."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, label_smoothing: float) -> Tensor:
        losses = []
        rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
        uniform = label_smoothing / logits_NV.shape[1]
        gradient_NV = logits_NV.detach()
        for logits_nV, targets_n in zip(gradient_NV.split(rows), targets_N.split(rows), strict=True):
            log_probabilities_nV = logits_nV.log_softmax(dim=-1)
            true_n = log_probabilities_nV.gather(1, targets_n[:, None]).squeeze(1)
            losses.append(-(1 - label_smoothing) * true_n - uniform * log_probabilities_nV.sum(dim=-1))
            torch.exp(log_probabilities_nV, out=logits_nV)
            if uniform:
                logits_nV.sub_(uniform)
            logits_nV.scatter_add_(1, targets_n[:, None], logits_nV.new_full((len(targets_n), 1), label_smoothing - 1))
        ctx.gradient_NV = gradient_NV
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient_NV is None:
            raise RuntimeError("this cross-entropy can be differentiated once: its gradient was written in place")
        gradient_NV, ctx.gradient_NV = ctx.gradient_NV, None
        return gradient_NV.mul_(gradients[0][:, None]), None, None
