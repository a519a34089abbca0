"""What an attention backend is: a name, a function, and the reasons that speak against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mvar_core.pyramid import AttentionPattern


@dataclass(frozen=True)
class AttentionCall:
    """Everything about a call of `attend` that may decide which backend can run it; not the values.

    Attributes:
        pattern: Who attends to whom.
        device: Where the tensors are.
        dtype: The dtype of queries, keys and values.
        needs_grad: Whether gradients will be asked for.
    """

    pattern: AttentionPattern
    device: torch.device
    dtype: torch.dtype
    needs_grad: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over a scale.

    Attributes:
        name: What `--attention` calls it.
        attend: `(q_BHQD, k_BHKD, v_BHKD, pattern, scale) -> o_BHQD`, differentiable.
        cannot_run: The reason why it cannot run a call, or None.
        not_chosen: The reason why "auto" passes it over even where it can run, or None. It is asked first, so it must
            be quick: no import of a package that the answer may not need.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, AttentionPattern, float], Tensor]
    cannot_run: Callable[[AttentionCall], str | None]
    not_chosen: Callable[[AttentionCall], str | None]


def runs_everything(call: AttentionCall) -> str | None:
    """The predicate of a backend that has no limits."""
    return None
