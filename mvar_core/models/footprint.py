"""How much memory sampling takes, part by part, by formula; no torch.

The sampler chooses its micro-batches from these numbers, and the cost model predicts with them. They count tensors that
are live together, not what libraries and allocators hold for themselves.
"""

from __future__ import annotations

from mvar_core.config import ModelConfig

FLOAT32 = 4
FLOAT64 = INT64 = 8


def image_bytes(config: ModelConfig, keep_stages: bool = False) -> int:
    """Bytes of one image that live from scale to scale: f̂, its tokens and its random numbers; without keys and values.

    Args:
        config: The model.
        keep_stages: f̂ is also kept after every scale.
    """
    pyramid = config.pyramid
    fhat = config.tokenizer.latent_channels * pyramid.latent_grid.tokens * FLOAT32
    return fhat * (1 + keep_stages * pyramid.num_scales) + pyramid.num_tokens * (INT64 + FLOAT64)


def cached_bytes(config: ModelConfig, scale: int, dtype_bytes: int, guided: bool) -> int:
    """Bytes of one image's keys and values that are held while `scale` runs: what it sees, and its own."""
    sizes, pyramid = config.transformer, config.pyramid
    if sizes is None or not reuses_keys(config):
        return 0
    first = pyramid.first_visible_scale(scale, config.attention.scale_prefixes)
    tokens = pyramid.spans[scale].stop - pyramid.spans[first].start
    return 2 * sizes.depth * sizes.embed_dim * dtype_bytes * tokens * (2 if guided else 1)


def reuses_keys(config: ModelConfig) -> bool:
    """Whether some scale sees an earlier one, so that keys and values must be kept."""
    return any(pattern.prefix_tokens for pattern in config.patterns)


def class_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of the AdaLN vectors and the embedding of one class."""
    sizes = config.transformer
    if sizes is None:
        return 0
    return sizes.embed_dim * ((6 * sizes.depth + 1) * dtype_bytes + 2 * FLOAT32)


def scale_bytes(config: ModelConfig, scale: int, dtype_bytes: int, guided: bool, top_k: int = 0) -> int:
    """Bytes of one image's activations at the widest moment of a scale: attention, MLP, head or drawing.

    Args:
        config: The model.
        scale: Which scale.
        dtype_bytes: Bytes per value of the compute dtype.
        guided: Whether the unconditional half runs too.
        top_k: How many codes the drawing keeps; 0 for all of them.
    """
    sizes = config.transformer
    if sizes is None:
        return 0
    width, hidden, codes = sizes.embed_dim, sizes.hidden_dim, config.tokenizer.codebook_size
    pattern = config.patterns[scale]
    tokens = pattern.queries
    rows = tokens * (2 if guided else 1)
    # Stream, modulated norm, q k v as projected, q and k normalised (in float32, then cast), attention's output.
    attention = rows * width * (8 * dtype_bytes + (3 * FLOAT32 if sizes.l2_attention else 0))
    # Keys and values of a layer, laid in a row for the kernel.
    copies = 4 * width * dtype_bytes * pattern.keys * (2 if guided else 1) if pattern.prefix_tokens else 0
    # Stream, modulated norm, hidden layer before and after GELU.
    mlp = rows * (2 * width + 2 * hidden) * dtype_bytes
    # Stream, its float32 copy, norm and modulated norm, and the logits.
    head = rows * width * (dtype_bytes + 3 * FLOAT32) + tokens * codes * FLOAT32
    # Stream, logits; the codes kept with their order, and two float64 rows of them.
    kept = top_k + 1 if 0 < top_k < codes else codes
    drawing = rows * width * dtype_bytes + tokens * (codes * FLOAT32 + kept * (FLOAT32 + INT64 + 2 * FLOAT64))
    return max(attention + copies, mlp, head, drawing)


def decoder_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of one image's widest moment in the decoder: three feature maps and the image as float32 and as bytes."""
    sizes = config.tokenizer
    height, width = config.pyramid.latent_grid
    widest = 0
    for level, multiplier in enumerate(reversed(sizes.channel_multipliers)):
        side = 1 << min(level + 1, len(sizes.channel_multipliers) - 1)  # a level ends with its map upsampled
        widest = max(widest, sizes.base_channels * multiplier * height * width * side * side)
    pixels = 3 * config.image_shape[0] * config.image_shape[1]
    return 3 * widest * dtype_bytes + pixels * (2 * FLOAT32 + 1)
