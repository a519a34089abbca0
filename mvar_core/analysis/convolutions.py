"""The tokenizer's convolutional encoder and decoder as lists of layers: parameters and MACs; no torch."""

from __future__ import annotations

from typing import NamedTuple

from mvar_core.config import TokenizerConfig
from mvar_core.pyramid import Grid


class Layer(NamedTuple):
    """What one layer costs for one image.

    Attributes:
        parameters: Learned numbers.
        macs: Multiply-accumulates.
        outputs: Numbers in the layer's output.
    """

    parameters: int
    macs: int
    outputs: int


def total_parameters(layers: list[Layer]) -> int:
    """Learned numbers of all layers."""
    return sum(layer.parameters for layer in layers)


def total_macs(layers: list[Layer]) -> int:
    """Multiply-accumulates of all layers, for one image."""
    return sum(layer.macs for layer in layers)


def encoder_layers(config: TokenizerConfig, image: Grid) -> list[Layer]:
    """Layers from an image of `image` pixels to the features before quantization, in the order they run."""
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    grid, channels = image, config.base_channels
    layers = [convolution(3, channels, grid)]
    for level, width in enumerate(widths):
        is_last = level == len(widths) - 1
        attentions = config.encoder_blocks if is_last and config.attention else 0
        layers += _stage(channels, width, config.encoder_blocks, attentions, grid)
        channels = width
        if not is_last:
            grid = Grid(grid.height // 2, grid.width // 2)
            layers.append(convolution(width, width, grid))
    layers += _middle(config, channels, grid)
    layers += [_norm(channels, grid), convolution(channels, config.latent_channels, grid)]
    layers.append(convolution(config.latent_channels, config.latent_channels, grid))
    return layers


def decoder_layers(config: TokenizerConfig, latent: Grid) -> list[Layer]:
    """Layers from quantized features on `latent` to an image, in the order they run."""
    widths = [config.base_channels * multiplier for multiplier in reversed(config.channel_multipliers)]
    grid, channels = latent, widths[0]
    layers = [convolution(config.latent_channels, config.latent_channels, grid)]
    layers.append(convolution(config.latent_channels, channels, grid))
    layers += _middle(config, channels, grid)
    for level, width in enumerate(widths):
        attentions = config.decoder_blocks if level == 0 and config.attention else 0
        layers += _stage(channels, width, config.decoder_blocks, attentions, grid)
        channels = width
        if level < len(widths) - 1:
            grid = Grid(grid.height * 2, grid.width * 2)
            layers.append(convolution(width, width, grid))
    layers += [_norm(channels, grid), convolution(channels, 3, grid)]
    return layers


def convolution(in_channels: int, out_channels: int, grid: Grid, kernel: int = 3) -> Layer:
    """A convolution with bias whose output is on `grid`; borders are counted like the inside."""
    weights = kernel * kernel * in_channels * out_channels
    return Layer(weights + out_channels, weights * grid.tokens, out_channels * grid.tokens)


def _norm(channels: int, grid: Grid) -> Layer:
    return Layer(2 * channels, 0, channels * grid.tokens)


def _residual_block(in_channels: int, out_channels: int, grid: Grid) -> list[Layer]:
    layers = [_norm(in_channels, grid), convolution(in_channels, out_channels, grid)]
    layers += [_norm(out_channels, grid), convolution(out_channels, out_channels, grid)]
    if in_channels != out_channels:
        layers.append(convolution(in_channels, out_channels, grid, kernel=1))
    return layers


def _attention(channels: int, grid: Grid) -> list[Layer]:
    mixing = Layer(0, 2 * grid.tokens * grid.tokens * channels, channels * grid.tokens)
    projections = [convolution(channels, 3 * channels, grid, kernel=1), convolution(channels, channels, grid, kernel=1)]
    return [_norm(channels, grid), *projections, mixing]


def _stage(in_channels: int, out_channels: int, blocks: int, attentions: int, grid: Grid) -> list[Layer]:
    layers = []
    for index in range(blocks):
        layers += _residual_block(out_channels if index else in_channels, out_channels, grid)
    for _ in range(attentions):
        layers += _attention(out_channels, grid)
    return layers


def _middle(config: TokenizerConfig, channels: int, grid: Grid) -> list[Layer]:
    attentions = config.middle_blocks - 1 if config.attention else 0
    return _stage(channels, channels, config.middle_blocks, attentions, grid)
