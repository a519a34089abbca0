"""The multi-scale residual quantizer: features to a pyramid of token maps and back (VAR, algorithms 1 and 2).

A scale's tokens name codebook entries; upsampled to the full latent grid and refined by a shared convolution φ they are
added to f̂, the running reconstruction of the features. The input of the next scale is f̂ downsampled to its grid, so it
is a function of the token maps so far and of nothing else.
"""

# Shape suffixes: B batch, L tokens of all scales, l tokens of one scale, N vectors, V codebook entries,
# Z latent channels, h w the latent grid, y x the grid of one scale.

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mvar_core.config import TokenizerConfig
from mvar_core.pyramid import Grid, ScalePyramid


class QuantizerOutput(NamedTuple):
    """What one training pass returns: f̂ with the gradient of the features, the loss averaged over scales, tokens."""

    features_BZhw: Tensor
    loss: Tensor
    tokens_BL: Tensor


class ResidualConv(nn.Module):
    """φ(x) = (1 - ratio)·x + ratio·conv3×3(x)."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, x_BZhw: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B Z h w"]:
        """Refine an upsampled token map."""
        refined = self.conv(x_BZhw)
        return x_BZhw * (1 - self.ratio) + refined * self.ratio


def downsample(x_BZhw: Float[Tensor, "B Z h w"], grid: Grid) -> Float[Tensor, "B Z y x"]:
    """Area interpolation to a scale's grid; the identity where the sizes agree."""
    return x_BZhw if x_BZhw.shape[-2:] == tuple(grid) else F.interpolate(x_BZhw, size=tuple(grid), mode="area")


def upsample(x_BZyx: Float[Tensor, "B Z y x"], grid: Grid) -> Float[Tensor, "B Z h w"]:
    """Bicubic interpolation to the latent grid; the identity where the sizes agree."""
    if x_BZyx.shape[-2:] == tuple(grid):
        return x_BZyx
    return F.interpolate(x_BZyx, size=tuple(grid), mode="bicubic", align_corners=False)


