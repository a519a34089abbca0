"""What an attention backend is: a name, a function, and the reasons that speak against it; and masks that several use.

Shapes: Q queries, K keys, N tokens of the scale itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from mvar_core.pyramid import AttentionPattern, window_start


@dataclass(frozen=True)
class AttentionCall:
    """Everything about a call of `attend` that may decide which backend can run it; not the values."""

    pattern: AttentionPattern
    device: torch.device
    dtype: torch.dtype
    needs_grad: bool = False


Attend = Callable[[Tensor, Tensor, Tensor, AttentionPattern, float], Tensor]
"""`(q_BHQD, k_BHKD, v_BHKD, pattern, scale) -> o_BHQD`: softmax(scale · q kᵀ) v over the keys that the pattern shows.

Queries are those of one scale in raster order; keys and values are those of earlier scales that it sees, then its own.
The output has the dtype of the queries."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over a scale, which `--attention` calls by its name.

    `attend` is differentiable. `cannot_run` is the reason why it cannot run a call; `not_chosen`, why "auto" passes it
    over even where it can: asked first, so it must be quick and import no package that the answer may not need.
    """

    name: str
    attend: Attend
    cannot_run: Callable[[AttentionCall], str | None] = lambda call: None
    not_chosen: Callable[[AttentionCall], str | None] = lambda call: None


def beyond_flex(call: AttentionCall, name: str) -> str | None:
    """Why FlexAttention, and what is built on it, cannot run a call; None where it can."""
    if call.device.type not in ("cpu", "cuda"):
        return f"{name} does not run on {call.device.type}"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{name} does not run in {str(call.dtype).removeprefix('torch.')}"
    return None


def any_needs_grad(*tensors: Tensor) -> bool:
    """Whether a backward pass will follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
