"""Cross-entropy of many tokens over a large codebook, in one buffer of logits where usual operations take three.

Shapes: N tokens, V codebook entries; n the tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21
"""Logits that are turned into gradients at a time."""

WORTHWHILE_ELEMENTS = 1 << 22
"""Logits below which the three buffers do not matter."""


def cross_entropy(
    logits_NV: Float[Tensor, "N V"], targets_N: Int[Tensor, " N"], label_smoothing: float = 0.0
) -> Float[Tensor, " N"]:
    """Cross-entropy of each token, in float32; `label_smoothing` is the probability spread evenly over the codebook.

    Of many logits that need a gradient, the gradient is written over the logits: they must not be used afterwards, and
    the result can be differentiated once.
    """
    overwrites = logits_NV.requires_grad and logits_NV.numel() >= WORTHWHILE_ELEMENTS
    if overwrites and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        losses_N: Tensor = _CrossEntropy.apply(logits_NV, targets_N, label_smoothing)
        return losses_N
    return F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=label_smoothing)


class _CrossEntropy(torch.autograd.Function):
    """The gradient by the logits is softmax minus the (smoothed) one-hot target, times that of the loss."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, label_smoothing: float) -> Tensor:
        losses = []
        rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
        uniform = label_smoothing / logits_NV.shape[1]
        gradient_NV = logits_NV.detach()
        for logits_nV, targets_n in zip(gradient_NV.split(rows), targets_N.split(rows), strict=True):
            log_probabilities_nV = logits_nV.log_softmax(dim=-1)
            true_n = log_probabilities_nV.gather(1, targets_n[:, None]).squeeze(1)
            losses.append(-(1 - label_smoothing) * true_n - uniform * log_probabilities_nV.sum(dim=-1))
            torch.exp(log_probabilities_nV, out=logits_nV)
            if uniform:
                logits_nV.sub_(uniform)
            logits_nV.scatter_add_(1, targets_n[:, None], logits_nV.new_full((len(targets_n), 1), label_smoothing - 1))
        ctx.gradient_NV = gradient_NV
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient_NV is None:
            raise RuntimeError("this cross-entropy can be differentiated once: its gradient was written in place")
        gradient_NV, ctx.gradient_NV = ctx.gradient_NV, None
        return gradient_NV.mul_(gradients[0][:, None]), None, None
