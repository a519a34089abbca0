"""Windowed attention with work that grows with tokens × window, on every device, by PyTorch alone.

Neighbouring queries have nearly the same window. So queries are computed in tiles, each with the keys of its halo: the
tile widened by half a window on every side. One scaled_dot_product_attention with a small mask serves many tiles, and
keys outside the halo are never read; NaN within it spreads over the tile.

Copies are what makes small tiles slow, so few are made. The map is cut into strips, each a tile wide; a strip's keys
are copied once, and the tiles above one another in it read overlapping rows of that copy in place. Keys of earlier
scales, which every query sees, are the exception: they are copied before each tile's.

The backward pass keeps nothing but the inputs: it computes the pieces again, one after the other.

What a cut costs was fitted to 7 sides × 5 windows × 20 cuts, forward, in float32 and bfloat16, on two cores of an AMD
EPYC 9004; the unit, a product of a query with a key of width 64 within a large product, takes about 2 ns there. The
cut that the model picks took 7 % longer than the fastest measured one on average.

Shapes: B batch, H heads, G = some of B·H, N tokens of the scale, Y rows, X columns, Q queries, K keys, D head width,
P prefix keys, T tiles of a strip, q queries of a tile, k keys of a tile, y rows and x columns of a piece.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mvar_core.kernels.backend import Attend, AttentionCall, Backend, any_needs_grad
from mvar_core.kernels.dense import strips_of_rows
from mvar_core.pyramid import AttentionPattern, Grid, window_start

PIECE_ELEMENTS = 1 << 20
"""Elements copied and computed at a time: bounds the memory beyond inputs and output, and fits a processor's cache."""

WORTHWHILE_TOKENS = 24 * 24
"""Tokens of a scale from which "auto" considers tiles on other devices than a CPU; a guess, not measured."""

QUERIES_OVERHEAD, KEYS_OVERHEAD = 8, 48
"""A tile costs as if it had so many more: small products are slower, and some work is done once per query."""

COPY_COST = 6
"""Copying one token of one head."""

PIECE_OVERHEAD, CALL_OVERHEAD = 75_000, 250_000
"""What a strip costs, however small, about ten calls into PyTorch that wake all threads; and what dense attention."""

TILED_TRAINING_COST, DENSE_TRAINING_COST = {"float32": 5.5, "half": 6.5}, {"float32": 5.5, "half": 3.3}
"""Forward and backward pass: of tiles, as multiples of the forward pass; of dense attention, for each product in its
strips of rows. Measured on 6 sides × 3 windows."""

MARGIN = 1.2
"""How many times the cost of tiles dense attention must have: near each other, it has fewer calls."""

TYPICAL_HEADS = 16
"""Heads of the published d16, for which the costs were measured."""

LARGEST_TILE_SIDE = 16
"""Larger tiles were never the fastest, but on an axis that its window covers."""


def attend_tiled(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    """Attention tile by tile; whole scales, which need no mask, go to SDPA."""
    if not pattern.is_windowed:
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, scale=scale)
    return differentiable(_forward, q_BHQD, k_BHKD, v_BHKD, pattern, scale)


def differentiable(
    forward: Attend, q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float
) -> Tensor:
    """What `forward` computes, with the gradients of tiled attention, which is the same function."""
    if not any_needs_grad(q_BHQD, k_BHKD, v_BHKD):
        return forward(q_BHQD, k_BHKD, v_BHKD, pattern, scale)
    output: Tensor = _WithTiledBackward.apply(forward, q_BHQD, k_BHKD, v_BHKD, pattern, scale)
    return output


