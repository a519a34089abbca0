"""How a token map is cut into tiles of queries with the halos of their keys, and what a cut costs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from mvar_core.kernels.strips import STRIP_ROWS
from mvar_core.pyramid import AttentionPattern, Grid, window_start

# Shape suffixes: T tiles of a strip, q queries of a tile, k keys of a tile.

# What a cut costs was fitted to 7 sides × 5 windows × 20 cuts, forward, in float32 and bfloat16, on two cores of an AMD
# EPYC 9004; the unit, a product of a query with a key of width 64 within a large product, takes about 2 ns there. The
# cut that the model picks took 7 % longer than the fastest measured one on average.
QUERIES_OVERHEAD = 8
"""A tile costs as if it had so many queries more: small products are slower."""

KEYS_OVERHEAD = 48
"""A tile costs as if it had so many keys more: what is done once per query."""

COPY_COST = 6
"""Copying one token of one head."""

PIECE_OVERHEAD = 75_000
"""What a strip costs, however small: about ten calls into PyTorch that wake all threads."""

CALL_OVERHEAD = 250_000
"""What dense attention costs, however small."""

TYPICAL_HEADS = 16
"""Heads of the published d16, for which the costs were measured."""

LARGEST_TILE_SIDE = 16
"""Larger tiles were never the fastest, but on an axis that its window covers."""


@dataclass(frozen=True)
class Strip:
    """Some columns of the map, one tile wide.

    Attributes:
        columns: The columns of its queries.
        key_columns: The columns of their keys.
        starts: For each column of queries, where its window starts, counted from the first column of the keys.
    """

    columns: slice
    key_columns: slice
    starts: tuple[int, ...]

    @property
    def halo(self) -> int:
        """Number of columns of keys."""
        return self.key_columns.stop - self.key_columns.start


@dataclass(frozen=True)
class Tiling:
    """A cut of the map into strips, and of each strip into tiles of equal height.

    The tiles' halos have the same height, and each lies one tile below that of the tile above. So the first and the
    last may reach beyond the map, as may the queries of the last.

    Attributes:
        pattern: What is cut.
        tile_rows: Rows of queries of a tile.
        halo_rows: Rows of keys of a tile.
        first_key_row: First row of the first tile's keys, 0 or negative.
        tiles: Number of tiles of a strip.
        strips: From left to right.
    """

    pattern: AttentionPattern
    tile_rows: int
    halo_rows: int
    first_key_row: int
    tiles: int
    strips: tuple[Strip, ...]

    @cached_property
    def row_starts(self) -> tuple[tuple[int | None, ...], ...]:
        """For each tile and row of queries, where its window starts, counted from the first row of the tile's keys.

        None is a row that the map does not have.
        """
        height, window = self.pattern.grid.height, self.pattern.window_grid.height
        return tuple(
            tuple(
                window_start(row, height, window) - (self.first_key_row + tile * self.tile_rows)
                if row < height
                else None
                for row in range(tile * self.tile_rows, (tile + 1) * self.tile_rows)
            )
            for tile in range(self.tiles)
        )


def cut(pattern: AttentionPattern, tile_rows: int, num_strips: int) -> Tiling:
    """The tiling with tiles of `tile_rows` rows and with strips of equal width, up to one column."""
    (height, width), (window_height, window_width) = pattern.grid, pattern.window_grid
    tiles = -(-height // tile_rows)
    bounds = []
    for tile in range(tiles):
        first, last = tile * tile_rows, min(height, (tile + 1) * tile_rows) - 1
        bounds.append(
            (
                window_start(first, height, window_height) - first,
                window_start(last, height, window_height) + window_height - first,
            )
        )
    first_key_row = min(start for start, _ in bounds)
    edges = [round(strip * width / num_strips) for strip in range(num_strips + 1)]
    return Tiling(
        pattern=pattern,
        tile_rows=tile_rows,
        halo_rows=max(stop for _, stop in bounds) - first_key_row,
        first_key_row=first_key_row,
        tiles=tiles,
        strips=tuple(_strip(first, stop, width, window_width) for first, stop in itertools.pairwise(edges)),
    )


def _strip(first: int, stop: int, width: int, window: int) -> Strip:
    key_first = window_start(first, width, window)
    key_stop = window_start(stop - 1, width, window) + window
    starts = tuple(window_start(column, width, window) - key_first for column in range(first, stop))
    return Strip(slice(first, stop), slice(key_first, key_stop), starts)


# Strips that look alike share a mask: a windowed scale has a handful of kinds.
@lru_cache(maxsize=64)
def tile_mask(
    row_starts: tuple[tuple[int | None, ...], ...],
    column_starts: tuple[int, ...],
    halo: Grid,
    window: Grid,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "T q k"]:
    """What is added to a strip's products: zero where a query sees a key, -inf elsewhere; never to be written to.

    Rows of queries that the map does not have see everything, since a softmax over nothing is not a number.
    """
    # A mask made under inference_mode could not be kept for a later backward pass.
    with torch.inference_mode(False):
        rows = torch.tensor(
            [
                [
                    [start is None or start <= row < start + window.height for row in range(halo.height)]
                    for start in tile
                ]
                for tile in row_starts
            ]
        )
        columns = torch.tensor(
            [[start <= column < start + window.width for column in range(halo.width)] for start in column_starts]
        )
        seen = rows[:, :, None, :, None] & columns[None, None, :, None, :]
        whole = torch.tensor([[start is None for start in tile] for tile in row_starts])
        seen |= whole[:, :, None, None, None]
        seen_Tqk = seen.flatten(3, 4).flatten(1, 2)
        mask_Tqk = torch.zeros(seen_Tqk.shape, dtype=dtype).masked_fill_(~seen_Tqk, -torch.inf)
        return mask_Tqk.to(device)


@lru_cache(maxsize=256)
def plan_tiling(pattern: AttentionPattern, heads: int = TYPICAL_HEADS) -> Tiling:
    """The cut of least predicted cost; never a function of the batch, which would change a sample's rounding.

    Args:
        pattern: Who sees whom.
        heads: Attention heads.
    """
    height, width = pattern.grid
    # An axis that its window covers may stay whole: all of its queries share its keys.
    heights = {*range(1, min(height, LARGEST_TILE_SIDE) + 1), height}
    counts = {-(-width // tile) for tile in (*range(1, min(width, LARGEST_TILE_SIDE) + 1), width)}
    choices = (cut(pattern, tile_rows, num_strips) for tile_rows in sorted(heights) for num_strips in sorted(counts))
    return min(choices, key=lambda tiling: tiled_cost(tiling, heads))


def tiled_cost(tiling: Tiling, heads: int = TYPICAL_HEADS) -> float:
    """Predicted cost of one image's attention, in products of a query with a key (64 wide) within a large product."""
    prefix = tiling.pattern.prefix_tokens
    strip_rows = (tiling.tiles - 1) * tiling.tile_rows + tiling.halo_rows
    cost = 0.0
    for strip in tiling.strips:
        queries, own_keys = tiling.tile_rows * len(strip.starts), tiling.halo_rows * strip.halo
        keys = prefix + own_keys
        copies = 2 * tiling.tiles * queries + 2 * strip_rows * strip.halo
        if prefix:
            copies += 2 * tiling.tiles * keys
        products = tiling.tiles * (queries + QUERIES_OVERHEAD) * (keys + KEYS_OVERHEAD)
        cost += PIECE_OVERHEAD + heads * (products + COPY_COST * copies)
    return cost


def dense_cost(pattern: AttentionPattern, heads: int = TYPICAL_HEADS) -> float:
    """Predicted cost of one image's attention without tiles, in the same unit."""
    return CALL_OVERHEAD + heads * pattern.queries * pattern.keys


def dense_training_products(pattern: AttentionPattern, heads: int = TYPICAL_HEADS) -> int:
    """Products of queries with keys in the strips of rows with which a CPU trains dense attention."""
    height, window = pattern.grid.height, pattern.window_grid.height
    if pattern.prefix_tokens or window == height:
        return heads * pattern.queries * pattern.keys
    products = 0
    for top in range(0, height, STRIP_ROWS):
        last = min(top + STRIP_ROWS, height) - 1
        rows_seen = window_start(last, height, window) + window - window_start(top, height, window)
        products += (last + 1 - top) * rows_seen
    return heads * products * pattern.grid.width**2
