"""The multi-scale VQVAE: a VQGAN convolutional encoder and decoder around the residual quantizer."""

# Shape suffixes: B batch, C channels, H W pixels, L tokens of all scales, Z latent channels, h w the latent grid.

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mvar_core.config import TokenizerConfig
from mvar_core.models.quantizer import MultiScaleQuantizer, ResidualConv
from mvar_core.pyramid import Grid, ScalePyramid


class TokenizerOutput(NamedTuple):
    """What one training pass returns: the reconstruction, not clamped, the quantizer's loss and the tokens."""

    images_BCHW: Tensor
    quantizer_loss: Tensor
    tokens_BL: Tensor


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU, 3×3 convolution, added to the input, which a 1×1 convolution fits to a new width."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = _conv(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv2 = _conv(out_channels, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else _conv(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Refine a feature map."""
        h_BCHW = x_BCHW
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            # One name, so that each map is freed as soon as the next is there.
            h_BCHW = norm(h_BCHW)
            h_BCHW = F.silu(h_BCHW)
            h_BCHW = conv(h_BCHW)
        return self.shortcut(x_BCHW) + h_BCHW


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, added to it."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.qkv = _conv(channels, 3 * channels, 1)
        self.projection = _conv(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Mix positions."""
        q, k, v = self.qkv(self.norm(x_BCHW)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x_BCHW.shape[2:])
        return x_BCHW + self.projection(mixed)


class Downsample(nn.Module):
    """Halve height and width: pad one row below and one column to the right, then a 3×3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Halve a feature map."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Double a feature map."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks at one resolution, each followed by attention where there is any, then a change of resolution."""

    def __init__(
        self,
        config: TokenizerConfig,
        in_channels: int,
        out_channels: int,
        blocks: int,
        attentions: int = 0,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        groups, attentions = config.norm_groups, attentions if config.attention else 0
        self.blocks = nn.ModuleList(
            ResidualBlock(out_channels if index else in_channels, out_channels, groups) for index in range(blocks)
        )
        self.attentions = nn.ModuleList(SpatialAttention(out_channels, groups) for _ in range(attentions))
        self.resample = nn.Identity() if resample is None else resample

    @classmethod
    def middle(cls, config: TokenizerConfig, channels: int) -> Stage:
        """The stage between the levels and the latent features."""
        return cls(config, channels, channels, config.middle_blocks, config.middle_blocks - 1)

    @classmethod
    def levels(
        cls, config: TokenizerConfig, widths: list[int], blocks: int, coarsest: int, resample: type[nn.Module]
    ) -> nn.ModuleList:
        """Stages of widths[1:], with attention at the coarsest level and a change of resolution between two levels."""
        levels = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise(widths)):
            attentions = blocks if level == coarsest else 0
            between = resample(width) if level < len(widths) - 2 else None
            levels.append(cls(config, before, width, blocks, attentions, between))
        return levels

    def parts(self) -> Iterator[nn.Module]:
        """What a feature map goes through, one after the other."""
        for index, block in enumerate(self.blocks):
            yield block
            if index < len(self.attentions):
                yield self.attentions[index]
        yield self.resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Refine a feature map, then change its resolution."""
        for part in self.parts():
            x_BCHW = part(x_BCHW)
        return x_BCHW


class Encoder(nn.Module):
    """Images to features, halving the resolution between levels."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in (1, *config.channel_multipliers)]
        self.input_conv = _conv(3, widths[0])
        self.levels = Stage.levels(config, widths, config.encoder_blocks, len(widths) - 2, Downsample)
        self.middle = Stage.middle(config, widths[-1])
        self.output_norm = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.output_conv = _conv(widths[-1], config.latent_channels)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, Z, h, w) of images (B, 3, H, W) in [-1, 1]."""
        x_BCHW = self.input_conv(images_BCHW)
        for level in self.levels:
            x_BCHW = level(x_BCHW)
        x_BCHW = self.middle(x_BCHW)
        return self.output_conv(F.silu(self.output_norm(x_BCHW)))


class Decoder(nn.Module):
    """Features to images, doubling the resolution between levels; levels stand in the order they run, coarse first."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        multipliers = config.channel_multipliers[::-1]
        widths = [config.base_channels * multiplier for multiplier in (multipliers[0], *multipliers)]
        self.input_conv = _conv(config.latent_channels, widths[0])
        self.middle = Stage.middle(config, widths[0])
        self.levels = Stage.levels(config, widths, config.decoder_blocks, 0, Upsample)
        self.output_norm = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.output_conv = _conv(widths[-1], 3)

    def forward(self, features_BZhw: Tensor) -> Tensor:
        """Images (B, 3, H, W), not clamped, of features (B, Z, h, w)."""
        # Part by part, since a call of a whole stage would keep the stage's input alive until its end.
        for part in self.parts():
            features_BZhw = part(features_BZhw)
        return features_BZhw

    def parts(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What features go through, one after the other; the memory and the operations of decoding follow from it."""
        yield self.input_conv
        for stage in (self.middle, *cast("list[Stage]", list(self.levels))):
            yield from stage.parts()
        yield from (self.output_norm, F.silu, self.output_conv)

    def macs(self, grid: Grid) -> int:
        """Multiply-accumulates of decoding features on `grid`; borders count like the inside."""
        macs = 0
        for part in self.parts():
            if isinstance(part, Upsample):
                grid = Grid(2 * grid.height, 2 * grid.width)
            if isinstance(part, SpatialAttention):
                macs += 2 * grid.tokens**2 * part.projection.out_channels
            if isinstance(part, nn.Module):
                weights = sum(module.weight.numel() for module in part.modules() if isinstance(module, nn.Conv2d))
                macs += weights * grid.tokens
        return macs


class VQVAE(nn.Module):
    """The tokenizer: images in [-1, 1] to a pyramid of tokens and back.

    The convolutions may run in a half type; the quantizer and f̂ stay in float32 (see `to_compute_dtype`).
    """

    def __init__(self, config: TokenizerConfig, pyramid: ScalePyramid):
        super().__init__()
        self.encoder = Encoder(config)
        self.quantizer_conv = _conv(config.latent_channels, config.latent_channels)
        self.quantizer = MultiScaleQuantizer(config, pyramid)
        self.decoder_conv = _conv(config.latent_channels, config.latent_channels)
        self.decoder = Decoder(config)

    def drop_encoder(self) -> VQVAE:
        """Remove what only encoding needs."""
        del self.encoder, self.quantizer_conv
        return self

    @property
    def has_encoder(self) -> bool:
        """Whether images can be encoded."""
        return hasattr(self, "encoder")

    def to_compute_dtype(self, dtype: torch.dtype) -> VQVAE:
        """Hold the convolutions in `dtype`, channels last, and the quantizer in float32."""
        self.to(dtype)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.quantizer.to(torch.float32)
        return self

    def encode_features(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B Z h w"]:
        """Features before quantization, of images in [-1, 1]."""
        weight = self.encoder.input_conv.weight
        features_BZhw: Tensor = self.quantizer_conv(self.encoder(images_BCHW.to(weight.dtype)))
        return features_BZhw.to(self.quantizer.codebook.dtype)

    def decode_features(self, features_BZhw: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images of quantized features f̂, not clamped, in float32 or the quantizer's dtype."""
        features = features_BZhw.to(self.decoder_conv.weight.dtype)
        images_BCHW: Tensor = self.decoder(self.decoder_conv(features))
        return images_BCHW.to(features_BZhw.dtype)

    def decoding_macs(self) -> dict[str, int]:
        """Multiply-accumulates from the tokens of one image to its pixels: the `quantizer`'s φ, and the `decoder`."""
        grid, scales = self.quantizer.pyramid.latent_grid, self.quantizer.pyramid.num_scales
        refinement = cast("ResidualConv", self.quantizer.residual_convs[0]).conv.weight.numel()
        return {
            "quantizer": scales * refinement * grid.tokens,
            "decoder": self.decoder_conv.weight.numel() * grid.tokens + self.decoder.macs(grid),
        }

    @torch.no_grad()
    def encode(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B L"]:
        """Tokens of all scales, coarse to fine, of images in [-1, 1]."""
        return self.quantizer.encode(self.encode_features(images_BCHW))

    @torch.no_grad()
    def decode(self, tokens_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B 3 H W"]:
        """Images, clamped to [-1, 1], of the tokens of all scales."""
        return self.decode_features(self.quantizer.decode(tokens_BL)).clamp(-1, 1)

    def forward(
        self,
        images_BCHW: Float[Tensor, "B 3 H W"],
        commitment: float = 0.25,
        shown_scales_B: Int[Tensor, " B"] | None = None,
    ) -> TokenizerOutput:
        """Reconstruct images in [-1, 1] for training; the other arguments are the quantizer's."""
        features_BZhw = self.encode_features(images_BCHW)
        # Nearest neighbours and f̂ want float32 also where the convolutions run under autocast.
        with torch.autocast(features_BZhw.device.type, enabled=False):
            quantized = self.quantizer(features_BZhw, commitment, shown_scales_B)
        return TokenizerOutput(self.decode_features(quantized.features_BZhw), quantized.loss, quantized.tokens_BL)
