"""Where a token lies in other scales, and how near their tokens are to it: the geometry behind attention statistics.

The matching position of the query (y, x) of a scale of h_s×w_s tokens in a scale of h_t×w_t is the one that contains
the query's centre: (floor((y + 1/2)·h_t/h_s), floor((x + 1/2)·w_t/w_s)). In its own scale that is the query itself.
Windows are those of mvar_core.pyramid around the matching position: shifted inward at the borders, so that all have k×k
tokens; a window longer than an axis covers that axis.
"""

# Shape suffixes: q some of the queries of one scale, h w that scale's rows and columns, G the positions of the
# keys' scale, y x its rows and columns.

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.pyramid import Grid, window_start


def needed_windows(positions: Int[Tensor, " q"], query_grid: Grid, key_grid: Grid | None = None) -> Int[Tensor, "q G"]:
    """The smallest odd window around each query's matching position that contains each position of the keys' scale.

    Queries are given by their positions in raster order; keys are by default of their scale.
    """
    return torch.maximum(*_by_axis(_needed_on_axis, positions, query_grid, key_grid or query_grid)).flatten(1)


def distances(positions: Int[Tensor, " q"], grid: Grid) -> Float[Tensor, "q G"]:
    """Euclidean distance in tokens between some positions and all positions of the same scale."""
    vertical, horizontal = _by_axis(_offsets_on_axis, positions, grid, grid)
    return torch.hypot(vertical.double(), horizontal.double()).flatten(1)


def displacements(positions: Int[Tensor, " q"], query_grid: Grid, key_grid: Grid) -> Int[Tensor, "q G"]:
    """Each key's displacement from each query's matching position, as an index into a map of `displacement_grid`."""
    vertical, horizontal = _by_axis(_offsets_on_axis, positions, query_grid, key_grid)
    rows, columns = vertical + key_grid.height - 1, horizontal + key_grid.width - 1
    return (rows * displacement_grid(key_grid).width + columns).flatten(1)


def displacement_grid(key_grid: Grid) -> Grid:
    """The map of all displacements in a scale; the matching position is its centre."""
    return Grid(2 * key_grid.height - 1, 2 * key_grid.width - 1)


@lru_cache(maxsize=4096)
def matching_positions(queries: int, keys: int) -> tuple[int, ...]:
    """For each of `queries` positions on an axis, the position that contains its centre on an axis of `keys`."""
    return tuple((2 * position + 1) * keys // (2 * queries) for position in range(queries))


def _by_axis(
    of_axis: Callable[[int, int], np.ndarray], positions: Tensor, query_grid: Grid, key_grid: Grid
) -> tuple[Int[Tensor, "q h 1"], Int[Tensor, "q 1 w"]]:
    """A table (queries, keys) of each axis, looked up for some queries."""
    rows_hy = torch.from_numpy(of_axis(query_grid.height, key_grid.height)).to(positions.device)
    columns_wx = torch.from_numpy(of_axis(query_grid.width, key_grid.width)).to(positions.device)
    width = query_grid.width
    return rows_hy[positions // width].unsqueeze(2), columns_wx[positions % width].unsqueeze(1)


@lru_cache(maxsize=1024)
def _needed_on_axis(queries: int, keys: int) -> np.ndarray:
    needed = np.zeros((queries, keys), dtype=np.int64)
    for query, position in enumerate(matching_positions(queries, keys)):
        # From wide to narrow, so that the narrowest window that contains a key is what remains.
        for window in range(keys | 1, 0, -2):
            width = min(window, keys)
            start = window_start(position, keys, width)
            needed[query, start : start + width] = window
    return needed


@lru_cache(maxsize=1024)
def _offsets_on_axis(queries: int, keys: int) -> np.ndarray:
    return np.arange(keys)[None, :] - np.array(matching_positions(queries, keys), dtype=np.int64)[:, None]
