"""Windowed attention by PyTorch's FlexAttention, which skips the blocks of keys that no query of a block sees.

On CUDA it is compiled, once for each pattern, dtype and number of heads, and has a backward pass. On a CPU it has none,
and compiling takes seconds a pattern for a kernel that is several times slower than tiles; so there it runs uncompiled,
which makes the whole matrix of scores: good for comparisons, not for speed. It is imported where it is used, because it
brings torch's compiler with it.

Shapes: B batch, H heads, Q queries, K keys, D head width, N tokens of the scale, R blocks of queries, C blocks of keys.
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from mvar_core.kernels.backend import AttentionCall, Backend, any_needs_grad, axis_visibility, beyond_flex
from mvar_core.kernels.tiled import differentiable
from mvar_core.pyramid import AttentionPattern

BLOCK = 128
"""Queries and keys of a block, the size for which FlexAttention's own kernels are made."""

SMALLEST_WIDTH = 16
"""Head widths are padded to powers of two from here on, which every version of FlexAttention's kernels accepts."""

WORTHWHILE_SHARE = 0.5
""""auto" chooses FlexAttention where it visits at most this share of the blocks; by counting, not measured."""


def attend_flex(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    """Attention by FlexAttention; whole scales, which need no mask, go to SDPA."""
    if not pattern.is_windowed:
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, scale=scale)
    if q_BHQD.device.type == "cpu":
        return differentiable(_attend_uncompiled, q_BHQD, k_BHKD, v_BHKD, pattern, scale)
    return _attend_compiled(q_BHQD, k_BHKD, v_BHKD, pattern, scale)


def _attend_compiled(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    width = q_BHQD.shape[-1]
    q_BHQD, k_BHKD, v_BHKD = map(padded, (q_BHQD, k_BHKD, v_BHKD))
    sizes = (q_BHQD.shape[1], q_BHQD.shape[-1])
    attend = _compiled(pattern, q_BHQD.device, q_BHQD.dtype, sizes, scale, any_needs_grad(q_BHQD, k_BHKD, v_BHKD))
    return attend(q_BHQD, k_BHKD, v_BHKD)[..., :width]


def _attend_uncompiled(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, pattern: AttentionPattern, scale: float
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(pattern, q_BHQD.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        o_BHQD = flex_attention(padded(q_BHQD), padded(k_BHKD), padded(v_BHKD), block_mask=mask, scale=scale)
    assert isinstance(o_BHQD, Tensor)
    return o_BHQD[..., : q_BHQD.shape[-1]]


def padded(x_BHND: Tensor) -> Tensor:
    """Zeros up to a head width that the kernels accept; they add nothing to a product."""
    width = x_BHND.shape[-1]
    padding = max(SMALLEST_WIDTH, 1 << (width - 1).bit_length()) - width
    return F.pad(x_BHND, (0, padding)) if padding else x_BHND


_names = itertools.count()


@lru_cache(maxsize=512)
def _compiled(
    pattern: AttentionPattern,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    scale: float,
    needs_grad: bool,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention for one pattern, kept; another batch size makes the batch dynamic, and a third compiles nothing.

    PyTorch limits how often the code of one function may be compiled, and counts per code object. So each pattern has a
    code object of its own, or a model with many scales would run into the limit.
    """
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(pattern, device)

    @no_type_check
    def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor) -> Tensor:
        o_BHQD = flex_attention(q_BHQD, k_BHKD, v_BHKD, block_mask=mask, scale=scale)
        assert isinstance(o_BHQD, Tensor)
        return o_BHQD

    attend.__code__ = attend.__code__.replace(co_name=f"attend_flex_{next(_names)}")
    return torch.compile(attend, fullgraph=True)


@lru_cache(maxsize=64)
def block_mask(pattern: AttentionPattern, device: torch.device) -> Any:
    """The BlockMask: which blocks of keys a block of queries visits, and who sees whom within those; made once.

    Made block by block, because FlexAttention's own way holds several matrices of queries × keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # Tensors made under inference_mode could not be kept for a later backward pass.
    with torch.inference_mode(False):
        partly_RC, wholly_RC = _blocks(pattern)
        blocks = (*_ordered(partly_RC, device), *_ordered(wholly_RC, device))
        lengths = (pattern.queries, pattern.keys)
        return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=_visibility(pattern), seq_lengths=lengths)


# Checks of types that tests add to every function would be compiled with it.
@no_type_check
def _visibility(pattern: AttentionPattern) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's question whether a query sees a key."""
    prefix = pattern.prefix_tokens
    height, width = pattern.grid
    window_height, window_width = pattern.window_grid

    def sees(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        top = (query // width - window_height // 2).clamp(0, height - window_height)
        left = (query % width - window_width // 2).clamp(0, width - window_width)
        own = key - prefix
        row, column = own // width - top, own % width - left
        inside = (row >= 0) & (row < window_height) & (column >= 0) & (column < window_width)
        return (key < prefix) | inside

    return sees


def _blocks(pattern: AttentionPattern) -> tuple[Bool[Tensor, "R C"], Bool[Tensor, "R C"]]:
    """Blocks of keys of which a block of queries sees some, and those of which every query sees every key."""
    (height, width), window = pattern.grid, pattern.window_grid
    rows, columns = axis_visibility(height, window.height), axis_visibility(width, window.width)
    keys = -(-pattern.keys // BLOCK) * BLOCK
    partly, wholly = [], []
    for first in range(0, pattern.queries, BLOCK):
        query = torch.arange(first, min(first + BLOCK, pattern.queries))
        own_qN = (rows[query // width][:, :, None] & columns[query % width][:, None, :]).flatten(1)
        # What lies beyond the last query or key is seen by none, so that its block never counts as wholly visible.
        seen = torch.zeros(BLOCK, keys, dtype=torch.bool)
        seen[: len(query), : pattern.prefix_tokens] = True
        seen[: len(query), pattern.prefix_tokens : pattern.keys] = own_qN
        by_block = seen.unflatten(1, (-1, BLOCK)).transpose(0, 1).flatten(1)
        wholly.append(by_block.all(dim=1))
        partly.append(by_block.any(dim=1) & ~wholly[-1])
    return torch.stack(partly), torch.stack(wholly)


def _ordered(visited_RC: Bool[Tensor, "R C"], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks each row visits (1, 1, R), and their indices before all others (1, 1, R, C)."""
    index_RC = visited_RC.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    counts_R = visited_RC.sum(dim=1)
    return counts_R[None, None].to(device, torch.int32), index_RC[None, None].to(device, torch.int32).contiguous()


@lru_cache(maxsize=256)
def visited_share(pattern: AttentionPattern) -> float:
    """Share of the blocks of queries × keys that FlexAttention visits."""
    partly_RC, wholly_RC = _blocks(pattern)
    return (partly_RC | wholly_RC).float().mean().item()


def _cannot_run(call: AttentionCall) -> str | None:
    if call.device.type != "cuda":
        return beyond_flex(call, "FlexAttention")
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention is compiled by triton, which is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(call.device) < (7, 0):
        return "FlexAttention's compiler needs a GPU of compute capability 7.0 or later"
    return beyond_flex(call, "FlexAttention")


def _not_chosen(call: AttentionCall) -> str | None:
    if not call.pattern.is_windowed:
        return "there is no window to gain from"
    if call.device.type != "cuda":
        return f"it is not compiled on {call.device.type} and would make the whole matrix of scores"
    if visited_share(call.pattern) > WORTHWHILE_SHARE:
        return "its blocks are so large that it would skip less than half of them"
    return None


BACKEND = Backend("flex", attend_flex, _cannot_run, _not_chosen)
