"""Measures of a tokenizer: how well it reconstructs held-out images, and how it uses its codes."""

# Shape suffixes: B batch, C channels, H W pixels, S scales, V codebook entries.

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.models.vqvae import VQVAE
from mvar_core.training.codebook import count_codes, perplexity

_MEASURED_IMAGES = 2048


class ImageBatchSource(Protocol):
    """Images to train on, with whatever views of them there are."""

    def __len__(self) -> int:
        """Rows: images times views."""
        ...

    def batch(self, rows: np.ndarray, step: int = 0) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of rows, float32; what is drawn at random, as crops, is the step's."""
        ...


@dataclass(frozen=True)
class TokenizerMeasures:
    """How well a tokenizer reconstructs, and how it uses its codes.

    Attributes:
        psnr: Mean over images, in dB, on clamped reconstructions.
        usage_per_scale: Part of the codebook that each scale uses.
        perplexity_per_scale: How many codes each scale uses as if evenly.
        code_usage: Part of the codebook that some scale uses.
        images: How many images were measured.
        psnr_by_scales: Mean PSNR of what the first scale, the first two, … decode to; empty where not asked for.
    """

    psnr: float
    usage_per_scale: tuple[float, ...]
    perplexity_per_scale: tuple[float, ...]
    code_usage: float
    images: int
    psnr_by_scales: tuple[float, ...] = ()


def psnr(images: Float[Tensor, "B C H W"], others: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each pair, in dB, for images in [-1, 1]."""
    errors_B = (images - others).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / errors_B.clamp_min(1e-12))


@torch.no_grad()
def measure_tokenizer(
    vqvae: VQVAE,
    images: ImageBatchSource,
    *,
    batch_size: int = 64,
    limit: int = _MEASURED_IMAGES,
    by_scales: bool = False,
) -> TokenizerMeasures:
    """Reconstruct up to `limit` images, evenly spread over the source, and count what they use.

    Args:
        vqvae: The tokenizer.
        images: Where the images come from.
        batch_size: Images at a time.
        limit: How many images at most.
        by_scales: Also decode from the first scale alone, the first two, …

    Raises:
        DataError: There are no images.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(np.int64))
    if len(rows) == 0:
        raise DataError("There are no images to measure the tokenizer on.")
    codebook = vqvae.quantizer.codebook
    pyramid, codes = vqvae.quantizer.pyramid, codebook.shape[0]
    counts_SV = torch.zeros(pyramid.num_scales, codes, dtype=torch.long, device=codebook.device)
    ratios, partial = [], []
    for start in range(0, len(rows), batch_size):
        images_BCHW = images.batch(rows[start : start + batch_size]).to(codebook.device)
        tokens_BL = vqvae.encode(images_BCHW)
        ratios.append(psnr(vqvae.decode(tokens_BL).float(), images_BCHW))
        counts_SV += count_codes(tokens_BL, pyramid, codes)
        if by_scales:
            partial.append(_psnr_by_scales(vqvae, tokens_BL, images_BCHW))
    return TokenizerMeasures(
        psnr=float(torch.cat(ratios).mean()),
        usage_per_scale=tuple((counts_SV > 0).double().mean(dim=1).tolist()),
        perplexity_per_scale=tuple(perplexity(counts_SV).tolist()),
        code_usage=float((counts_SV.sum(dim=0) > 0).double().mean()),
        images=len(rows),
        psnr_by_scales=tuple(torch.cat(partial).mean(dim=0).tolist()) if by_scales else (),
    )


def _psnr_by_scales(vqvae: VQVAE, tokens_BL: Tensor, images_BCHW: Tensor) -> Tensor:
    """(B, S): of images decoded from their first 1, 2, … S scales."""
    quantizer = vqvae.quantizer
    fhat_BZhw = quantizer.empty_features(len(tokens_BL))
    ratios = []
    for scale, span in enumerate(quantizer.pyramid.spans):
        fhat_BZhw = fhat_BZhw + quantizer.increment(quantizer.embed(tokens_BL[:, span]), scale)
        ratios.append(psnr(vqvae.decode_features(fhat_BZhw).clamp(-1, 1).float(), images_BCHW))
    return torch.stack(ratios, dim=1)
