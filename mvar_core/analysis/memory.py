"""Predicted peak memory of sampling and training, and the largest batch that fits; by formula, no torch.

The predictions count tensors that are live together: weights, KV cache, and the activations of the widest moment. They
leave out what the device's library and allocator hold for themselves, and the scratch space of kernels.
"""

from __future__ import annotations

from collections.abc import Callable

from mvar_core.analysis.convolutions import decoder_layers
from mvar_core.analysis.counts import (
    head_parameters,
    key_value_bytes_per_token,
    rows,
    tokenizer_parameters,
    transformer_parameters,
)
from mvar_core.config import ModelConfig, TrainConfig

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


def sample_peak_bytes(config: ModelConfig, batch_size: int, dtype_bytes: int, guided: bool) -> int:
    """Most memory live at once while `batch_size` images are sampled together.

    Weights plus the larger of

    * over scales: KV cache while the scale runs (earlier visible scales and its own; nothing with one prefix), plus the
      widest of attention, MLP and the drawing of tokens at that scale;
    * the decoder, which takes one image after the other: three feature maps of its widest layer (a residual block's
      input, the input of a convolution and its output).
    """
    scale_peak = max(
        (_scale_bytes(config, scale, batch_size, dtype_bytes, guided) for scale in range(config.pyramid.num_scales)),
        default=0,
    )
    widest = max(layer.outputs for layer in decoder_layers(config.tokenizer, config.pyramid.latent_grid))
    decoder_peak = 3 * widest * dtype_bytes
    return weight_bytes(config, dtype_bytes) + max(scale_peak, decoder_peak)


def _scale_bytes(config: ModelConfig, scale: int, batch_size: int, dtype_bytes: int, guided: bool) -> int:
    sizes = config.transformer
    if sizes is None:
        return 0
    width, hidden, codes = sizes.embed_dim, sizes.hidden_dim, config.tokenizer.codebook_size
    pattern, batch = config.patterns[scale], rows(batch_size, guided)
    tokens = batch * pattern.queries
    cache = copies = 0
    if config.attention.scale_prefixes != 1:
        cache = key_value_bytes_per_token(sizes, dtype_bytes) * batch * pattern.keys
        if pattern.prefix_tokens:  # one layer's keys and values, laid in a row for the kernel
            copies = 2 * width * dtype_bytes * batch * pattern.keys
    # Stream, modulated norm, q k v as projected, q and k normalised (in float32, then cast), attention's output.
    attention = tokens * width * (8 * dtype_bytes + (3 * FLOAT32 if sizes.l2_attention else 0)) + copies
    # Stream, modulated norm, hidden layer before and after GELU.
    mlp = tokens * (2 * width + 2 * hidden) * dtype_bytes
    # Logits of all rows; then, per image, logits guided, cut by top-k and sorted, the sort's int64 order, two sums.
    drawing = tokens * codes * FLOAT32 + batch_size * pattern.queries * codes * (5 * FLOAT32 + 8)
    conditioning = batch * (sizes.depth * 6 + 1) * width * dtype_bytes
    return cache + conditioning + max(attention, mlp, drawing)


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