class MultiScaleQuantizer(nn.Module):
    """Codebook, shared convolutions and the residual recursion over scales."""

    def __init__(self, config: TokenizerConfig, pyramid: ScalePyramid):
        super().__init__()
        self.pyramid = pyramid
        size = config.codebook_size
        self.codebook = nn.Parameter(torch.empty(size, config.latent_channels).uniform_(-1 / size, 1 / size))
        self.residual_convs = nn.ModuleList(
            ResidualConv(config.latent_channels, config.residual_ratio) for _ in range(config.residual_convs)
        )

    def nearest(self, vectors_NZ: Float[Tensor, "N Z"]) -> Int[Tensor, " N"]:
        """Index of the codebook entry nearest to each vector by squared Euclidean distance."""
        # |x|² is the same for all entries of a row, so the order follows from |e|² - 2x·e.
        distances_NV = torch.addmm(self.codebook.square().sum(1), vectors_NZ, self.codebook.T, alpha=-2)
        return distances_NV.argmin(dim=1)

    def embed(self, tokens_Bl: Int[Tensor, "B l"]) -> Float[Tensor, "B l Z"]:
        """Codebook entries of tokens."""
        return F.embedding(tokens_Bl, self.codebook)

    def increment(self, embeddings_BlZ: Float[Tensor, "B l Z"], scale: int) -> Float[Tensor, "B Z h w"]:
        """What one scale's token embeddings add to f̂: upsampled, then refined by the scale's φ."""
        grid = self.pyramid.grids[scale]
        map_BZyx = embeddings_BlZ.transpose(1, 2).unflatten(2, tuple(grid))
        index = self.pyramid.residual_conv_index(scale, len(self.residual_convs))
        return self.residual_convs[index](upsample(map_BZyx, self.pyramid.latent_grid))

    def scale_input(self, fhat_BZhw: Float[Tensor, "B Z h w"], scale: int) -> Float[Tensor, "B l Z"]:
        """The transformer's input at `scale`: f̂ of all earlier scales, downsampled to the scale's grid."""
        return downsample(fhat_BZhw, self.pyramid.grids[scale]).flatten(2).transpose(1, 2)

    def empty_features(self, batch: int) -> Float[Tensor, "B Z h w"]:
        """f̂ before the first scale: zeros."""
        return self.codebook.new_zeros(batch, self.codebook.shape[1], *self.pyramid.latent_grid)

    @torch.no_grad()
    def encode(self, features_BZhw: Float[Tensor, "B Z h w"]) -> Int[Tensor, "B L"]:
        """Tokens of all scales, coarse to fine: each names what the scales before it left over."""
        return torch.cat([tokens_Bl for tokens_Bl, _ in self._residuals(features_BZhw)], dim=1)

    @torch.no_grad()
    def residual_vectors(self, features_BZhw: Float[Tensor, "B Z h w"]) -> list[Float[Tensor, "N Z"]]:
        """The vectors that each scale quantizes, one (B·l, Z) tensor per scale."""
        return [vectors_NZ for _, vectors_NZ in self._residuals(features_BZhw)]

    def _residuals(self, features_BZhw: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rest_BZhw = features_BZhw.to(self.codebook.dtype)
        for scale in range(self.pyramid.num_scales):
            tokens_Bl, vectors_NZ = self._quantize(rest_BZhw, scale)
            yield tokens_Bl, vectors_NZ
            rest_BZhw = rest_BZhw - self.increment(self.embed(tokens_Bl), scale)

    @torch.no_grad()
    def _quantize(self, rest_BZhw: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """A scale's tokens (B, l), and the vectors (B·l, Z) whose nearest codebook entries they are."""
        vectors_NZ = downsample(rest_BZhw, self.pyramid.grids[scale]).permute(0, 2, 3, 1).flatten(0, 2)
        return self.nearest(vectors_NZ).unflatten(0, (rest_BZhw.shape[0], -1)), vectors_NZ

    def partial_features(self, tokens_BL: Int[Tensor, "B L"]) -> Iterator[Float[Tensor, "B Z h w"]]:
        """f̂ of the first scale, of the first two, and so on to all."""
        fhat_BZhw = self.empty_features(tokens_BL.shape[0])
        for scale, span in enumerate(self.pyramid.spans):
            fhat_BZhw = fhat_BZhw + self.increment(self.embed(tokens_BL[:, span]), scale)
            yield fhat_BZhw

    def decode(self, tokens_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B Z h w"]:
        """f̂ of the tokens of all scales."""
        return deque(self.partial_features(tokens_BL), maxlen=1).pop()

    def teacher_forcing_inputs(self, tokens_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B l Z"]:
        """Transformer inputs (B, L - l₁, Z) of scales 2 … S given the true tokens; scale 1 has the condition alone."""
        inputs = [self.codebook.new_empty(tokens_BL.shape[0], 0, self.codebook.shape[1])]
        for scale, fhat_BZhw in zip(range(1, self.pyramid.num_scales), self.partial_features(tokens_BL), strict=False):
            inputs.append(self.scale_input(fhat_BZhw, scale))
        return torch.cat(inputs, dim=1)

    def forward(
        self,
        features_BZhw: Float[Tensor, "B Z h w"],
        commitment: float = 0.25,
        shown_scales_B: Int[Tensor, " B"] | None = None,
    ) -> QuantizerOutput:
        """Quantize the encoder's features f for training.

        The loss is the mean over scales of commitment·‖sg(f̂_s) - f‖² + ‖f̂_s - sg(f)‖², each a mean over elements.
        `shown_scales_B` is how many of the first scales each image's returned f̂ sums, all by default; loss and tokens
        are of all scales in any case.
        """
        target_BZhw = features_BZhw.detach()
        fhat_BZhw = shown_BZhw = torch.zeros_like(target_BZhw)
        loss, tokens = features_BZhw.new_zeros(()), []
        for scale in range(self.pyramid.num_scales):
            tokens_Bl, _ = self._quantize(target_BZhw - fhat_BZhw.detach(), scale)
            tokens.append(tokens_Bl)
            fhat_BZhw = fhat_BZhw + self.increment(self.embed(tokens_Bl), scale)
            loss = loss + commitment * F.mse_loss(features_BZhw, fhat_BZhw.detach())
            loss = loss + F.mse_loss(fhat_BZhw, target_BZhw)
            if shown_scales_B is None:
                shown_BZhw = fhat_BZhw
            else:
                shown_BZhw = torch.where((shown_scales_B > scale).view(-1, 1, 1, 1), fhat_BZhw, shown_BZhw)
        straight_through = features_BZhw + (shown_BZhw - features_BZhw).detach()
        return QuantizerOutput(straight_through, loss / self.pyramid.num_scales, torch.cat(tokens, dim=1))
