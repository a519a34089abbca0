"""Sampling as the published VAR code does it: the baseline that is to be beaten, not a way to use.

Weights in float32 under autocast, the whole batch at once with its cache of keys and values, modulation again at
every scale, guidance at every scale, the vocabulary sorted for top-p, one multinomial draw over all codes, and the
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

    Args:
        transformer: In evaluation mode, float32.
        tokenizer: On the same device, float32.
        conditions: One class label per image, or vectors, as the model is conditioned.
        settings: Guidance and filters.
        generator: Of all draws, on the same device.
        dtype: Of autocast; float32 is none.
        attention: Attention backend.
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
