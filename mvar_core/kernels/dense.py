"""Attention over a scale by PyTorch's scaled_dot_product_attention on all keys, with a mask where there are windows.

Every query meets every key, so time grows with the square of the tokens. A masked key weighs exactly zero, yet its
value is multiplied: NaN or infinity outside a window spreads into the output.

Where a CPU trains, `_Strips` computes it: softmax in float32, products in the input's dtype, nothing kept of the
scores. The windows of some rows of a scale lie within a few rows of it, and rows are contiguous in raster order. So a
windowed scale is computed in strips of rows, each with the rows of keys that it sees: no key is copied, and about half
of the masked scores are never computed. The backward pass computes the scores again. Scores are computed for a few
heads at a time, so that they stay in the processor's caches.

Shapes: B batch, H heads, G = B·H and g some of them, Q queries, K keys, D head width; q and k those of a strip.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_core.kernels.backend import Backend, any_needs_grad, visibility_mask
from mvar_core.pyramid import AttentionPattern, window_start

STRIP_ROWS = 4
"""Rows of queries in a strip: fewer compute fewer masked scores, and start more kernels."""

SCORES_AT_ONCE = 1 << 20
"""Scores that are held at a time, in float32."""

WORTHWHILE_ELEMENTS = 1 << 16
"""Elements of the queries below which SDPA, with fewer calls, is faster."""


def attend_dense(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    """Attention in strips where a CPU trains, else by SDPA, without a mask where the scale is whole."""
    # Where a CPU trains, SDPA is slow at masks and in bfloat16, and keeps its output twice.
    trains = q_BHQD.device.type == "cpu" and any_needs_grad(q_BHQD, k_BHKD, v_BHKD)
    if trains and q_BHQD.numel() >= WORTHWHILE_ELEMENTS and not torch.compiler.is_compiling():
        output: Tensor = _Strips.apply(q_BHQD, k_BHKD, v_BHKD, pattern, scale)
        return output
    mask_QK = visibility_mask(pattern, q_BHQD.device) if pattern.is_windowed else None
    return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask_QK, scale=scale)


class _Strips(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float
    ) -> Tensor:
        q_GQD, k_GKD, v_GKD = (x.flatten(0, 1).contiguous() for x in (q_BHQD, k_BHKD, v_BHKD))
        o_GQD = torch.empty_like(q_GQD)
        for (queries, keys), bias_qk in zip(strips_of_rows(pattern), _biases(pattern), strict=True):
            for part in _parts(queries, keys, len(q_GQD)):
                p_gqk = _probabilities(q_GQD[part, queries], k_GKD[part, keys], bias_qk, scale)
                o_GQD[part, queries] = p_gqk.to(v_GKD.dtype) @ v_GKD[part, keys]
        ctx.save_for_backward(q_BHQD, k_BHKD, v_BHKD)
        ctx.pattern, ctx.scale = pattern, scale
        return o_GQD.view(q_BHQD.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BHQD,) = gradients
        q_GQD, k_GKD, v_GKD, g_GQD = (x.flatten(0, 1).contiguous() for x in (*ctx.saved_tensors, gradient_BHQD))
        strips = strips_of_rows(ctx.pattern)
        dq_GQD = torch.empty_like(q_GQD)
        # Strips share keys: what several add up is held in float32.
        shared = torch.float32 if len(strips) > 1 else k_GKD.dtype
        dk_GKD, dv_GKD = (torch.zeros(x.shape, dtype=shared) for x in (k_GKD, v_GKD))
        for (queries, keys), bias_qk in zip(strips, _biases(ctx.pattern), strict=True):
            for part in _parts(queries, keys, len(q_GQD)):
                q_gqD, g_gqD = q_GQD[part, queries], g_GQD[part, queries]
                k_gkD, v_gkD = k_GKD[part, keys], v_GKD[part, keys]
                p_gqk = _probabilities(q_gqD, k_gkD, bias_qk, ctx.scale)
                dv_GKD[part, keys] += p_gqk.to(g_gqD.dtype).mT @ g_gqD
                dp_gqk = (g_gqD @ v_gkD.mT).float()
                ds_gqk = torch._softmax_backward_data(dp_gqk, p_gqk, -1, torch.float32)
                ds_gqk = ds_gqk.mul_(ctx.scale).to(q_gqD.dtype)
                dq_GQD[part, queries] = ds_gqk @ k_gkD
                dk_GKD[part, keys] += ds_gqk.mT @ q_gqD
        batch, heads = gradient_BHQD.shape[:2]
        dq, dk, dv = (x.to(q_GQD.dtype).unflatten(0, (batch, heads)) for x in (dq_GQD, dk_GKD, dv_GKD))
        return dq, dk, dv, None, None


def _parts(queries: slice, keys: slice, groups: int) -> list[slice]:
    """Groups whose scores are computed together."""
    scores = (queries.stop - queries.start) * (keys.stop - keys.start)
    at_once = max(1, SCORES_AT_ONCE // scores)
    return [slice(start, start + at_once) for start in range(0, groups, at_once)]


def _probabilities(q_gqD: Tensor, k_gkD: Tensor, bias_qk: Tensor | None, scale: float) -> Tensor:
    """In float32: a product's rounding to bfloat16 would move large scores by whole tenths."""
    q_gqD, k_gkD = q_gqD.float(), k_gkD.float()
    if bias_qk is None:
        scores_gqk = torch.bmm(q_gqD * scale if scale != 1 else q_gqD, k_gkD.mT)
    else:
        scores_gqk = torch.baddbmm(bias_qk, q_gqD, k_gkD.mT, alpha=scale)
    return scores_gqk.softmax(dim=-1)


@lru_cache(maxsize=256)
def strips_of_rows(pattern: AttentionPattern) -> tuple[tuple[slice, slice], ...]:
    """Queries and the keys that they see; in one strip where rows of keys do not lie together, or nothing is gained."""
    (height, width), window = pattern.grid, pattern.window_grid.height
    if pattern.prefix_tokens or window == height:
        return ((slice(0, pattern.queries), slice(0, pattern.keys)),)
    strips = []
    for top in range(0, height, STRIP_ROWS):
        bottom = min(top + STRIP_ROWS, height)
        first, last = window_start(top, height, window), window_start(bottom - 1, height, window) + window
        strips.append((slice(top * width, bottom * width), slice(first * width, last * width)))
    return tuple(strips)


@lru_cache(maxsize=64)
def _biases(pattern: AttentionPattern) -> tuple[Tensor | None, ...]:
    """What is added to the scores of each strip, 0 or -inf; None where every query sees all keys."""
    if not pattern.is_windowed:
        return (None,)
    with torch.inference_mode(False):
        bias_QK = torch.zeros(pattern.queries, pattern.keys)
        bias_QK.masked_fill_(~visibility_mask(pattern, torch.device("cpu")), -torch.inf)
        return tuple(bias_QK[queries, keys].clone() for queries, keys in strips_of_rows(pattern))


BACKEND = Backend("dense", attend_dense)
