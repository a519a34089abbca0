"""Windowed attention with work that grows with tokens × window, on every device, by PyTorch alone.

Neighbouring queries have nearly the same window. So queries are taken in tiles, each with the keys of its halo: the
tile widened by half a window on every side. One scaled_dot_product_attention with a small mask serves a tile, and keys
outside the halo are never read; NaN within it spreads over the tile. Keys of earlier scales, which every query sees,
stand before the halo's.

Shapes: B batch, H heads, G = B·H, Q queries, K keys, D head width, T tiles, q queries of a tile, k keys of a tile.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mvar_core.kernels.backend import AttentionCall, Backend, runs_everything
from mvar_core.kernels.dense import axis_visibility
from mvar_core.scales import AttentionPattern

TILE_SIDE = 8
"""Queries along one side of a tile: larger tiles compute more masked scores, smaller ones copy more keys."""

TILE_ELEMENTS = 1 << 24
"""Numbers gathered and computed at a time: bounds the memory beyond inputs and output."""

WORTHWHILE_TOKENS = 24 * 24
"""Tokens of a scale from which tiles are faster than one masked product (7×7 windows, two CPU cores)."""


class _Tiles(NamedTuple):
    """Indices of the queries (T, q) and keys (T, k) of each tile, their mask (T, q, k), and where answers are (Q)."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    answers: Tensor


def attend_tiled(
    q_BHQD: Float[Tensor, "B H Q D"],
    k_BHKD: Float[Tensor, "B H K D"],
    v_BHKD: Float[Tensor, "B H K D"],
    pattern: AttentionPattern,
    scale: float,
) -> Float[Tensor, "B H Q D"]:
    """softmax(scale · q kᵀ) v over the keys that `pattern` shows, tile by tile."""
    batch, heads, _, width = q_BHQD.shape
    if not pattern.is_windowed:
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, scale=scale)
    tiles = _tiles(pattern, q_BHQD.device, TILE_SIDE)
    num_tiles, tile_queries = tiles.queries.shape
    tile_keys = tiles.keys.shape[1]
    tile_elements = batch * heads * (2 * tile_keys * width + tile_queries * (tile_keys + 2 * width))
    at_once = max(1, TILE_ELEMENTS // tile_elements)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHQD, k_BHKD, v_BHKD))
    outputs = []
    for start in range(0, num_tiles, at_once):
        part = slice(start, start + at_once)
        mask_tqk = None if tiles.mask is None else tiles.mask[part]
        arguments = (q_BHQD, k_BHKD, v_BHKD, tiles.queries[part], tiles.keys[part], mask_tqk, scale)
        # Gathered keys are several times the keys: where they do not fit at once, the backward pass gathers them again.
        if needs_grad and at_once < num_tiles:
            outputs.append(checkpoint(_attend_tiles, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend_tiles(*arguments))
    o_GTqD = torch.cat(outputs).transpose(0, 1).reshape(batch * heads, num_tiles * tile_queries, width)
    return o_GTqD[:, tiles.answers].view(batch, heads, pattern.queries, width)


def _attend_tiles(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    queries_Tq: Tensor,
    keys_Tk: Tensor,
    mask_Tqk: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of some tiles: (T, B·H, q, D)."""
    mask_T1qk = None if mask_Tqk is None else mask_Tqk[:, None]
    return F.scaled_dot_product_attention(
        _gather(q_BHQD, queries_Tq),
        _gather(k_BHKD, keys_Tk),
        _gather(v_BHKD, keys_Tk),
        attn_mask=mask_T1qk,
        scale=scale,
    )


def _gather(x_BHND: Tensor, index_Tn: Tensor) -> Tensor:
    """The tokens of each tile: (T, B·H, n, D)."""
    x_GXD = x_BHND.flatten(0, 1).index_select(1, index_Tn.flatten())
    x_GTnD: Tensor = x_GXD.unflatten(1, tuple(index_Tn.shape))
    return x_GTnD.transpose(0, 1)


@lru_cache(maxsize=16)
def _tiles(pattern: AttentionPattern, device: torch.device, tile_side: int) -> _Tiles:
    """The tiles of a pattern; made once per pattern and device, never to be written to."""
    # Tensors made under inference_mode could not be kept for a later backward pass.
    with torch.inference_mode(False):
        (height, width), (window_height, window_width) = pattern.grid, pattern.window_grid
        rows_Aa, key_rows_Ab = _axis_tiles(height, window_height, tile_side)
        columns_Cc, key_columns_Cd = _axis_tiles(width, window_width, tile_side)
        queries_Tq = _combine(rows_Aa, columns_Cc, width)
        own_Tk = _combine(key_rows_Ab, key_columns_Cd, width)

        rows_seen = axis_visibility(height, window_height)[rows_Aa[:, :, None], key_rows_Ab[:, None, :]]
        columns_seen = axis_visibility(width, window_width)[columns_Cc[:, :, None], key_columns_Cd[:, None, :]]
        seen = rows_seen[:, None, :, None, :, None] & columns_seen[None, :, None, :, None, :]
        seen_Tqk = seen.reshape(*queries_Tq.shape, own_Tk.shape[1])
        mask = None if seen_Tqk.all() else F.pad(seen_Tqk, (pattern.prefix_tokens, 0), value=True).to(device)

        prefix_TP = torch.arange(pattern.prefix_tokens).expand(len(own_Tk), -1)
        keys_Tk = torch.cat([prefix_TP, own_Tk + pattern.prefix_tokens], dim=1)

        # Tiles may overlap at the far border; any of the equal answers will do.
        answers_Q = torch.empty(pattern.queries, dtype=torch.int64)
        answers_Q[queries_Tq.flatten()] = torch.arange(queries_Tq.numel())
        return _Tiles(queries_Tq.to(device), keys_Tk.to(device), mask, answers_Q.to(device))


def _axis_tiles(side: int, window: int, tile_side: int) -> tuple[Int[Tensor, "A a"], Int[Tensor, "A b"]]:
    """Positions of queries and keys of each tile on one axis; all tiles have the same size.

    The last tile is moved inward to end at the border. An axis that its window covers is one tile: its keys are shared
    by all of its queries, so that cutting it would only copy them.
    """
    tile = side if window == side else min(tile_side, side)
    halo = min(side, tile + window - 1)
    starts = torch.arange(0, side, tile).clamp(max=side - tile)[:, None]
    key_starts = (starts - window // 2).clamp(0, side - halo)
    return starts + torch.arange(tile), key_starts + torch.arange(halo)


def _combine(rows_Aa: Tensor, columns_Cc: Tensor, width: int) -> Int[Tensor, "T n"]:
    """Raster indices of the tiles that row tiles and column tiles make."""
    index_ACac = rows_Aa[:, None, :, None] * width + columns_Cc[None, :, None, :]
    return index_ACac.reshape(len(rows_Aa) * len(columns_Cc), -1)


def _not_chosen(call: AttentionCall) -> str | None:
    if not call.pattern.is_windowed:
        return "there is no window to gain from"
    if call.pattern.queries < WORTHWHILE_TOKENS:
        return f"below {WORTHWHILE_TOKENS} tokens one masked product is faster"
    return None


BACKEND = Backend("tiled", attend_tiled, runs_everything, _not_chosen)