def _forward(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    inputs = _Maps(q_BHQD, k_BHKD, v_BHKD, pattern)
    o_BHYXD = torch.empty_like(inputs.q_BHYXD, memory_format=torch.contiguous_format)
    for piece in _pieces(pattern, q_BHQD):
        q_GTqD, k_GTkD, v_GTkD = piece.tiles_of(inputs)
        o_GTqD = F.scaled_dot_product_attention(q_GTqD, k_GTkD, v_GTkD, attn_mask=piece.mask(q_BHQD), scale=scale)
        piece.write_queries(o_GTqD, o_BHYXD)
    return o_BHYXD.flatten(2, 3)


class _WithTiledBackward(torch.autograd.Function):
    """Each piece's attention is computed again in the backward pass, which bounds its memory."""

    @staticmethod
    def forward(ctx: Any, compute: Attend, *arguments: Any) -> Tensor:
        q_BHQD, k_BHKD, v_BHKD, ctx.pattern, ctx.scale = arguments
        ctx.save_for_backward(q_BHQD, k_BHKD, v_BHKD)
        return compute(q_BHQD.detach(), k_BHKD.detach(), v_BHKD.detach(), ctx.pattern, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_BHQD, k_BHKD, v_BHKD = ctx.saved_tensors
        pattern: AttentionPattern = ctx.pattern
        inputs = _Maps(q_BHQD, k_BHKD, v_BHKD, pattern)
        do_BHYXD = gradients[0].unflatten(2, pattern.grid)
        # Keys have several contributions, which half precision would round one by one.
        accumulate = torch.promote_types(q_BHQD.dtype, torch.float32)
        dq_BHYXD = torch.empty_like(inputs.q_BHYXD, memory_format=torch.contiguous_format)
        dk_BHKD, dv_BHKD = (torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in (k_BHKD, v_BHKD))
        for piece in _pieces(pattern, q_BHQD):
            q_GTqD, k_GTkD, v_GTkD = leaves = [x.requires_grad_() for x in piece.tiles_of(inputs)]
            mask = piece.mask(q_BHQD)
            with torch.enable_grad():
                o_GTqD = F.scaled_dot_product_attention(q_GTqD, k_GTkD, v_GTkD, attn_mask=mask, scale=ctx.scale)
            dq_GTqD, *key_gradients = torch.autograd.grad(o_GTqD, leaves, piece.queries(inputs, "gradients", do_BHYXD))
            piece.write_queries(dq_GTqD, dq_BHYXD)
            for dx_GTkD, dx_BHKD in zip(key_gradients, (dk_BHKD, dv_BHKD), strict=True):
                piece.add_keys(dx_GTkD, dx_BHKD)
        found = (dq_BHYXD.flatten(2, 3), dk_BHKD.to(k_BHKD.dtype), dv_BHKD.to(v_BHKD.dtype))
        wanted = (x if needed else None for x, needed in zip(found, ctx.needs_input_grad[1:4], strict=True))
        return (None, *wanted, None, None)


class _Maps:
    """Queries, keys and values as maps, the keys and values of earlier scales, and room for a piece of each."""

    def __init__(self, q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern):
        prefix = pattern.prefix_tokens
        self.q_BHYXD, self.k_BHYXD, self.v_BHYXD = (
            x.detach()[:, :, -pattern.queries :].unflatten(2, pattern.grid) for x in (q_BHQD, k_BHKD, v_BHKD)
        )
        self.k_BHPD, self.v_BHPD = (x.detach()[:, :, :prefix] for x in (k_BHKD, v_BHKD))
        self._room: dict[str, Tensor] = {}

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory for a copy, the same for every piece: new memory costs about as much as filling it."""
        size = math.prod(shape)
        if name not in self._room or self._room[name].numel() < size:
            self._room[name] = self.q_BHYXD.new_empty(size)
        return self._room[name][:size].view(shape)


@dataclass(frozen=True)
class _Piece:
    """Some tiles of a strip, from above, for some images and heads: what is computed at a time."""

    tiling: Tiling
    strip: Strip
    tiles: range
    batch: slice
    heads: slice

    def tiles_of(self, maps: _Maps) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (G, T, q, D), keys and values (G, T, k, D) of each tile; those of neighbours may share memory."""
        return (
            self.queries(maps, "queries", maps.q_BHYXD),
            self._keys(maps, "keys", maps.k_BHYXD, maps.k_BHPD),
            self._keys(maps, "values", maps.v_BHYXD, maps.v_BHPD),
        )

    def queries(self, maps: _Maps, name: str, x_BHYXD: Tensor) -> Tensor:
        """A copy of each tile's queries (G, T, q, D), of whatever there is one for each query."""
        return self._copy(maps, name, x_BHYXD, self._query_rows, self.strip.columns, self.tiling.tile_rows)

    def write_queries(self, x_GTqD: Tensor, x_BHYXD: Tensor) -> None:
        """The inverse of `queries`."""
        rows, copied = self._inside(self._query_rows)
        target = x_BHYXD[self.batch, self.heads, rows, self.strip.columns]
        x_byxD = x_GTqD.reshape(*target.shape[:2], len(self._query_rows), *target.shape[3:])
        target.copy_(x_byxD[:, :, copied])

    def _keys(self, maps: _Maps, name: str, x_BHYXD: Tensor, x_BHPD: Tensor) -> Tensor:
        """The keys of each tile (G, T, k, D): prefix, then halo. Without a prefix, a view in which tiles overlap."""
        x_GTkD = self._copy(maps, name, x_BHYXD, self._key_rows, self.strip.key_columns, self.tiling.halo_rows)
        if self.prefix:
            x_GPD = x_BHPD[self.batch, self.heads].flatten(0, 1)
            x_GTkD = torch.cat([x_GPD.unsqueeze(1).expand(-1, len(self.tiles), -1, -1), x_GTkD], dim=2)
        return x_GTkD

    def add_keys(self, dx_GTkD: Tensor, dx_BHKD: Tensor) -> None:
        """The adjoint of `_keys`: add each tile's gradients of its keys to the sums."""
        prefix, step, halo, width = self.prefix, self.tiling.tile_rows, self.tiling.halo_rows, self.strip.halo
        rows, copied = self._inside(self._key_rows)
        own_BHYXD = dx_BHKD[:, :, prefix:].unflatten(2, self.tiling.pattern.grid)
        target = own_BHYXD[self.batch, self.heads, rows, self.strip.key_columns]
        dx_GTyxD = dx_GTkD[:, :, prefix:].unflatten(2, (halo, width))
        sum_GyxD = dx_BHKD.new_zeros(dx_GTkD.shape[0], len(self._key_rows), width, dx_GTkD.shape[-1])
        by_map, by_row, by_column, by_element = sum_GyxD.stride()
        strides = (by_map, step * by_row, by_row, by_column, by_element)
        # Rows that lie one step apart belong to different tiles, so that one addition serves all tiles.
        for first in range(0, halo, step):
            part_GTyxD = dx_GTyxD[:, :, first : first + step]
            sums_GTyxD = sum_GyxD[:, first:].as_strided(part_GTyxD.shape, strides)
            sums_GTyxD += part_GTyxD
        target += sum_GyxD[:, copied].view(target.shape)
        if prefix:
            prefix_BHPD = dx_BHKD[self.batch, self.heads, :prefix]
            prefix_BHPD += dx_GTkD[:, :, :prefix].sum(dim=1, dtype=dx_BHKD.dtype).view(prefix_BHPD.shape)

    def mask(self, like: Tensor) -> Tensor:
        """What is added to the products: (1, T, q, k), zero where a query sees a key and -inf elsewhere."""
        tiling, strip = self.tiling, self.strip
        halo, window = Grid(tiling.halo_rows, strip.halo), tiling.pattern.window_grid
        mask_Tqk = tile_mask(tiling.row_starts, strip.starts, halo, window, like.dtype, like.device)
        # Of four dimensions: PyTorch's fused kernel for a CPU does not accept three.
        mask_1Tqk = mask_Tqk[None, self.tiles.start : self.tiles.stop]
        return F.pad(mask_1Tqk, (self.prefix, 0)) if self.prefix else mask_1Tqk

    @property
    def prefix(self) -> int:
        return self.tiling.pattern.prefix_tokens

    @property
    def _query_rows(self) -> range:
        return range(self.tiles.start * self.tiling.tile_rows, self.tiles.stop * self.tiling.tile_rows)

    @property
    def _key_rows(self) -> range:
        first = self.tiling.first_key_row + self.tiles.start * self.tiling.tile_rows
        return range(first, first + (len(self.tiles) - 1) * self.tiling.tile_rows + self.tiling.halo_rows)

    def _inside(self, rows: range) -> tuple[slice, slice]:
        """Those of some rows that the map has: where they are in the map, and among the rows."""
        first, stop = max(rows.start, 0), min(rows.stop, self.tiling.pattern.grid.height)
        return slice(first, stop), slice(first - rows.start, stop - rows.start)

    def _copy(self, maps: _Maps, name: str, x_BHYXD: Tensor, rows: range, columns: slice, each: int) -> Tensor:
        """Rows and columns of the map, zero where it has no such row; seen as tiles of `each` rows, (G, T, y·x, D)."""
        inside, copied = self._inside(rows)
        source = x_BHYXD[self.batch, self.heads, inside, columns]
        copy = maps.room(name, (*source.shape[:2], len(rows), *source.shape[3:]))
        copy[:, :, copied].copy_(source)
        if copied.start:
            copy[:, :, : copied.start].zero_()
        if copied.stop < len(rows):
            copy[:, :, copied.stop :].zero_()
        x_GyxD = copy.flatten(0, 1)
        count, _, width, depth = x_GyxD.shape
        by_map, by_row, by_column, by_element = x_GyxD.stride()
        strides = (by_map, self.tiling.tile_rows * by_row, by_column, by_element)
        return x_GyxD.as_strided((count, len(self.tiles), each * width, depth), strides)


def _pieces(pattern: AttentionPattern, q_BHQD: Tensor) -> Iterator[_Piece]:
    """Everything, in pieces of about `PIECE_ELEMENTS` elements; heads outside, so that their maps stay in the cache."""
    batch, heads, _, width = q_BHQD.shape
    tiling = plan_tiling(pattern, heads)
    tile_elements = max(_elements(tiling, strip, width) for strip in tiling.strips)  # of one image and head
    tiles_at_once = min(tiling.tiles, max(1, PIECE_ELEMENTS // tile_elements))
    maps_at_once = max(1, PIECE_ELEMENTS // (tiles_at_once * tile_elements))
    heads_at_once = min(heads, maps_at_once)
    images_at_once = max(1, maps_at_once // heads)
    for images in _slices(batch, images_at_once):
        for some_heads in _slices(heads, heads_at_once):
            for tiles in _slices(tiling.tiles, tiles_at_once):
                for strip in tiling.strips:
                    yield _Piece(tiling, strip, range(tiles.start, tiles.stop), images, some_heads)


def _elements(tiling: Tiling, strip: Strip, width: int) -> int:
    """Elements that one tile of a strip adds to a piece."""
    prefix = tiling.pattern.prefix_tokens
    queries = tiling.tile_rows * len(strip.starts)
    if not prefix:
        return 2 * width * (queries + tiling.tile_rows * strip.halo)
    keys = prefix + tiling.halo_rows * strip.halo
    return 2 * width * (queries + keys) + queries * keys


def _slices(length: int, step: int) -> list[slice]:
    """0 … length in steps that differ by one at most."""
    count = -(-length // step)
    edges = [length * part // count for part in range(count + 1)]
    return [slice(first, stop) for first, stop in itertools.pairwise(edges)]


@lru_cache(maxsize=1024)
def is_faster_than_dense(pattern: AttentionPattern, dtype: torch.dtype, needs_grad: bool) -> bool:
    """Whether tiles are expected to beat dense attention, by their costs for 16 heads on a CPU.

    Forward, in float32 and in half precision alike, between which the measured crossover hardly differs. Never a
    function of the batch, so that a sample's values do not change with its neighbours.
    """
    tiled = tiled_cost(plan_tiling(pattern))
    if not needs_grad:
        return tiled * MARGIN < CALL_OVERHEAD + TYPICAL_HEADS * pattern.queries * pattern.keys
    kind = "half" if dtype.itemsize == 2 else "float32"
    products = sum((q.stop - q.start) * (k.stop - k.start) for q, k in strips_of_rows(pattern))
    return tiled * TILED_TRAINING_COST[kind] < TYPICAL_HEADS * products * DENSE_TRAINING_COST[kind]


class Strip(NamedTuple):
    """Columns of the map, one tile wide; their keys' columns; where each column's window starts, counted from those."""

    columns: slice
    key_columns: slice
    starts: tuple[int, ...]

    @property
    def halo(self) -> int:
        """Number of columns of keys."""
        return self.key_columns.stop - self.key_columns.start


class Tiling(NamedTuple):
    """A cut of the map into strips, and of each strip into tiles of equal height.

    A tile has `tile_rows` rows of queries and `halo_rows` rows of keys, one tile below those of the tile above. So the
    first and the last halo may reach beyond the map (`first_key_row` is 0 or negative), as may the last queries.
    `row_starts` is where the window of each tile's rows of queries starts, counted from the first row of the tile's
    keys; -1 is a row that the map does not have.
    """

    pattern: AttentionPattern
    tile_rows: int
    halo_rows: int
    first_key_row: int
    row_starts: tuple[tuple[int, ...], ...]
    strips: tuple[Strip, ...]

    @property
    def tiles(self) -> int:
        """Number of tiles in a strip."""
        return len(self.row_starts)


def cut(pattern: AttentionPattern, tile_rows: int, num_strips: int) -> Tiling:
    """The tiling with tiles of `tile_rows` rows and with strips of equal width, up to one column."""
    (height, width), (window_height, window_width) = pattern.grid, pattern.window_grid
    tiles = [
        [window_start(row, height, window_height) - top for row in range(top, min(top + tile_rows, height))]
        for top in range(0, height, tile_rows)
    ]
    first_key_row, ends = min(rows[0] for rows in tiles), [rows[-1] for rows in tiles]
    halo_rows = max(ends) + window_height - first_key_row
    row_starts = tuple((*(row - first_key_row for row in rows), *[-1] * (tile_rows - len(rows))) for rows in tiles)
    edges = [round(strip * width / num_strips) for strip in range(num_strips + 1)]
    strips = []
    for first, stop in itertools.pairwise(edges):
        key_first = window_start(first, width, window_width)
        key_stop = window_start(stop - 1, width, window_width) + window_width
        starts = tuple(window_start(column, width, window_width) - key_first for column in range(first, stop))
        strips.append(Strip(slice(first, stop), slice(key_first, key_stop), starts))
    return Tiling(pattern, tile_rows, halo_rows, first_key_row, row_starts, tuple(strips))


# Strips that look alike share a mask: a windowed scale has a handful of kinds.
@lru_cache(maxsize=64)
def tile_mask(
    row_starts: tuple[tuple[int, ...], ...],
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
        rows, columns = torch.tensor(row_starts)[..., None], torch.tensor(column_starts)[..., None]
        y, x = torch.arange(halo.height), torch.arange(halo.width)
        in_rows, in_columns = (y >= rows) & (y < rows + window.height), (x >= columns) & (x < columns + window.width)
        seen = in_rows[:, :, None, :, None] & in_columns[None, None, :, None, :]
        seen |= (rows < 0)[:, :, None, :, None]
        seen_Tqk = seen.flatten(3, 4).flatten(1, 2)
        mask_Tqk = torch.zeros(seen_Tqk.shape, dtype=dtype).masked_fill_(~seen_Tqk, -torch.inf)
        return mask_Tqk.to(device)


@lru_cache(maxsize=256)
def plan_tiling(pattern: AttentionPattern, heads: int = TYPICAL_HEADS) -> Tiling:
    """The cut of least predicted cost; never a function of the batch, which would change a sample's rounding."""
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
        copies = 2 * (tiling.tiles * (queries + (keys if prefix else 0)) + strip_rows * strip.halo)
        products = tiling.tiles * (queries + QUERIES_OVERHEAD) * (keys + KEYS_OVERHEAD)
        cost += PIECE_OVERHEAD + heads * (products + COPY_COST * copies)
    return cost


def _not_chosen(call: AttentionCall) -> str | None:
    if not call.pattern.is_windowed:
        return "there is no window to gain from"
    if call.device.type == "cpu" and not is_faster_than_dense(call.pattern, call.dtype, call.needs_grad):
        return "at this size dense attention is faster"
    if call.device.type != "cpu" and call.pattern.queries < WORTHWHILE_TOKENS:
        return f"below {WORTHWHILE_TOKENS} tokens one masked product wakes the device less often"
    return None


BACKEND = Backend("tiled", attend_tiled, not_chosen=_not_chosen)
