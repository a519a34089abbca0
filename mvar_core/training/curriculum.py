"""What one training step trains: which scales, with which weights.

The joint curriculum trains all scales in one packed pass. The interleaved one is what MVAR was published with: most
steps train the first scales together, the others one of the last scales alone. Given the tokens the scales' losses
simply add up, so both follow the same gradient on average; the joint one follows it in every step.
"""

# Shape suffixes: B batch, L tokens of all scales, l tokens of the trained scales, Z latent channels,
# V codebook entries, S scales, X numbers of a vector that the model is conditioned on.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.config.training import TrainConfig
from mvar_core.models.transformer import Transformer
from mvar_core.pyramid import AttentionPattern, ScalePyramid
from mvar_core.runtime import RowDraws
from mvar_core.training.cross_entropy import cross_entropy


class ScaleLosses(NamedTuple):
    """Losses of one batch, with what each scale contributed; the per-scale parts carry no gradient."""

    loss: Tensor
    """Scalar that is minimised."""
    scale_losses: Tensor
    """(S,) Mean cross-entropy of each scale's tokens; nan for a scale that this step left out."""
    scale_accuracies: Tensor
    """(S,) Fraction of each scale's tokens whose likeliest code is the true one; nan for a scale that was left out."""


class Curriculum(Protocol):
    """Chooses what a step trains."""

    def trained_scales(self, step: int | None) -> range:
        """The consecutive scales that a step trains; all of them for None."""
        ...

    def tokens_per_step(self) -> float:
        """Tokens of an image that a step trains, on average over the steps."""
        ...

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
        """Losses of one step; a pure function of the step, the batch and the generator. Step None measures all."""
        ...


def token_losses(
    logits_BLV: Float[Tensor, "B L V"], tokens_BL: Int[Tensor, "B L"], label_smoothing: float = 0.0
) -> Float[Tensor, "B L"]:
    """Cross-entropy of every token, in float32; the logits must not be used afterwards (`cross_entropy`)."""
    return cross_entropy(logits_BLV.flatten(0, 1).float(), tokens_BL.flatten(), label_smoothing).view_as(tokens_BL)


def per_scale_means(
    values_Bl: Float[Tensor, "B l"], pyramid: ScalePyramid, scales: range | None = None
) -> Float[Tensor, " S"]:
    """Mean over images and tokens of each scale; nan for the scales that are not among those given.

    Args:
        values_Bl: One value per token of `scales`.
        pyramid: All scales.
        scales: Which scales the values belong to; None is all.
    """
    scales = range(pyramid.num_scales) if scales is None else scales
    offset = pyramid.spans[scales.start].start
    means = values_Bl.new_full((pyramid.num_scales,), math.nan)
    for scale in scales:
        span = pyramid.spans[scale]
        means[scale] = values_Bl[:, span.start - offset : span.stop - offset].mean()
    return means


class JointCurriculum:
    """All scales in one packed pass; every token weighs 1/L, times its scale's weight.

    Args:
        pyramid: The scales.
        label_smoothing: Probability spread evenly over the codebook.
        scale_weights: Relative weight of a token's loss, one per scale, empty for all alike; they are scaled so that
            the mean over an image's tokens is 1.
    """

    def __init__(self, pyramid: ScalePyramid, label_smoothing: float = 0.0, scale_weights: Sequence[float] = ()):
        self.pyramid = pyramid
        self.label_smoothing = label_smoothing
        self.weights_L: Tensor | None = None
        if scale_weights:
            weights_L = torch.tensor([scale_weights[scale] for scale in pyramid.scale_of_token], dtype=torch.float64)
            self.weights_L = (weights_L / weights_L.mean()).float()

    def trained_scales(self, step: int | None) -> range:
        """All scales, in every step."""
        return range(self.pyramid.num_scales)

    def tokens_per_step(self) -> float:
        """All tokens."""
        return self.pyramid.num_tokens

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
        """Losses of one packed pass over the scales that the step trains; over all for step None."""
        scales = self.trained_scales(step)
        span = slice(self.pyramid.spans[scales.start].start, self.pyramid.spans[scales.stop - 1].stop)
        wanted = None if len(scales) == self.pyramid.num_scales else scales
        logits_BlV = transformer(conditions, inputs_BLZ, scales=wanted, attention=attention, generator=generator)
        tokens_Bl = tokens_BL[:, span]
        with torch.no_grad():
            hits_Bl = (logits_BlV.argmax(dim=-1) == tokens_Bl).float()
        losses_Bl = token_losses(logits_BlV, tokens_Bl, self.label_smoothing)
        del logits_BlV
        return ScaleLosses(
            self._weighted(losses_Bl, span),
            per_scale_means(losses_Bl.detach(), self.pyramid, scales),
            per_scale_means(hits_Bl, self.pyramid, scales),
        )

    def _weighted(self, losses_Bl: Tensor, span: slice) -> Tensor:
        """Mean over images of the sum of the tokens' losses, each over L: a step on some scales adds up to a part."""
        if self.weights_L is not None:
            losses_Bl = losses_Bl * self.weights_L[span].to(losses_Bl.device)
        part = losses_Bl.shape[1] / self.pyramid.num_tokens
        return losses_Bl.mean() if part == 1 else losses_Bl.mean() * part


