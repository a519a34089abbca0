"""Attention over a scale by PyTorch's scaled_dot_product_attention on all keys, with a mask where there are windows.

Every query meets every key, so time grows with the square of the tokens. A masked key weighs exactly zero, yet its
value is multiplied: NaN or infinity outside a window spreads into the output. Where a CPU trains, `strips` computes it.

Shapes: B batch, H heads, Q queries, K keys, D head width, N tokens of the scale itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mvar_core.kernels.backend import AttentionCall, Backend, runs_everything
from mvar_core.kernels.strips import WORTHWHILE_NUMBERS, attend_strips
from mvar_core.kernels.visibility import axis_visibility, visibility_mask
from mvar_core.pyramid import AttentionPattern

__all__ = ["BACKEND", "attend_dense", "axis_visibility", "visibility_mask"]


def attend_dense(
    q_BHQD: Float[Tensor, "B H Q D"],
    k_BHKD: Float[Tensor, "B H K D"],
    v_BHKD: Float[Tensor, "B H K D"],
    pattern: AttentionPattern,
    scale: float,
) -> Float[Tensor, "B H Q D"]:
    """softmax(scale · q kᵀ) v over the keys that `pattern` shows; no mask where the scale is whole."""
    if _strips_pay(q_BHQD, k_BHKD, v_BHKD):
        return attend_strips(q_BHQD, k_BHKD, v_BHKD, pattern, scale)
    mask_QK = visibility_mask(pattern, q_BHQD.device) if pattern.is_windowed else None
    return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask_QK, scale=scale)


def _strips_pay(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor) -> bool:
    """Whether a CPU trains: SDPA is slow at masks there and in bfloat16, and keeps its output twice."""
    return (
        q_BHQD.device.type == "cpu"
        and q_BHQD.numel() >= WORTHWHILE_NUMBERS
        and torch.is_grad_enabled()
        and (q_BHQD.requires_grad or k_BHKD.requires_grad or v_BHKD.requires_grad)
        and not torch.compiler.is_compiling()
    )


def _not_chosen(call: AttentionCall) -> str | None:
    return None


BACKEND = Backend("dense", attend_dense, runs_everything, _not_chosen)
