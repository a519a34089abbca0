"""Sampling scale by scale: class in, tokens and features f̂ out.

A sample depends on (seed, global index, class, settings, weights) alone: it draws from a stream of its own, and nothing
in a batch mixes samples. On a CPU in float32 this holds to the bit (see also mvar_core.models.linear).
"""

# Shape suffixes: B batch, G batch with the unconditional half appended where guidance asks for it, L tokens of all
# scales, l tokens of one scale, V codebook entries, Z latent channels, h w the latent grid, S scales.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.config import SamplingConfig
from mvar_core.errors import ConfigError
from mvar_core.models.blocks import KeyValueCache
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Conditioning, Transformer
from mvar_core.runtime import sample_uniforms
from mvar_core.sampling.guidance import draw, guide, keep_top_k, keep_top_p, soft_embeddings


@dataclass(frozen=True)
class SampledTokens:
    """What the sampler gives.

    Attributes:
        tokens_BL: Tokens of all scales.
        fhat_BZhw: Features for the decoder.
        stages_BSZhw: f̂ after each scale, if asked for.
    """

    tokens_BL: Int[Tensor, "B L"]
    fhat_BZhw: Float[Tensor, "B Z h w"]
    stages_BSZhw: Float[Tensor, "B S Z h w"] | None


def check_settings(settings: SamplingConfig, codebook_size: int) -> None:
    """Refuse settings that the model cannot follow.

    Raises:
        ConfigError: top-k is larger than the codebook.
    """
    if settings.top_k > codebook_size:
        raise ConfigError(
            f"top-k is {settings.top_k}, but the codebook has {codebook_size} entries; use 0 (all) … {codebook_size}."
        )


@torch.no_grad()
def sample_tokens(
    transformer: Transformer,
    quantizer: MultiScaleQuantizer,
    labels: Sequence[int],
    indices: Sequence[int],
    seed: int,
    settings: SamplingConfig,
    *,
    attention: str = "auto",
    keep_stages: bool = False,
) -> SampledTokens:
    """Sample one batch.

    Args:
        transformer: In evaluation mode.
        quantizer: The tokenizer's, on the same device.
        labels: Class label of each sample.
        indices: Global index of each sample; its random stream follows from it and the seed.
        seed: The run's seed.
        settings: Guidance and filters.
        attention: Attention backend.
        keep_stages: Keep f̂ after each scale.

    Raises:
        ConfigError: The settings do not fit the model.
    """
    check_settings(settings, quantizer.codebook.shape[0])
    pyramid = transformer.pyramid
    device = quantizer.codebook.device
    batch = len(labels)
    labels_B = torch.tensor(labels, dtype=torch.long, device=device)
    uniforms_BL = sample_uniforms(seed, indices, pyramid.num_tokens).to(device)
    conditioning = _conditioning(transformer, labels_B, guided=settings.cfg > 0)
    cache = KeyValueCache()
    reuses_keys = any(pattern.prefix_tokens for pattern in transformer.patterns)
    fhat_BZhw = quantizer.empty_features(batch)
    tokens, stages = [], []
    for scale, span in enumerate(pyramid.spans):
        strength = settings.cfg * pyramid.ratio(scale)
        # Scale 0 is never guided, but where later scales see it the unconditional half must have its keys there.
        both_halves = strength > 0 or (settings.cfg > 0 and reuses_keys)
        inputs_BlZ = quantizer.scale_input(fhat_BZhw, scale) if scale else fhat_BZhw.new_empty(batch, 0, 1)
        logits_GlV = transformer.forward_scales(
            range(scale, scale + 1),
            torch.cat([inputs_BlZ, inputs_BlZ]) if both_halves else inputs_BlZ,
            conditioning if both_halves else conditioning.first(batch),
            cache=cache,
            attention=attention,
        )
        logits_BlV = logits_GlV[:batch]
        if strength > 0:
            logits_BlV = guide(logits_BlV, logits_GlV[batch:], strength)
        logits_BlV = keep_top_p(keep_top_k(logits_BlV, settings.top_k), settings.top_p)
        tokens_Bl = draw(logits_BlV, uniforms_BL[:, span])
        tokens.append(tokens_Bl)
        embeddings_BlZ = quantizer.embed(tokens_Bl)
        if settings.more_smooth:
            uniforms_BlV = sample_uniforms(seed, indices, logits_BlV[0].numel(), stream=1 + scale).to(device)
            embeddings_BlZ = soft_embeddings(
                logits_BlV, uniforms_BlV.view_as(logits_BlV), quantizer.codebook, pyramid.ratio(scale)
            )
        fhat_BZhw = fhat_BZhw + _increments(quantizer, embeddings_BlZ, scale)
        if keep_stages:
            stages.append(fhat_BZhw)
    return SampledTokens(torch.cat(tokens, dim=1), fhat_BZhw, torch.stack(stages, dim=1) if keep_stages else None)


def _increments(quantizer: MultiScaleQuantizer, embeddings_BlZ: Tensor, scale: int) -> Tensor:
    """What the samples' tokens add to f̂; one by one on a CPU, whose convolutions round by the batch they see."""
    if embeddings_BlZ.device.type != "cpu":
        return quantizer.increment(embeddings_BlZ, scale)
    return torch.cat([quantizer.increment(embeddings_1lZ, scale) for embeddings_1lZ in embeddings_BlZ.split(1)])


def _conditioning(transformer: Transformer, labels_B: Tensor, guided: bool) -> Conditioning:
    """AdaLN vectors once per distinct class, laid out for the batch (and for no class behind it)."""
    labels_G = torch.cat([labels_B, torch.full_like(labels_B, transformer.no_class)]) if guided else labels_B
    classes, rows_G = labels_G.unique(return_inverse=True)
    return transformer.condition(classes).select(rows_G)
