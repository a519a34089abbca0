"""How well a tokenizer reconstructs images: PSNR, SSIM, and how much of its codebook it uses.

Letters: B batch, H, W height and width in pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.features import check_images, described

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
PEAK = 255.0


def ssim(originals: UInt8[Tensor, "B 3 H W"], reconstructions: UInt8[Tensor, "B 3 H W"]) -> Float64[Tensor, " B"]:
    """Structural similarity of each pair of images, 1 where they are equal (Wang et al. 2004, equation 13).

    Gaussian window of 11×11 pixels, standard deviation 1.5, only where it lies whole within the image; K1 = 0.01,
    K2 = 0.03, range 255; population (not sample) variances; the mean over positions and the three channels, each
    compared by itself, in float64. Implementations that pad the border, or compare luminance only, differ.

    DataError for what is not uint8 RGB images of one shape, and for images smaller than the window.
    """
    _check_pair(originals, reconstructions)
    if min(originals.shape[2:]) < SSIM_WINDOW:
        raise DataError(
            f"SSIM needs images of at least {SSIM_WINDOW}×{SSIM_WINDOW} pixels, found {tuple(originals.shape[2:])}."
        )
    x, y = originals.double(), reconstructions.double()
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()

    def blur(images: Tensor) -> Tensor:
        flat = images.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, weights[None, None, :, None]), weights[None, None, None, :])

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * PEAK) ** 2, (SSIM_K2 * PEAK) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.flatten(1).mean(dim=1).unflatten(0, (len(originals), 3)).mean(dim=1)


class ReconstructionMeter:
    """PSNR, SSIM and codebook usage of images that arrive in batches, of which nothing else is kept.

    `spans` are where each scale's tokens are in the sequence of L tokens.
    """

    def __init__(self, spans: Sequence[slice], codebook_size: int):
        self._spans = tuple(spans)
        self._used = torch.zeros(len(self._spans), codebook_size, dtype=torch.bool)
        self._ratios: list[Tensor] = []
        self._similarities: list[Tensor] = []

    def update(
        self,
        originals: UInt8[Tensor, "B 3 H W"],
        reconstructions: UInt8[Tensor, "B 3 H W"],
        tokens: Int64[Tensor, "B L"],
    ) -> None:
        """Add a batch: images, what the tokenizer makes of them, and the codes between the two.

        DataError where images do not match, or tokens do not fit the pyramid or the codebook.
        """
        _check_pair(originals, reconstructions)
        expected = (len(originals), self._spans[-1].stop)
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.shape != expected:
            raise DataError(f"Tokens are {described(tokens)}; expected int64 {expected}.")
        codes = self._used.shape[1]
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < codes:
            raise DataError(f"Tokens run from {int(tokens.min())} to {int(tokens.max())}; expected 0 to {codes - 1}.")
        error = (originals.double() - reconstructions.double()).square().flatten(1).mean(dim=1)
        self._ratios.append((10 * torch.log10(PEAK**2 / error)).cpu())
        self._similarities.append(ssim(originals, reconstructions).cpu())
        for used, span in zip(self._used, self._spans, strict=True):
            used[tokens[:, span].unique().cpu()] = True

    def result(self) -> dict[str, Any]:
        """`psnr`, `ssim`, `usage_per_scale` and `code_usage` (by any scale) of so many `images`; DataError for none.

        `psnr` is the mean over the images of each one's own ratio in dB, which is more than the ratio of the mean
        error, and infinite where a reconstruction is exact. Usage is a fraction of the codebook.
        """
        ratios = torch.cat(self._ratios) if self._ratios else torch.empty(0)
        if len(ratios) == 0:
            raise DataError("There are no images to reconstruct.")
        return {
            "psnr": float(ratios.mean()),
            "ssim": float(torch.cat(self._similarities).mean()),
            "usage_per_scale": self._used.double().mean(dim=1).tolist(),
            "code_usage": float(self._used.any(dim=0).double().mean()),
            "images": len(ratios),
        }


def _check_pair(originals: Tensor, reconstructions: Tensor) -> None:
    check_images(originals)
    check_images(reconstructions)
    if originals.shape != reconstructions.shape:
        raise DataError(
            f"Images are compared pair by pair, found {tuple(originals.shape)} and {tuple(reconstructions.shape)}."
        )
