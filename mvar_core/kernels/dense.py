"""Attention over a scale by PyTorch's scaled_dot_product_attention on all keys, with a mask where there are windows.

Every query meets every key, so time grows with the square of the tokens. A masked key weighs exactly zero, yet its
value is multiplied: NaN or infinity outside a window spreads into the output.

Shapes: B batch, H heads, Q queries, K keys, D head width, N tokens of the scale itself.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mvar_core.kernels.backend import AttentionCall, Backend, runs_everything
from mvar_core.scales import AttentionPattern, window_start


def attend_dense(
    q_BHQD: Float[Tensor, "B H Q D"],
    k_BHKD: Float[Tensor, "B H K D"],
    v_BHKD: Float[Tensor, "B H K D"],
    pattern: AttentionPattern,
    scale: float,
) -> Float[Tensor, "B H Q D"]:
    """softmax(scale · q kᵀ) v over the keys that `pattern` shows; no mask where the scale is whole."""
    mask_QK = visibility_mask(pattern, q_BHQD.device) if pattern.is_windowed else None
    return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask_QK, scale=scale)


# A model has a handful of windowed scales; the largest published mask (64×64 tokens and prefixes) takes 39 MB.
@lru_cache(maxsize=16)
def visibility_mask(pattern: AttentionPattern, device: torch.device) -> Bool[Tensor, "Q K"]:
    """True where a query sees a key; made once per pattern and device, never to be written to."""
    # A mask made under inference_mode could not be kept for a later backward pass.
    with torch.inference_mode(False):
        height, width = pattern.grid
        rows = axis_visibility(height, pattern.window_grid.height)
        columns = axis_visibility(width, pattern.window_grid.width)
        own_NN = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(pattern.queries, pattern.queries)
        return F.pad(own_NN, (pattern.prefix_tokens, 0), value=True).to(device)


def axis_visibility(side: int, window: int) -> Bool[Tensor, "side side"]:
    """True where a position on an axis (rows) has another (columns) in its window."""
    starts = torch.tensor([window_start(position, side, window) for position in range(side)])[:, None]
    positions = torch.arange(side)[None, :]
    return (positions >= starts) & (positions < starts + window)


def _not_chosen(call: AttentionCall) -> str | None:
    return None


BACKEND = Backend("dense", attend_dense, runs_everything, _not_chosen)
