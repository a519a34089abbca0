"""Predicted peak memory of sampling and training, and the largest batch that fits; by formula, no torch.

The predictions count tensors that are live together: weights, KV cache, and the activations of the widest moment. They
leave out what the device's library and allocator hold for themselves, and the scratch space of kernels.
"""

from __future__ import annotations

from collections.abc import Callable

from mvar_core.analysis.counts import (
    head_parameters,
    tokenizer_parameters,
    transformer_parameters,
)
from mvar_core.config import ModelConfig
from mvar_core.models import footprint
from mvar_core.train_config import TrainConfig

FLOAT32 = 4
MAX_BATCH = 1 << 24


def weight_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Weights for sampling, in the compute dtype; the head and the quantizer stay in float32."""
    sizes = config.tokenizer
    quantizer = sizes.codebook_size * sizes.latent_channels + sizes.residual_convs * (
        9 * sizes.latent_channels**2 + sizes.latent_channels
    )
    in_float32 = head_parameters(config) + quantizer
    parameters = transformer_parameters(config) + tokenizer_parameters(config)
    return parameters * dtype_bytes + in_float32 * (FLOAT32 - dtype_bytes)


def sample_peak_bytes(
    config: ModelConfig, batch_size: int, dtype_bytes: int, guided: bool, top_k: int | None = None
) -> int:
    """Most memory live at once while `batch_size` images go through every scale together, not in micro-batches.

    Weights, what lives from scale to scale, and the larger of the widest scale (with its keys and values) and the
    decoder with one image.

    Args:
        config: The model.
        batch_size: Images.
        dtype_bytes: Bytes per value of the compute dtype.
        guided: Whether sampling uses guidance.
        top_k: Codes that the drawing keeps; by default the model's.
    """
    kept = config.sampling.top_k if top_k is None else top_k
    scale_peak = max(
        (
            footprint.scale_bytes(config, scale, dtype_bytes, guided, kept)
            + footprint.cached_bytes(config, scale, dtype_bytes, guided)
            for scale in range(config.pyramid.num_scales)
        ),
        default=0,
    )
    between = batch_size * (footprint.image_bytes(config) + footprint.class_bytes(config, dtype_bytes))
    active = max(batch_size * scale_peak, footprint.decoder_bytes(config, dtype_bytes))
    return weight_bytes(config, dtype_bytes) + between + active


def train_peak_bytes(config: ModelConfig, train: TrainConfig, dtype_bytes: int) -> int:
    """Most memory live at once in a training step of the whole batch on one device, all scales packed.

    Per parameter: weight, gradient and two AdamW moments in float32, and the compute dtype's copy where that is not
    float32. Per token and block, what the backward pass needs: 8 C float32 values (residual stream and its norm, twice;
    q and k before and after normalisation) and 11 C + 2 F values in the compute dtype (inputs and outputs of the
    projections, q, k, v, the MLP's hidden layer before and after GELU). Per token three float32 rows of V logits.
    """
    sizes = config.transformer
    if sizes is None:
        return 0
    copy = dtype_bytes if dtype_bytes < FLOAT32 else 0
    states = transformer_parameters(config) * (4 * FLOAT32 + copy)
    width, hidden = sizes.embed_dim, sizes.hidden_dim
    per_block = 8 * width * FLOAT32 + (11 * width + 2 * hidden) * dtype_bytes
    per_token = sizes.depth * per_block + 3 * config.tokenizer.codebook_size * FLOAT32
    return states + train.batch_size * config.pyramid.num_tokens * per_token


def largest_batch(peak_bytes: Callable[[int], int], device_memory: int) -> int:
    """The largest batch whose predicted peak fits, 0 where not even one image does.

    Args:
        peak_bytes: Predicted peak for a batch size; must not fall as the batch grows.
        device_memory: Bytes that there are.
    """
    if peak_bytes(1) > device_memory:
        return 0
    fits = 1
    while fits < MAX_BATCH and peak_bytes(2 * fits) <= device_memory:
        fits *= 2
    too_large = 2 * fits
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if peak_bytes(middle) <= device_memory:
            fits = middle
        else:
            too_large = middle
    return fits
