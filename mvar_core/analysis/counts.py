"""Parameters, multiply-accumulates and cached tokens of a model by formula; no torch.

Letters: d blocks, C width, F hidden width of the MLP, H heads, V codebook entries, Z latent channels, L tokens of all
scales, l tokens of one scale, S scales. A multiply-accumulate (MAC) is one multiplication and one addition.
"""

from __future__ import annotations

from mvar_core.analysis.convolutions import (
    convolution,
    decoder_layers,
    encoder_layers,
    total_macs,
    total_parameters,
)
from mvar_core.config import ModelConfig, TransformerConfig
from mvar_core.pyramid import Grid


def transformer_parameters(config: ModelConfig) -> int:
    """Learned numbers of the transformer; 0 where the model is a tokenizer alone."""
    sizes = config.transformer
    if sizes is None:
        return 0
    width, pyramid = sizes.embed_dim, config.pyramid
    tables = pyramid.grids[0].tokens + pyramid.num_tokens + pyramid.num_scales
    inputs = config.tokenizer.latent_channels * width + width
    shared = 6 * (width * width + width) if sizes.shared_adaln else 0
    inputs += config.conditioner_parameters
    return tables * width + inputs + sizes.depth * block_parameters(sizes) + shared + head_parameters(config)


def block_parameters(sizes: TransformerConfig) -> int:
    """Learned numbers of one block."""
    width, hidden = sizes.embed_dim, sizes.hidden_dim
    attention = 3 * width * width + 2 * width + (width * width + width)
    if sizes.l2_attention:
        attention += sizes.num_heads
    mlp = (width * hidden + hidden) + (hidden * width + width)
    return attention + mlp + (6 * width if sizes.shared_adaln else 6 * (width * width + width))


def head_parameters(config: ModelConfig) -> int:
    """Learned numbers of the head and of its AdaLN, which stay in float32."""
    if config.transformer is None:
        return 0
    width, codes = config.transformer.embed_dim, config.tokenizer.codebook_size
    return 2 * (width * width + width) + width * codes + codes


def tokenizer_parameters(config: ModelConfig) -> int:
    """Learned numbers of the tokenizer: encoder, quantizer and decoder."""
    encoder = total_parameters(encoder_layers(config.tokenizer, Grid(*config.image_shape)))
    return encoder + quantizer_parameters(config) + decoder_parameters(config)


def quantizer_parameters(config: ModelConfig) -> int:
    """Learned numbers of the codebook and of the convolutions φ, which stay in float32."""
    sizes = config.tokenizer
    refinement = convolution(sizes.latent_channels, sizes.latent_channels, config.pyramid.latent_grid)
    return sizes.codebook_size * sizes.latent_channels + sizes.residual_convs * refinement.parameters


def decoder_parameters(config: ModelConfig) -> int:
    """Learned numbers of the decoder."""
    return total_parameters(decoder_layers(config.tokenizer, config.pyramid.latent_grid))


def attention_macs(config: ModelConfig, scale: int) -> int:
    """MACs in the attention of one scale, for one image without guidance, as the MVAR paper counts them.

    d·(3·C²·l + 2·C·Σ_q keys(q)): the q, k, v projections, the products q·k and the weighted sum of v. The output
    projection is not among them.
    """
    sizes = config.transformer
    if sizes is None:
        return 0
    pattern, width = config.patterns[scale], sizes.embed_dim
    pairs = pattern.queries * pattern.keys_per_query
    return sizes.depth * (3 * width * width * pattern.queries + 2 * width * pairs)


def scale_macs(config: ModelConfig, scale: int) -> dict[str, int]:
    """MACs of the transformer at one scale by part, for one image without guidance.

    `inputs`: the input projection (the first scale has none). `projections`: q, k, v and attention's output projection.
    `attention`: the products q·k and the weighted sum of v. `mlp`. `head`. The AdaLN vectors, which are made once per
    image, are not among them (`conditioning_macs`).
    """
    sizes = config.transformer
    if sizes is None:
        return dict.fromkeys(("inputs", "projections", "attention", "mlp", "head"), 0)
    pattern, width, tokens = config.patterns[scale], sizes.embed_dim, config.pyramid.grids[scale].tokens
    return {
        "inputs": config.tokenizer.latent_channels * width * tokens if scale else 0,
        "projections": sizes.depth * 4 * width * width * tokens,
        "attention": sizes.depth * 2 * width * pattern.queries * pattern.keys_per_query,
        "mlp": sizes.depth * 2 * width * sizes.hidden_dim * tokens,
        "head": width * config.tokenizer.codebook_size * tokens,
    }


def transformer_macs(config: ModelConfig, scale: int) -> int:
    """All MACs of the transformer at one scale, for one image without guidance: the sum of `scale_macs`."""
    return sum(scale_macs(config, scale).values())


def conditioning_macs(config: ModelConfig) -> int:
    """MACs of the AdaLN projections, and of a vector's own, for one image without guidance."""
    if config.transformer is None:
        return 0
    projections = 1 if config.transformer.shared_adaln else config.transformer.depth
    width = config.transformer.embed_dim
    return ((6 * projections + 2) * width + (config.conditioning.dim or 0)) * width


def decoder_macs(config: ModelConfig) -> int:
    """MACs from tokens to an image: the quantizer's convolutions φ, then the decoder."""
    layers = decoder_layers(config.tokenizer, config.pyramid.latent_grid)
    return config.pyramid.num_scales * quantizer_macs(config) + total_macs(layers)


def quantizer_macs(config: ModelConfig) -> int:
    """MACs of the convolution φ at one scale: all are on the latent grid."""
    channels = config.tokenizer.latent_channels
    return convolution(channels, channels, config.pyramid.latent_grid).macs


def cached_tokens(config: ModelConfig, scale: int) -> int:
    """Tokens whose keys and values are kept once `scale` is done, as the MVAR paper counts them.

    VAR keeps all tokens so far; n scale prefixes keep the last n - 1 scales; n = 1 keeps nothing.
    """
    prefixes = config.attention.scale_prefixes
    first = 0 if prefixes == "all" else max(0, scale - prefixes + 2)
    return sum(grid.tokens for grid in config.pyramid.grids[first : scale + 1])


def kv_cache_bytes(
    config: ModelConfig, batch_size: int, dtype_bytes: int, guided: bool, scale: int | None = None
) -> int:
    """Keys and values kept after `scale`, or the most kept after any scale.

    2·d·C·(cached tokens)·(2B with guidance, else B)·bytes per value.
    """
    sizes = config.transformer
    if sizes is None:
        return 0
    scales = range(config.pyramid.num_scales) if scale is None else (scale,)
    tokens = max(cached_tokens(config, index) for index in scales)
    return key_value_bytes_per_token(sizes, dtype_bytes) * tokens * rows(batch_size, guided)


def key_value_bytes_per_token(sizes: TransformerConfig, dtype_bytes: int) -> int:
    """Bytes of one token's keys and values in all blocks."""
    return 2 * sizes.depth * sizes.embed_dim * dtype_bytes


def rows(batch_size: int, guided: bool) -> int:
    """Rows that the transformer processes for `batch_size` images: guidance doubles them."""
    return 2 * batch_size if guided else batch_size
