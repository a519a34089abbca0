"""The scale pyramid and the geometry of attention on it: the only place that knows which token sees which.

An image is a pyramid of token maps r_1 … r_S, from 1×1 to the tokenizer's full grid, written one after the other as a
sequence of L tokens. Which keys a token of scale s may attend to follows from two settings alone:

* `scale_prefixes` n: the tokens of scales s-n+1 … s. "all" is VAR; 1 is MVAR's scale-Markov trajectory.
* `windows`, one odd number k per scale: within its own scale, only the k×k window around the same position, shifted
  inward at the borders so that every query has exactly k×k keys (spatial-Markov; NATTEN's definition). 0 is the whole
  scale. Earlier scales that are visible are seen whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np

from mvar_core.errors import ConfigError, shown

ScalePrefixes = int | Literal["all"]
PatchSize = int | tuple[int, int]

PUBLISHED_PYRAMIDS: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Sides of the published pyramids by image side in pixels; all have a downsampling factor of 16."""

WINDOW, WINDOW_PAYS = 7, 3
"""The published window; and how many times its keys a scale must have for it to pay: at 256 px, 13×13 and 16×16 do."""

MOST_SCALES, LARGEST_SIDE, MOST_TOKENS = 64, 1024, 2**20
"""Of a pyramid. The largest published one has 14 scales, sides of 64 and 9451 tokens; attention over more tokens than
this is beyond any machine, and a mistyped or hostile size must end in a message rather than in tables without end."""


class Grid(NamedTuple):
    """Height and width of a token map, in tokens."""

    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.height}×{self.width}"


