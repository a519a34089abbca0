"""Which keys the queries of a scale see, as masks.

Shapes: Q queries, K keys, N tokens of the scale itself.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from mvar_core.pyramid import AttentionPattern, window_start


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
