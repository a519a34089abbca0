"""What one training step trains: which scales, with which weights.

A curriculum is one class with one method. The joint one trains all scales in one packed pass.
"""

# Shape suffixes: B batch, L tokens of all scales, Z latent channels, V codebook entries, S scales.

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.config import TrainConfig
from mvar_core.models.transformer import Transformer
from mvar_core.scales import ScalePyramid


class ScaleLosses(NamedTuple):
    """Losses of one batch, with what each scale contributed; the per-scale parts carry no gradient."""

    loss: Tensor
    """Scalar that is minimised."""
    scale_losses: Tensor
    """(S,) Mean cross-entropy of each scale's tokens; nan for a scale that this step left out."""
    scale_accuracies: Tensor
    """(S,) Part of each scale's tokens whose likeliest code is the true one; nan for a scale that was left out."""


class Curriculum(Protocol):
    """Chooses what a step trains."""

    def losses(
        self,
        transformer: Transformer,
        labels_B: Int[Tensor, " B"],
        tokens_BL: Int[Tensor, "B L"],
        inputs_BLZ: Float[Tensor, "B l Z"],
        *,
        step: int,
        attention: str,
        generator: torch.Generator | None,
    ) -> ScaleLosses:
        """Losses of one step; a pure function of the step, the batch and the generator."""
        ...


def token_losses(
    logits_BLV: Float[Tensor, "B L V"], tokens_BL: Int[Tensor, "B L"], label_smoothing: float = 0.0
) -> Float[Tensor, "B L"]:
    """Cross-entropy of every token, in float32."""
    return F.cross_entropy(
        logits_BLV.flatten(0, 1).float(), tokens_BL.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(tokens_BL)


def per_scale_means(values_BL: Float[Tensor, "B L"], pyramid: ScalePyramid) -> Float[Tensor, " S"]:
    """Mean over images and tokens of each scale."""
    return torch.stack([values_BL[:, span].mean() for span in pyramid.spans])


class JointCurriculum:
    """All scales in one packed pass; every token weighs 1/L.

    Given the tokens, the scales' losses simply add up, so one pass over all of them has the exact gradient of what the
    published interleaved steps train in turn.

    Args:
        pyramid: The scales.
        label_smoothing: Probability spread evenly over the codebook.
    """

    def __init__(self, pyramid: ScalePyramid, label_smoothing: float = 0.0):
        self.pyramid = pyramid
        self.label_smoothing = label_smoothing

    def losses(
        self,
        transformer: Transformer,
        labels_B: Int[Tensor, " B"],
        tokens_BL: Int[Tensor, "B L"],
        inputs_BLZ: Float[Tensor, "B l Z"],
        *,
        step: int,
        attention: str,
        generator: torch.Generator | None,
    ) -> ScaleLosses:
        """Losses of one packed pass over all scales."""
        logits_BLV = transformer(labels_B, inputs_BLZ, attention=attention, generator=generator)
        losses_BL = token_losses(logits_BLV, tokens_BL, self.label_smoothing)
        with torch.no_grad():
            hits_BL = (logits_BLV.argmax(dim=-1) == tokens_BL).float()
        return ScaleLosses(
            losses_BL.mean(), per_scale_means(losses_BL.detach(), self.pyramid), per_scale_means(hits_BL, self.pyramid)
        )


def build_curriculum(config: TrainConfig, pyramid: ScalePyramid) -> Curriculum:
    """The curriculum that the configuration names."""
    return JointCurriculum(pyramid, config.label_smoothing)