def window_start(position: int, side: int, window: int) -> int:
    """First key of the window of `window` keys around `position` on an axis; shifted inward at the borders."""
    return min(max(position - window // 2, 0), side - window)


def read_size(value: Any) -> PatchSize:
    """A size from a side, a pair, or text: 16, (16, 24), [16, 24], "16", "16x24" or "16×24", height first.

    Squares become one number, so that equal sizes are equal. ValueError for anything else.
    """
    sides = value
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*(?:[x×]\s*\d+\s*)?", value):
        sides = [int(side) for side in re.split("[x×]", value)]
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    if len(sides) not in (1, 2) or any(type(side) is not int for side in sides):
        raise ValueError(f"{value!r} is not a size: expected one side, as in 16, or height and width, as in 16x24")
    return sides[0] if sides[0] == sides[-1] else (sides[0], sides[1])


def read_sizes(value: Any) -> list[PatchSize]:
    """The sizes of a pyramid's scales, from a sequence of what `read_size` accepts, or from text as in "1,2,3x4"."""
    sizes = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    if not isinstance(sizes, list | tuple | range):
        raise ValueError(f"{value!r} is not a list of sizes")
    return [read_size(size) for size in sizes]


def write_size(size: PatchSize) -> str:
    """A size as `read_size` accepts it: 16 or 16x24."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class AttentionPattern:
    """What the tokens of one scale attend to: visible earlier tokens, then a window of their own scale.

    The keys are ordered: first `prefix_tokens` tokens of earlier scales, which every query sees; then the tokens of the
    query's own scale in raster order, of which each query sees its window. `window` is its side, 0 the whole scale; a
    window larger than an axis covers that axis whole.
    """

    grid: Grid
    window: int = 0
    prefix_tokens: int = 0

    @property
    def window_grid(self) -> Grid:
        """Height and width of the window that every query really has: never more than the grid."""
        return Grid(*(min(self.window or side, side) for side in self.grid))

    @property
    def is_windowed(self) -> bool:
        """Whether some query does not see all of its own scale."""
        return self.window_grid != self.grid

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.grid.tokens

    @property
    def keys(self) -> int:
        """Number of keys, whether a query sees them or not."""
        return self.prefix_tokens + self.grid.tokens

    @property
    def keys_per_query(self) -> int:
        """Number of keys that each query attends to."""
        return self.prefix_tokens + self.window_grid.tokens

    def visible_keys(self, query: int) -> list[int]:
        """Indices of the keys that `query` (raster order in its own scale) attends to, ascending."""
        row, column = divmod(query, self.grid.width)
        height, width = self.window_grid
        top = window_start(row, self.grid.height, height)
        left = window_start(column, self.grid.width, width)
        places = ((y, x) for y in range(top, top + height) for x in range(left, left + width))
        return [*range(self.prefix_tokens), *(self.prefix_tokens + y * self.grid.width + x for y, x in places)]


@dataclass(frozen=True)
class ScalePyramid:
    """The token maps of an image, coarse to fine; the last grid is the tokenizer's full latent grid."""

    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        largest = max(max(grid) for grid in self.grids)
        if len(self.grids) > MOST_SCALES or largest > LARGEST_SIDE or self.num_tokens > MOST_TOKENS:
            found = f"{len(self.grids)} scales, {shown(self.num_tokens)} tokens and a side of {shown(largest)}"
            raise ConfigError(
                f"patch_sizes: {found}; at most {MOST_SCALES} scales, {MOST_TOKENS:,} tokens and sides of"
                f" {LARGEST_SIDE} are supported."
            )

    @classmethod
    def from_patch_sizes(cls, patch_sizes: Sequence[int | Sequence[int]]) -> ScalePyramid:
        """A pyramid from one side, or one (height, width), per scale; none may be larger than the last."""
        if not patch_sizes:
            raise ConfigError("patch_sizes is empty: a pyramid needs at least one scale, for example [1, 2, 4, 8].")
        grids = [Grid(size, size) if isinstance(size, int) else Grid(*map(int, size)) for size in patch_sizes]
        last = grids[-1]
        for index, grid in enumerate(grids):
            if min(grid) < 1 or grid.height > last.height or grid.width > last.width:
                allowed = f"every side must be at least 1 and at most the last scale's ({last})"
                raise ConfigError(f"patch_sizes: scale {index} is {grid}; {allowed}.")
        return cls(tuple(grids))

    @classmethod
    def for_image(cls, height: int, width: int, downsample: int = 16) -> ScalePyramid:
        """A pyramid for images of any size, made from the published one whose finest scale has the nearest area.

        Height and width are in pixels, and multiples of `downsample`, the pixels per latent position along one axis.
        Each published scale keeps its place: its height and width are multiplied by the ratio of the latent grid's to
        the published one's, and rounded (halves up). The first scale is a single token, the last the latent grid;
        scales that rounding makes equal are one. So 256, 512 and 1024 px squares at a downsampling of 16 have the
        published pyramids, and other shapes of about their area have as many scales.
        """
        if min(height, width) < downsample or height % downsample or width % downsample:
            fitting = [max(1, math.floor(side / downsample + 0.5)) * downsample for side in (height, width)]
            raise ConfigError(
                f"image_size {height}×{width} does not fit a tokenizer that makes a token of {downsample}×{downsample}"
                f" pixels: both sides must be multiples of {downsample}.",
                f"The nearest size is {write_size(read_size(fitting))}.",
            )
        latent = Grid(height // downsample, width // downsample)
        published = min(PUBLISHED_PYRAMIDS.values(), key=lambda sides: abs(math.log(latent.tokens / sides[-1] ** 2)))
        grids = [Grid(1, 1)]
        for side in published[1:]:
            # In whole numbers: ⌊side·axis/last + 1/2⌋.
            rounded = (max(1, (2 * side * axis + published[-1]) // (2 * published[-1])) for axis in latent)
            if (grid := Grid(*rounded)) != grids[-1]:
                grids.append(grid)
        return cls(tuple(grids))

    @property
    def patch_sizes(self) -> tuple[PatchSize, ...]:
        """One side per scale, or (height, width) where they differ."""
        return tuple(map(read_size, self.grids))

    @property
    def names(self) -> tuple[str, ...]:
        """What tables call the scales: 16, or 16×24."""
        return tuple(str(grid.height) if grid.height == grid.width else str(grid) for grid in self.grids)

    @property
    def spelled(self) -> str:
        """The sizes as `--pyramid` accepts them: 1,2,3x4."""
        return ",".join(map(write_size, self.patch_sizes))

    @property
    def num_scales(self) -> int:
        """Number of scales, S."""
        return len(self.grids)

    @property
    def num_tokens(self) -> int:
        """Tokens of all scales, L."""
        return sum(grid.tokens for grid in self.grids)

    @property
    def latent_grid(self) -> Grid:
        """The last and finest grid, on which the decoder works."""
        return self.grids[-1]

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """Where each scale's tokens are in the sequence of L tokens."""
        stops = list(accumulate(grid.tokens for grid in self.grids))
        return tuple(map(slice, [0, *stops], stops))

    @cached_property
    def scale_of_token(self) -> tuple[int, ...]:
        """The scale index of each of the L tokens."""
        return tuple(scale for scale, grid in enumerate(self.grids) for _ in range(grid.tokens))

    def __iter__(self) -> Iterator[Grid]:
        return iter(self.grids)

    def __str__(self) -> str:
        return " ".join(self.names)

    def ratio(self, scale: int) -> float:
        """Position of a scale between the first (0) and the last (1); guidance grows with it."""
        return scale / (self.num_scales - 1) if self.num_scales > 1 else 0.0

    def residual_conv_index(self, scale: int, num_convs: int) -> int:
        """Which of the shared convolutions φ refines this scale: the one whose tick is nearest to the scale's ratio.

        Ticks are K points, evenly spaced from 1/(3K) to 1-1/(3K) where K is the published 4 and from 1/(2K) to
        1-1/(2K) otherwise. The published ten scales hold ties (scales 2 and 7); computing the ticks with
        numpy.linspace resolves them as published.
        """
        divisor = 3 if num_convs == 4 else 2
        ticks = np.linspace(1 / divisor / num_convs, 1 - 1 / divisor / num_convs, num_convs)
        return int(np.argmin(np.abs(ticks - self.ratio(scale))))

    def first_visible_scale(self, scale: int, scale_prefixes: ScalePrefixes) -> int:
        """The earliest scale whose tokens a token of `scale` may attend to."""
        return 0 if scale_prefixes == "all" else max(0, scale - scale_prefixes + 1)

    def attention_patterns(self, scale_prefixes: ScalePrefixes, windows: Sequence[int]) -> tuple[AttentionPattern, ...]:
        """One pattern per scale, from the two settings that decide everything (see the head of this file)."""
        starts = [span.start for span in self.spans]
        prefixes = (start - starts[self.first_visible_scale(s, scale_prefixes)] for s, start in enumerate(starts))
        return tuple(map(AttentionPattern, self.grids, windows, prefixes))


def check_attention(pyramid: ScalePyramid, scale_prefixes: ScalePrefixes, windows: Sequence[int]) -> None:
    """Refuse prefixes outside 1 … S, even and negative windows, and another number of windows than of scales."""
    if scale_prefixes != "all" and not 1 <= scale_prefixes <= pyramid.num_scales:
        raise ConfigError(
            f"attention.scale_prefixes is {scale_prefixes}; expected 1 … {pyramid.num_scales} (the number of scales)"
            ' or "all".'
        )
    if len(windows) != pyramid.num_scales:
        raise ConfigError(
            f"attention.windows has {len(windows)} entries ({', '.join(map(str, windows))}) but the pyramid has"
            f" {pyramid.num_scales} scales ({pyramid}); expected one odd number per scale, 0 for a whole scale."
        )
    for scale, window in enumerate(windows):
        if window < 0 or (window and window % 2 == 0):
            raise ConfigError(
                f"attention.windows[{scale}] is {window}; a window must be odd (3, 5, 7 …) to have a centre, or 0 for"
                " the whole scale."
            )


def spread_window(window: int, current: Sequence[int]) -> tuple[int, ...]:
    """One window side for all windowed scales: those of `current` that have one, otherwise the last two.

    The published MVAR windows the last two of its ten scales.
    """
    return tuple(
        window if (value if any(current) else scale >= len(current) - 2) else 0 for scale, value in enumerate(current)
    )


def mvar_windows(pyramid: ScalePyramid) -> tuple[int, ...]:
    """MVAR's windows: 7 on the last two scales, as published, and on larger pyramids wherever else it pays."""
    pays, first = paying_windows(pyramid), pyramid.num_scales - 2
    return tuple(WINDOW if scale >= first else window for scale, window in enumerate(pays))


def auto_windows(text: str, pyramid: ScalePyramid) -> tuple[int, ...]:
    """The windows that `auto` (the published 7) or `auto:K` stands for: K on every scale where it pays."""
    name, colon, window = text.partition(":")
    if name != "auto" or (colon and not window.isdecimal()):
        raise ConfigError(
            f"attention.windows is {text!r}; expected one number, one per scale, auto, or auto:K with an odd number K."
        )
    return paying_windows(pyramid, int(window) if colon else WINDOW)


def paying_windows(pyramid: ScalePyramid, window: int = WINDOW) -> tuple[int, ...]:
    """A window on every scale where it pays, 0 on the others: where at most a third of the scale's tokens are in it.

    On the published 256 px pyramid, 7 gives the published choice: the last two scales.
    """
    return tuple(
        window if WINDOW_PAYS * AttentionPattern(grid, window).keys_per_query <= grid.tokens else 0 for grid in pyramid
    )
