"""Gradients for kernels that have a forward pass only: the backward pass computes the same attention again with tiles.

Shapes: B batch, H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mvar_core.kernels.tiled import attend_tiled
from mvar_core.pyramid import AttentionPattern

ForwardOnly = Callable[[Tensor, Tensor, Tensor, AttentionPattern, float], Tensor]


def differentiable(
    forward_only: ForwardOnly,
    q_BHQD: Float[Tensor, "B H Q D"],
    k_BHKD: Float[Tensor, "B H K D"],
    v_BHKD: Float[Tensor, "B H K D"],
    pattern: AttentionPattern,
    scale: float,
) -> Float[Tensor, "B H Q D"]:
    """What `forward_only` computes, with the gradients of tiled attention, which is the same function."""
    output: Tensor = _Recomputed.apply(forward_only, q_BHQD, k_BHKD, v_BHKD, pattern, scale)
    return output


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forward_only: ForwardOnly,
        q_BHQD: Tensor,
        k_BHKD: Tensor,
        v_BHKD: Tensor,
        pattern: AttentionPattern,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q_BHQD, k_BHKD, v_BHKD)
        ctx.pattern, ctx.scale = pattern, scale
        return forward_only(q_BHQD.detach(), k_BHKD.detach(), v_BHKD.detach(), pattern, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_BHQD, k_BHKD, v_BHKD = inputs = tuple(x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            o_BHQD = attend_tiled(q_BHQD, k_BHKD, v_BHKD, ctx.pattern, ctx.scale)
        return (None, *torch.autograd.grad(o_BHQD, inputs, gradients), None, None)
