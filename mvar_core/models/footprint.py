"""How much memory sampling needs, part by part, by formula.

The sampler chooses its micro-batches from these figures, and `mvar plan` predicts with them. They follow what the code
allocates, tensor by tensor, and count what lives together, with the scratch space that kernels take from torch's
allocator; not what libraries and allocators hold for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from mvar_core.config import ModelConfig, SamplingConfig, TokenizerConfig
from mvar_core.kernels.tiled import PIECE_ELEMENTS
from mvar_core.models.linear import SMALLEST_ROWS
from mvar_core.models.meta import meta_device
from mvar_core.models.vqvae import Decoder, ResidualBlock, SpatialAttention, Upsample
from mvar_core.pyramid import Grid

FLOAT32 = 4
FLOAT64 = INT64 = 8

DIRECT_CONVOLUTION = 20480
"""Values of one float32 image up to which torch convolves on a CPU through a matrix of all neighbourhoods."""


@dataclass(frozen=True)
class Setting:
    """What the memory of sampling depends on, apart from the model and the number of images.

    The compute dtype has `dtype_bytes`; with `keep_stages` f̂ is kept after every scale, and decoded. CPUs without a
    `bfloat16_unit` compute GELU after the product, and convolve through a matrix of all neighbourhoods.
    """

    dtype_bytes: int = 4
    sampling: SamplingConfig = SamplingConfig(top_k=0, top_p=0)
    device: str = "cpu"
    keep_stages: bool = False
    bfloat16_unit: bool = True

    @property
    def guided(self) -> bool:
        """Whether the unconditional half runs too."""
        return self.sampling.guided


def image_bytes(config: ModelConfig, keep_stages: bool = False) -> int:
    """Bytes of one image that live from scale to scale: f̂, tokens and random numbers; without keys and values."""
    pyramid = config.pyramid  # stages are kept after every scale, and at the end once more, in one tensor
    return fhat_bytes(config) * (1 + keep_stages * 2 * pyramid.num_scales) + pyramid.num_tokens * (INT64 + FLOAT64)


def output_bytes(config: ModelConfig, setting: Setting) -> int:
    """Bytes of one image that live while images are decoded: f̂, tokens and, on a CPU, pixels."""
    stages = config.pyramid.num_scales if setting.keep_stages else 0
    height, width = config.image_shape
    pixels = 3 * height * width * (1 + stages) if setting.device == "cpu" else 0
    return fhat_bytes(config) * (1 + stages) + config.pyramid.num_tokens * INT64 + pixels


def fhat_bytes(config: ModelConfig) -> int:
    """Bytes of one image's f̂."""
    return config.tokenizer.latent_channels * config.pyramid.latent_grid.tokens * FLOAT32


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


def classes_bytes(config: ModelConfig, images: int, setting: Setting) -> int:
    """Bytes of AdaLN vectors and embeddings of all conditions, where images have as many as there can be."""
    sizes = config.transformer
    if sizes is None:
        return 0
    most = config.most_conditions
    classes = (images if most is None else min(images, most)) + setting.guided
    if setting.device == "cpu":
        classes = max(classes, SMALLEST_ROWS)
    return classes * sizes.embed_dim * ((6 * sizes.depth + 1) * setting.dtype_bytes + 2 * FLOAT32)


