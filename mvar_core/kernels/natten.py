"""Windowed attention by NATTEN, whose definition of a window is ours.

NATTEN's compiled kernels (libnatten, CUDA) are made for large windowed scales. Without them it still runs, through an
unfused FlexAttention that makes the whole matrix of scores: good for comparisons, not for speed.

Shapes: B batch, H heads, Q queries, K keys, D head width, P prefix keys.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_core.kernels.backend import AttentionCall, Backend, beyond_flex
from mvar_core.kernels.dense import attend_dense
from mvar_core.kernels.flex import padded
from mvar_core.kernels.tiled import differentiable
from mvar_core.pyramid import AttentionPattern


def attend_natten(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    """Attention by NATTEN's kernels where they are, else through FlexAttention."""
    if pattern.window_grid.tokens == 1:  # NATTEN has no window of one
        return attend_dense(q_BHQD, k_BHKD, v_BHKD, pattern, scale)
    if _has_kernels(q_BHQD.device):
        return _attend_kernels(q_BHQD, k_BHKD, v_BHKD, pattern, scale)
    # FlexAttention refuses tensors that require gradients on a CPU, and elsewhere, uncompiled, it would keep the whole
    # matrix of scores.
    return differentiable(_attend_flex, q_BHQD, k_BHKD, v_BHKD, pattern, scale)


def _attend_kernels(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    """NATTEN's compiled kernels, which have a backward pass of their own and accept the prefix as additional keys."""
    width = q_BHQD.shape[-1]
    # The kernels accept head widths in multiples of 8; zeros add nothing to a product.
    q_BHQD, k_BHKD, v_BHKD = (F.pad(x, (0, -width % 8)) for x in (q_BHQD, k_BHKD, v_BHKD))
    prefix = {}
    if pattern.prefix_tokens:
        k_BPHD, v_BPHD = (x[:, :, : pattern.prefix_tokens].transpose(1, 2) for x in (k_BHKD, v_BHKD))
        prefix = {"additional_keys": k_BPHD.contiguous(), "additional_values": v_BPHD.contiguous()}
    o_BHQD, _ = _neighborhood_attention(q_BHQD, k_BHKD, v_BHKD, pattern, scale, **prefix)
    return o_BHQD[..., :width]


def _attend_flex(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    """NATTEN through FlexAttention, forward only; the prefix is attended apart and merged in by weight."""
    width = q_BHQD.shape[-1]
    q_BHQD, k_BHKD, v_BHKD = map(padded, (q_BHQD, k_BHKD, v_BHKD))
    with warnings.catch_warnings():
        # NATTEN calls FlexAttention uncompiled, with an argument that newer torch renames; both are NATTEN's choice.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", message="return_lse is deprecated")
        o_BHQD, own_lse_BHQ1 = _neighborhood_attention(q_BHQD, k_BHKD, v_BHKD, pattern, scale)
    if pattern.prefix_tokens:
        k_BHPD, v_BHPD = (x[:, :, : pattern.prefix_tokens].float() for x in (k_BHKD, v_BHKD))
        scores_BHQP = scale * (q_BHQD.float() @ k_BHPD.mT)
        lse_BHQ1 = torch.logaddexp(own_lse_BHQ1, scores_BHQP.logsumexp(dim=-1, keepdim=True))
        o_BHQD = (own_lse_BHQ1 - lse_BHQ1).exp() * o_BHQD + (scores_BHQP - lse_BHQ1).exp() @ v_BHPD
    return o_BHQD[..., :width].to(q_BHQD.dtype)


def _neighborhood_attention(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """NATTEN's output (B, H, Q, D) and logarithm of the sum of exponentials (B, H, Q, 1).

    NATTEN accepts (B, sides…, H, D) and no window below 2, so an axis of a single position is left out.
    """
    from natten.functional import na1d, na2d

    sides = tuple(side for side in pattern.grid if side > 1)
    window = tuple(side for side in pattern.window_grid if side > 1)
    # Contiguous, because NATTEN's merge of additional keys accepts no other layout than the kernels' output.
    q, k, v = (
        x[:, :, -pattern.queries :].transpose(1, 2).unflatten(1, sides).contiguous() for x in (q_BHQD, k_BHKD, v_BHKD)
    )
    function = na2d if len(sides) == 2 else na1d
    output, lse = function(q, k, v, kernel_size=window, scale=scale, return_lse=True, **options)
    return output.flatten(1, len(sides)).transpose(1, 2), lse.unsqueeze(-1).flatten(1, len(sides)).transpose(1, 2)


def _has_kernels(device: torch.device) -> bool:
    import natten

    return device.type == "cuda" and bool(natten.HAS_LIBNATTEN)


def _cannot_run(call: AttentionCall) -> str | None:
    try:
        import natten  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "natten":
            return "natten is not installed (pip install --no-build-isolation 'mvar[natten]')"
        return f"natten cannot be imported: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"natten cannot be imported: {error}"
    return beyond_flex(call, "natten")


def _not_chosen(call: AttentionCall) -> str | None:
    if not call.pattern.is_windowed:
        return "there is no window to gain from"
    if call.device.type != "cuda":
        return f"it has no kernels for {call.device.type} and would make the whole matrix of scores"
    if _cannot_run(call) is None and not _has_kernels(call.device):
        return "it was built without libnatten and would make the whole matrix of scores"
    return None


BACKEND = Backend("natten", attend_natten, _cannot_run, _not_chosen)
