"""Sampling scale by scale: conditions in, tokens and features f̂ out.

All images advance together from scale to scale; within a scale they are processed in micro-batches, for nothing passes
between images. Between scales live f̂, the tokens and, where a later scale sees earlier ones, keys and values: so the
memory of a scale-Markov model hardly grows with the number of images.

A sample depends on (seed, global index, condition, settings, weights) alone: it has a random stream of its own, and
nothing in a batch mixes samples. On a CPU in float32 this holds to the bit (see also mvar_core.models.linear).
"""

# Shape suffixes: N images, B images of a micro-batch, G those with the unconditional half appended where guidance asks
# for it, L tokens of all scales, l tokens of one scale, C width, V codebook entries, Z latent channels, h w the latent
# grid, S scales.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.config import ModelConfig, SamplingConfig
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.models.blocks import KeyValueCache
from mvar_core.models.conditioning import Conditioning, Conditions
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.runtime import sample_uniforms
from mvar_core.sampling.editing import KeptTokens
from mvar_core.sampling.guidance import (
    guidance_strengths,
    keep_likely,
    sample_codes,
    sample_likely_codes,
    soft_embeddings,
    unconditional_scales,
)


@dataclass(frozen=True)
class SampledTokens:
    """Tokens of all scales, features f̂ for the decoder and, if asked for, f̂ after each scale."""

    tokens_NL: Int[Tensor, "N L"]
    fhat_NZhw: Float[Tensor, "N Z h w"]
    stages_NSZhw: Float[Tensor, "N S Z h w"] | None


def resolve_settings(config: ModelConfig, settings: SamplingConfig | None = None, **shorthand: Any) -> SamplingConfig:
    """The settings to sample with: `shorthand` over `settings` over what the model recommends.

    ConfigError for an unknown setting, a value out of range, a top-k above the codebook, or guidance of scales that the
    model does not have.
    """
    if settings is not None and not isinstance(settings, SamplingConfig):
        raise ConfigError(f"settings is of type {type(settings).__name__}.", "Pass a SamplingConfig.")
    resolved = SamplingConfig(**{name: value for name, value in shorthand.items() if value is not None})
    for below in (settings, config.sampling):
        resolved = resolved if below is None else resolved.over(below)
    codes = config.tokenizer.codebook_size
    if resolved.top_k > codes:
        raise ConfigError(f"top-k is {resolved.top_k}, but the codebook has {codes} entries; use 0 (all) … {codes}.")
    guidance_strengths(resolved, config.pyramid)
    return resolved


@torch.no_grad()
def sample_tokens(
    transformer: Transformer,
    quantizer: MultiScaleQuantizer,
    conditions: Conditions,
    indices: Sequence[int],
    seed: int,
    settings: SamplingConfig,
    *,
    kept: KeptTokens | None = None,
    micro_batches: Sequence[int] | None = None,
    attention: str = "auto",
    keep_stages: bool = False,
    static_shapes: bool = False,
    on_tokens: Callable[[int], None] | None = None,
) -> SampledTokens:
    """Sample images that advance together from scale to scale.

    The transformer is in evaluation mode, the tokenizer's quantizer on the same device; `conditions` are class labels
    or vectors (N, X), as the model is conditioned. The random stream of a sample follows from its global index and the
    seed; `kept` are tokens of given images, one for each sample, which replace sampled ones where they stay.

    `micro_batches` says for each scale how many images go through the transformer in one pass, by default all: speed
    and memory, never the result. `keep_stages` keeps f̂ after each scale. `static_shapes` fills up the last micro-batch
    of a scale where no keys are kept, so that a compiled transformer sees one shape per scale. `on_tokens` is called
    with the number of tokens sampled since the last call. CheckpointError names a scale whose logits are not finite.
    """
    pyramid, count, stages = transformer.pyramid, len(conditions), []
    run = _Run(transformer, quantizer, conditions, indices, seed, settings, attention, kept)
    for scale in range(pyramid.num_scales):
        size = micro_batches[scale] if micro_batches is not None else max(1, count)
        for start in range(0, count, size):
            images = slice(start, min(start + size, count))
            run.advance(scale, images, size if static_shapes and not run.reuses_keys else 0)
            if on_tokens is not None:
                on_tokens((images.stop - images.start) * pyramid.grids[scale].tokens)
        transformer.drop_unseen(run.cache, scale)
        if keep_stages:
            stages.append(run.fhat_NZhw.clone())
    return SampledTokens(run.tokens_NL, run.fhat_NZhw, torch.stack(stages, dim=1) if keep_stages else None)


