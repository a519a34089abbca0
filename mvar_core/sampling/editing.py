"""Which tokens of a given image stay when a region of it is generated again: VAR's zero-shot editing, as geometry.

The image is encoded; sampling then replaces what it sampled by the image's own tokens wherever they are to stay,
at every scale, and continues from there. What was generated sees what stays, at its own scale and through f̂.

A token stays at the last, finest scale where all of its cell is kept, so that whatever is to change is sampled
there. That token map, resized by area, decides at the coarser scales: a token stays where at least `coverage` of its
cell stays at the last scale. Half, the default, is the published method's threshold. Coarse tokens hold what larger
areas have in common and finer ones correct them, so a kept area keeps its looks only with the coarse tokens under it;
`coverage=1` gives up all that touch the edited area.
"""

# Shape suffixes: N images, B images of a micro-batch, L tokens of all scales, l tokens of one scale, H W pixels,
# h w the latent grid, y x the grid of one scale.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from mvar_core.arguments import tensor_argument
from mvar_core.errors import ConfigError, DataError
from mvar_core.pyramid import Grid, ScalePyramid

UNGUIDED: dict[str, Any] = {"cfg": 0.0, "cfg_schedule": "linear"}
"""Settings of an edit without a class: there is nothing to guide towards."""


@dataclass(frozen=True)
class KeptTokens:
    """Tokens of given images at all scales, and which of them stay; elsewhere tokens are sampled."""

    tokens_NL: Int[Tensor, "N L"]
    kept_NL: Bool[Tensor, "N L"]

    def __len__(self) -> int:
        return len(self.tokens_NL)

    def rows(self, images: slice | Tensor) -> KeptTokens:
        """Those of some images."""
        return KeptTokens(self.tokens_NL[images], self.kept_NL[images])

    def to(self, device: torch.device) -> KeptTokens:
        """On another device."""
        return KeptTokens(self.tokens_NL.to(device), self.kept_NL.to(device))


def checked_mask(mask: Any, images: int, shape: tuple[int, int]) -> Bool[Tensor, "*N H W"]:
    """A boolean mask on the CPU, one for all images of a height and width, or one for each; otherwise DataError."""
    shapes = (shape, (images, *shape))
    return tensor_argument(mask, f"a mask is bool of {shapes[0]} or {shapes[1]}", "bool", *shapes).cpu()


def kept_pixels(mask: Bool[Tensor, "*N H W"], keep: str) -> Bool[Tensor, "*N H W"]:
    """Where pixels stay: inside the mask (out-painting generates around it) or outside (in-painting fills it)."""
    if keep not in ("inside", "outside"):
        raise ConfigError(f"keep is {keep!r}.", 'Use "inside" or "outside".')
    return mask if keep == "inside" else ~mask


def kept_tokens(pixels: Bool[Tensor, "*N H W"], pyramid: ScalePyramid, coverage: float = 0.5) -> Bool[Tensor, "*N L"]:
    """Which tokens stay, at every scale, from where pixels stay, on the CPU.

    `coverage`, in (0, 1], is how much of a coarser scale's cell must stay at the last scale for its token to stay;
    others raise ConfigError. DataError where the pixels do not divide into the latent grid.
    """
    if not 0 < coverage <= 1:
        raise ConfigError(f"coverage is {coverage}; it must be above 0 and at most 1.")
    grid, (height, width) = pyramid.latent_grid, pixels.shape[-2:]
    if height % grid.height or width % grid.width:
        raise DataError(f"a mask of {height}×{width} pixels does not divide into the model's {grid} tokens.")
    cells = pixels.unflatten(-1, (grid.width, -1)).unflatten(-3, (grid.height, -1))
    finest_hw = cells.all(-1).all(-2)
    kept = [finest_hw if size == grid else _resized(finest_hw, size, coverage) for size in pyramid.grids]
    return torch.cat([kept_yx.flatten(-2) for kept_yx in kept], dim=-1)


def _resized(finest_hw: Tensor, size: Grid, coverage: float) -> Tensor:
    """Where at least `coverage` of a coarser cell stays, by areas in whole units."""
    height, width = finest_hw.shape[-2:]
    # A coarse cell is `height` by `width` units, a fine one size.height by size.width; float64 holds them exactly.
    area_yx = _overlaps(size.height, height) @ finest_hw.double() @ _overlaps(size.width, width).T
    return area_yx >= coverage * height * width


def _overlaps(coarse: int, fine: int) -> Tensor:
    """How long each of `coarse` cells overlaps each of `fine` cells on an axis of coarse·fine units."""
    starts, own = torch.arange(coarse).unsqueeze(1) * fine, torch.arange(fine).unsqueeze(0) * coarse
    overlap = torch.minimum(starts + fine, own + coarse) - torch.maximum(starts, own)
    return overlap.clamp(min=0).double()


def pasted(
    images_NHWC: UInt8[Tensor, "N H W 3"], given_NHWC: UInt8[Tensor, "N H W 3"], pixels: Bool[Tensor, "*N H W"]
) -> UInt8[Tensor, "N H W 3"]:
    """The given image's pixels where they stay, the generated one's elsewhere."""
    return torch.where(pixels.unsqueeze(-1), given_NHWC, images_NHWC)