def scale_bytes(config: ModelConfig, scale: int, setting: Setting, images: int = 1, *, whole: bool = False) -> int:
    """Bytes of the activations of a micro-batch of `images` at the widest moment of a scale.

    Where all images run in one pass (`whole`), cached keys are read where they lie.
    """
    sizes = config.transformer
    if sizes is None:
        return 0
    pattern, each = config.patterns[scale], setting.dtype_bytes
    width, hidden, tokens = sizes.embed_dim, sizes.hidden_dim, pattern.queries
    latents, codes = config.tokenizer.latent_channels, config.tokenizer.codebook_size
    half, guided = each < FLOAT32, setting.guided and scale > 0
    # The first scale is never guided; its unconditional half runs where later scales need its keys.
    halves = 2 if setting.guided and (scale > 0 or reuses_keys(config)) else 1
    row, values = halves * width, halves * width * tokens

    # A block's attention, for all images. The stream, its modulated norm, q k v as projected; q as normalised while k
    # is: in float32, copied where it comes in another dtype.
    attention = 5 * images * values * each
    normalising = normalised = copies = 0
    if sizes.l2_attention:
        normalising = images * values * (each + FLOAT32 + (FLOAT32 if half else 0))
        normalised = 2 * images * values * each
    if pattern.prefix_tokens:  # keys and values of earlier scales, read from the cache and laid before the own
        copies = 2 * images * row * each * (pattern.keys + (0 if whole else pattern.prefix_tokens))
    if pattern.is_windowed:
        # Where tiles are chosen: copies of queries, keys and values, with earlier scales' before them, and outputs;
        # as measured a quarter more than a piece is meant to have, for halos and masks.
        tiles = images * (4 * values + (2 * row * pattern.keys if pattern.prefix_tokens else 0))
        copies += min(tiles, 5 * PIECE_ELEMENTS // 4) * each
    output = images * values * each
    attention += max(normalising, normalised + output + max(copies, output))

    # A block's MLP, for one image: the stream before and after attention, attention's branch, the modulated norm. On a
    # CPU that computes in bfloat16, GELU is computed inside the product.
    fused = setting.device == "cpu" and each == 2 and setting.bfloat16_unit
    mlp = halves * tokens * each * (4 * width + hidden + max(width, 0 if fused else hidden))

    # Behind the blocks, for one image: the head's norm and modulated norm, and the stream in float32 where it is in
    # another dtype; or the product, of the modulated norm of both halves and the guided one; or sampling from the
    # logits; or what the tokens add to f̂.
    head_values = tokens * width * (halves if scale else 1)
    logits = tokens * codes * FLOAT32
    norm = head_values * FLOAT32 * (3 if half else 2)
    product = head_values * FLOAT32 + (head_values // 2 * FLOAT32 if guided else 0) + logits
    scratch = _convolution_scratch(latents, latents, config.pyramid.latent_grid, FLOAT32, setting)
    increment = logits + 2 * fhat_bytes(config) + scratch
    head = values * each + max(norm, product, logits + tokens * drawing_bytes(codes, setting), increment)

    # AdaLN vectors of a block laid out for the rows, and the scale's inputs as they come and for both halves.
    laid_out = 6 * row * each
    inputs = latents * FLOAT32 * tokens * (1 + halves) if scale else 0
    return images * inputs + max(images * laid_out + attention, images * (laid_out + mlp), images * head)


def drawing_bytes(codes: int, setting: Setting) -> int:
    """Bytes that sampling one token needs besides the logits: codes in order, and two float64 rows of them."""
    limited, nucleus = 0 < setting.sampling.top_k < codes, 0 < setting.sampling.top_p < 1
    kept = setting.sampling.top_k + 1 if limited else codes
    ordered = FLOAT32 + INT64 if limited or nucleus else 0
    return kept * (ordered + 2 * FLOAT64)


def decoder_bytes(config: ModelConfig, setting: Setting) -> int:
    """Bytes of one image's widest moment in the decoder, part by part, or in the conversion to pixels."""
    bytes_each, grid = setting.dtype_bytes, config.pyramid.latent_grid
    height, width = config.image_shape
    # The image as decoded, as float32, and twice more on its way to bytes.
    widest = 3 * height * width * ((bytes_each if bytes_each < FLOAT32 else 0) + 3 * FLOAT32)

    def need(channels: int, scratch: int = 0) -> None:
        nonlocal widest
        widest = max(widest, channels * grid.tokens * bytes_each + scratch)

    def convolve(convolution: nn.Conv2d, others: int = 0) -> None:
        """A convolution, while so many other channels live next to its input and output."""
        inputs, outputs, kernel = convolution.in_channels, convolution.out_channels, convolution.kernel_size[0]
        scratch = _convolution_scratch(inputs, outputs, grid, bytes_each, setting, kernel)
        need(others + inputs + outputs, scratch)

    for part in _decoder(config.tokenizer).parts():
        if isinstance(part, nn.Conv2d):
            convolve(part)
        elif isinstance(part, ResidualBlock):
            inputs, outputs = part.conv1.in_channels, part.conv1.out_channels
            need(max(3 * inputs, inputs + 2 * outputs))  # a norm and its activation next to the input
            convolve(part.conv1, inputs)
            convolve(part.conv2, inputs)
            if isinstance(part.shortcut, nn.Conv2d):
                convolve(part.shortcut, outputs)
                inputs += outputs
            need(inputs + 2 * outputs)  # the input, also projected; what is added to it; and the sum
        elif isinstance(part, SpatialAttention):
            need(6 * part.projection.out_channels)  # input, q k v as the kernel reads them, output
        elif isinstance(part, Upsample):
            grid = Grid(2 * grid.height, 2 * grid.width)
            convolve(part.conv, part.conv.in_channels // 4)
    return widest


@lru_cache(maxsize=16)
def _decoder(config: TokenizerConfig) -> Decoder:
    with meta_device():
        return Decoder(config)


def _convolution_scratch(
    inputs: int, outputs: int, grid: Grid, bytes_each: int, setting: Setting, kernel: int = 3
) -> int:
    """Scratch space of a convolution of one image."""
    if setting.device != "cpu":
        return 0
    through_matrix = inputs * grid.tokens <= DIRECT_CONVOLUTION if bytes_each == FLOAT32 else not setting.bfloat16_unit
    if through_matrix:
        return kernel * kernel * inputs * grid.tokens * bytes_each if kernel > 1 else 0
    return kernel * kernel * inputs * outputs * bytes_each  # the weights in the kernel's order