@dataclass(eq=False)
class _Run:
    """Images on their way through the scales: what lives from one scale to the next, and how it advances."""

    transformer: Transformer
    quantizer: MultiScaleQuantizer
    conditions: Conditions
    indices: Sequence[int]
    seed: int
    settings: SamplingConfig
    attention: str
    kept: KeptTokens | None

    def __post_init__(self) -> None:
        self.pyramid, self.device = self.transformer.pyramid, self.quantizer.codebook.device
        if self.kept is not None:
            self.kept = self.kept.to(self.device)
        count = len(self.conditions)
        self.strengths = guidance_strengths(self.settings, self.pyramid)
        self.runs_both = unconditional_scales(self.strengths, self.transformer.first_visible)
        conditioner = self.transformer.conditioner
        asked = torch.cat([conditioner.read(self.conditions), conditioner.null(int(any(self.runs_both)))])
        distinct, entries = (part.to(self.device) for part in conditioner.distinct(asked))
        # AdaLN vectors depend on the condition alone: once for each, for all images and scales.
        self.conditioning = self.transformer.condition(distinct)
        self.entries_N, self.null_entry = entries[:count], entries[count:]
        self.uniforms_NL = self._uniforms(slice(None), self.pyramid.num_tokens)
        self.fhat_NZhw = self.quantizer.empty_features(count)
        self.tokens_NL = torch.empty(count, self.pyramid.num_tokens, dtype=torch.long, device=self.device)
        self.reuses_keys = any(pattern.prefix_tokens for pattern in self.transformer.patterns)
        self.cache = KeyValueCache(2 * count if any(self.runs_both) else count)

    def advance(self, scale: int, images: slice, size: int = 0) -> None:
        """Sample the tokens of one scale for some images, of which at least `size` go through the transformer."""
        span, strength, both_halves = self.pyramid.spans[scale], self.strengths[scale], self.runs_both[scale]
        fhat_BZhw, count = self.fhat_NZhw[images], images.stop - images.start
        inputs_BlZ = self.quantizer.scale_input(fhat_BZhw, scale) if scale else fhat_BZhw.new_empty(count, 0, 1)
        inputs_BlZ = _filled_up(inputs_BlZ, size)
        x_GlC = self.transformer.hidden_states(
            range(scale, scale + 1),
            torch.cat([inputs_BlZ, inputs_BlZ]) if both_halves else inputs_BlZ,
            self._conditioning(images, both_halves, size),
            cache=self.cache.rows(self._rows(images, both_halves)) if self.reuses_keys else None,
            attention=self.attention,
        )
        if size > count:
            x_GlC = torch.cat([half[:count] for half in x_GlC.chunk(2 if both_halves else 1)])
        if both_halves and strength == 0:
            x_GlC = x_GlC.chunk(2)[0]
        logits_BlV = self.transformer.head_logits(x_GlC, self._conditioning(images, strength > 0), strength)
        # The largest logit of a row is nan where any of its logits is.
        if not logits_BlV.amax(dim=-1).isfinite().all():
            raise CheckpointError(
                f"At scale {scale} (of 0 … {self.pyramid.num_scales - 1}) the model's logits are not finite numbers.",
                "The weights hold nan or inf, or overflow: use --dtype float32, less --cfg, or an earlier checkpoint.",
            )
        uniforms_Bl = self.uniforms_NL[images, span]
        if self.settings.more_smooth:
            logits_BlV = keep_likely(logits_BlV, self.settings)
            tokens_Bl = sample_codes(logits_BlV, uniforms_Bl)
            uniforms_BlV = self._uniforms(images, logits_BlV[0].numel(), stream=1 + scale).view_as(logits_BlV)
            ratio = self.pyramid.ratio(scale)
            embeddings_BlZ = soft_embeddings(logits_BlV, uniforms_BlV, self.quantizer.codebook, ratio)
        else:
            tokens_Bl = sample_likely_codes(logits_BlV, uniforms_Bl, self.settings)
            embeddings_BlZ = self.quantizer.embed(tokens_Bl)
        if self.kept is not None:
            given_Bl, kept_Bl = self.kept.tokens_NL[images, span], self.kept.kept_NL[images, span]
            tokens_Bl = torch.where(kept_Bl, given_Bl, tokens_Bl)
            embeddings_BlZ = torch.where(kept_Bl.unsqueeze(-1), self.quantizer.embed(given_Bl), embeddings_BlZ)
        self.tokens_NL[images, span] = tokens_Bl
        # One by one on a CPU, whose convolutions round by the batch they see.
        alone = embeddings_BlZ.split(1 if self.device.type == "cpu" else count)
        self.fhat_NZhw[images] += torch.cat([self.quantizer.increment(some_BlZ, scale) for some_BlZ in alone])

    def _uniforms(self, images: slice, count: int, stream: int = 0) -> Tensor:
        """Random numbers of some images, on the device; Apple's has no float64."""
        uniforms = sample_uniforms(self.seed, self.indices[images], count, stream)
        return uniforms.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)

    def _conditioning(self, images: slice, both_halves: bool, size: int = 0) -> Conditioning:
        entries_B = _filled_up(self.entries_N[images], size)
        if both_halves:
            entries_B = torch.cat([entries_B, self.null_entry.expand_as(entries_B)])
        return self.conditioning.select(entries_B)

    def _rows(self, images: slice, both_halves: bool) -> Tensor | None:
        """Rows of the cache: images, then their unconditional halves; None where they are all that there are."""
        count = len(self.entries_N)
        if images.stop - images.start == count and self.cache.num_rows == (2 * count if both_halves else count):
            return None
        rows_B = torch.arange(images.start, images.stop, device=self.device)
        return torch.cat([rows_B, rows_B + count]) if both_halves else rows_B


def _filled_up(rows: Tensor, size: int) -> Tensor:
    """At least `size` rows, the last one repeated."""
    missing = size - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing > 0 else rows
