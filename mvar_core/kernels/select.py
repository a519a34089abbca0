"""Attention over one scale by the backend that was chosen or by the best that can run.

Shapes: B batch, H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from mvar_core.errors import BackendError, nearest
from mvar_core.kernels import dense, flex, natten, reference, tiled
from mvar_core.kernels.backend import AttentionCall, Backend, any_needs_grad
from mvar_core.pyramid import AttentionPattern, Grid

BACKENDS: tuple[Backend, ...] = (natten.BACKEND, flex.BACKEND, tiled.BACKEND, dense.BACKEND, reference.BACKEND)
"""All backends, in the order in which "auto" considers them."""

BACKEND_NAMES: tuple[str, ...] = ("auto", *sorted(backend.name for backend in BACKENDS))
"""What `attend` accepts as `backend`."""

logger = logging.getLogger("mvar")


def attend(
    q_BHQD: Float[Tensor, "B H Q D"],
    k_BHKD: Float[Tensor, "B H K D"],
    v_BHKD: Float[Tensor, "B H K D"],
    pattern: AttentionPattern,
    *,
    scale: float,
    backend: str = "auto",
) -> Float[Tensor, "B H Q D"]:
    """softmax(scale · q kᵀ) v, where each query sees the keys that `pattern` shows (MVAR's spatial-Markov attention).

    Under autocast, queries, keys and values are cast to its dtype, as scaled_dot_product_attention does.

    Queries are those of one scale in raster order; keys and values are the visible tokens of earlier scales first, then
    those of the scale itself. A `backend` that is named never falls back: BackendError where it cannot run this call.
    """
    assert q_BHQD.shape[2] == pattern.queries, f"{q_BHQD.shape[2]} queries, but the pattern has {pattern.queries}"
    assert k_BHKD.shape[2] == pattern.keys, f"{k_BHKD.shape[2]} keys, but the pattern has {pattern.keys}"
    device = q_BHQD.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        q_BHQD, k_BHKD, v_BHKD = q_BHQD.to(dtype), k_BHKD.to(dtype), v_BHKD.to(dtype)
    call = AttentionCall(pattern, device, q_BHQD.dtype, any_needs_grad(q_BHQD, k_BHKD, v_BHKD))
    return select_backend(backend, call).attend(q_BHQD, k_BHKD, v_BHKD, pattern, scale)


@lru_cache(maxsize=1024)
def select_backend(name: str, call: AttentionCall) -> Backend:
    """The backend of that name, or the one that "auto" stands for; BackendError where it cannot run the call."""
    if name != "auto":
        backend = next((backend for backend in BACKENDS if backend.name == name), None)
        if backend is None:
            raise BackendError(f"--attention {name!r} is not a backend. {nearest(name, BACKEND_NAMES)}")
        if reason := backend.cannot_run(call):
            raise BackendError(f"--attention {name}: {reason}.", "Use --attention auto, or see `mvar doctor`.")
        return backend
    passed_over = ""
    for backend in BACKENDS:
        # In this order, because `cannot_run` may import a package, and `not_chosen` never does.
        reason = backend.not_chosen(call) or backend.cannot_run(call)
        if reason is None:
            kind = "windowed" if call.pattern.is_windowed else "whole"
            _log_once(f"--attention auto: {backend.name} for {kind} scales on {call.device.type}{passed_over}")
            return backend
        passed_over += f"; not {backend.name}: {reason}"
    raise AssertionError("dense runs everything")


def check_backend(
    name: str,
    patterns: Iterable[AttentionPattern],
    device: torch.device,
    dtype: torch.dtype,
    *,
    needs_grad: bool = False,
) -> None:
    """Refuse, before slow work starts, a backend that does not exist or cannot run one of the patterns."""
    for pattern in patterns:
        select_backend(name, AttentionCall(pattern, device, dtype, needs_grad))


def available_backends(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[tuple[str, str | None]]:
    """Every backend's name, with the reason why it cannot run windowed attention on the device, or None."""
    example = AttentionCall(AttentionPattern(Grid(16, 16), window=7), torch.device(device), dtype)
    return [(backend.name, backend.cannot_run(example)) for backend in BACKENDS]


@lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    if not torch.compiler.is_compiling():  # a log record would break the compiled block in two
        logger.info(message)
