"""The meaning of attention over a scale: each query's visible keys are gathered, and nothing else is read.

Shapes: B batch, H heads, Q queries, K keys, D head width, V keys that one query sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar_core.kernels.backend import Backend
from mvar_core.pyramid import AttentionPattern

QUERIES_AT_ONCE = 64
"""Queries whose gathered keys are held at a time; every query has a copy of its keys."""


def attend_reference(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    """Attention over `pattern.visible_keys` alone, whatever the other keys hold, in float32 or better."""
    accumulate = torch.promote_types(q_BHQD.dtype, torch.float32)
    visible_QV = torch.tensor([pattern.visible_keys(query) for query in range(pattern.queries)], device=q_BHQD.device)
    outputs = []
    for q_BHqD, visible_qV in zip(q_BHQD.split(QUERIES_AT_ONCE, dim=2), visible_QV.split(QUERIES_AT_ONCE), strict=True):
        k_BHqVD = k_BHKD[:, :, visible_qV].to(accumulate)
        v_BHqVD = v_BHKD[:, :, visible_qV].to(accumulate)
        scores_BHqV = scale * torch.einsum("bhqd,bhqvd->bhqv", q_BHqD.to(accumulate), k_BHqVD)
        outputs.append(torch.einsum("bhqv,bhqvd->bhqd", scores_BHqV.softmax(dim=-1), v_BHqVD))
    return torch.cat(outputs, dim=2).to(q_BHQD.dtype)


BACKEND = Backend("reference", attend_reference, not_chosen=lambda call: "it is slow, made to be compared with")
