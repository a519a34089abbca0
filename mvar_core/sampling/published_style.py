"""Sampling as the published VAR code does it: a baseline to compare speed with, not a way to generate images.

Weights in float32 under autocast, the whole batch at once with its cache of keys and values, modulation again at
every scale, guidance at every scale, the vocabulary sorted for top-p, one multinomial sample over all codes, and the
decoder on the whole batch. Samples depend on their batch.
"""

# Shape suffixes: B batch, G batch with the unconditional half behind it, l tokens of one scale, V codebook entries,
# Z latent channels, h w the latent grid.

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from mvar_core.config import SamplingConfig
from mvar_core.io.pixels import to_uint8
from mvar_core.models.blocks import KeyValueCache
from mvar_core.models.conditioning import Conditions
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.sampling.guidance import guide, keep_likely


@torch.no_grad()
def sample_published_style(
    transformer: Transformer,
    tokenizer: VQVAE,
    conditions: Conditions,
    settings: SamplingConfig,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "dense",
) -> UInt8[Tensor, "B H W 3"]:
    """Images of one batch, as bytes on the device.

    The models are in float32 and evaluation mode, with one label or vector in `conditions` per image; `generator`
    is on the same device; `dtype` is that of autocast, float32 for none.
    """
    pyramid, quantizer = transformer.pyramid, tokenizer.quantizer
    device = quantizer.codebook.device
    conditioner, batch = transformer.conditioner, len(conditions)
    conditions_G = torch.cat([conditioner.read(conditions), conditioner.null(batch)]).to(device)
    cache = KeyValueCache(2 * batch)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        fhat_BZhw = quantizer.empty_features(batch)
        for scale in range(pyramid.num_scales):
            inputs_BlZ = quantizer.scale_input(fhat_BZhw, scale) if scale else fhat_BZhw.new_empty(batch, 0, 1)
            conditioning, inputs_GlZ = transformer.condition(conditions_G), torch.cat([inputs_BlZ, inputs_BlZ])
            x_GlC = transformer.hidden_states(
                range(scale, scale + 1), inputs_GlZ, conditioning, cache=cache.rows(), attention=attention
            )
            logits_GlV = transformer.head_logits(x_GlC, conditioning)
            transformer.drop_unseen(cache, scale)
            conditional_BlV, unconditional_BlV = logits_GlV.chunk(2)
            logits_BlV = guide(conditional_BlV, unconditional_BlV, settings.cfg * pyramid.ratio(scale))
            logits_BlV = keep_likely(logits_BlV, settings)
            probabilities_NV = logits_BlV.softmax(dim=-1).flatten(0, 1)
            tokens_Bl = torch.multinomial(probabilities_NV, 1, generator=generator).view(batch, -1)
            fhat_BZhw = fhat_BZhw + quantizer.increment(quantizer.embed(tokens_Bl), scale)
        return to_uint8(tokenizer.decode_features(fhat_BZhw))