class InterleavedCurriculum(JointCurriculum):
    """The published schedule: of every ratio_k + n steps, ratio_k train the first scales, n one of the last n each.

    With the published ratio_k = 8 and n = 2 on ten scales: eight steps train scales 1 … 8 together, the ninth scale 9
    alone, the tenth scale 10 alone, and so on from step 0. A token's loss weighs 1/L in whichever step trains it. Where
    a scale sees earlier ones (more than one scale prefix, or VAR) those are computed along in its step, without a loss
    of their own but with gradient, so that the steps' gradients add up to the joint one in any case.

    Args:
        pyramid: The scales.
        ratio_k: Steps on the first scales per step on each of the last.
        alone: How many of the last scales have steps of their own; at most all but one.
        label_smoothing: Probability spread evenly over the codebook.
        scale_weights: See `JointCurriculum`.
    """

    def __init__(
        self,
        pyramid: ScalePyramid,
        ratio_k: int = 8,
        alone: int = 2,
        label_smoothing: float = 0.0,
        scale_weights: Sequence[float] = (),
    ):
        super().__init__(pyramid, label_smoothing, scale_weights)
        self.ratio_k = ratio_k
        self.together = max(1, pyramid.num_scales - alone)

    @property
    def period(self) -> int:
        """Steps after which the schedule repeats."""
        return self.ratio_k + self.pyramid.num_scales - self.together

    def trained_scales(self, step: int | None) -> range:
        """The first scales, or one of the last, by the step's place in the period."""
        if step is None:
            return super().trained_scales(step)
        beyond = step % self.period - self.ratio_k
        return range(self.together) if beyond < 0 else range(self.together + beyond, self.together + beyond + 1)

    def tokens_per_step(self) -> float:
        """Tokens of an image that a step trains, on average over a period."""
        grids = self.pyramid.grids
        trained = (grids[scale].tokens for step in range(self.period) for scale in self.trained_scales(step))
        return sum(trained) / self.period


def scales_alone(patterns: Sequence[AttentionPattern]) -> int:
    """How many of the last scales the interleaved curriculum trains alone unless told otherwise.

    Published are the last two, which have windows. So: the windowed scales at the end, two at most; where there are
    none, two.
    """
    windowed = 0
    while windowed < min(2, len(patterns)) and patterns[-1 - windowed].is_windowed:
        windowed += 1
    return windowed or 2


def build_curriculum(
    config: TrainConfig, pyramid: ScalePyramid, patterns: Sequence[AttentionPattern] = ()
) -> JointCurriculum:
    """The curriculum that the configuration names.

    Args:
        config: The training settings.
        pyramid: The scales.
        patterns: What each scale attends to; says which scales are windowed.
    """
    if config.curriculum == "interleaved":
        alone = config.scales_alone or scales_alone(patterns)
        return InterleavedCurriculum(pyramid, config.ratio_k, alone, config.label_smoothing, config.scale_weights)
    return JointCurriculum(pyramid, config.label_smoothing, config.scale_weights)
