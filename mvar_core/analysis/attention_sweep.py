"""Times of attention over one scale: sides × windows × backends, each next to that of dense attention.

Backends take turns within each repetition, so that a machine that slows down slows all of them, and each time is a
median.
"""

# Shape suffixes: B batch, H heads, Q queries, K keys, D head width.

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mvar_core.analysis.measure import allocation_peak, seconds_of
from mvar_core.errors import BackendError
from mvar_core.kernels import attend
from mvar_core.kernels.backend import AttentionCall
from mvar_core.kernels.select import select_backend
from mvar_core.pyramid import AttentionPattern, Grid
from mvar_core.runtime import generator

SECONDS_AT_ONCE = 0.005
"""Short calls are repeated until they take this long together, so that the clock's own grain does not count."""


def sweep(
    sides: Sequence[int | tuple[int, int]],
    windows: Sequence[int],
    backends: Sequence[str],
    *,
    heads: int = 16,
    head_dim: int = 64,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backward: bool = False,
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure `attend` with random inputs.

    The `sides` are one side, or (height, width), per scale in tokens; `windows` are sides, 0 for the whole scale;
    `backends` are names that `attend` accepts. With `backward` the forward and the backward pass are measured together.
    Before each side and window, `progress` is called with a few words.

    Returns:
        One row for each side, window and backend, with what was measured (`name` to `backward`); `seconds` of one call
        (None where the backend cannot run, with the `reason`) and `images_per_second`; `times_dense` (how many times
        faster than dense); `peak_memory_bytes` (what the call allocates at most, on CUDA); `auto` (the backend that
        "auto" picks here) and `chosen` (whether that is this row's).
    """
    place = torch.device(device)
    rows: list[dict[str, Any]] = []
    for side, window in itertools.product(sides, windows):
        grid = Grid(side, side) if isinstance(side, int) else Grid(*side)
        pattern = AttentionPattern(grid, window)
        if progress is not None:
            progress(f"{grid}, window {window}")
        found = _measure(pattern, backends, (batch, heads, pattern.queries, head_dim), dtype, place, backward, repeats)
        dense = found.get("dense", {}).get("seconds")
        auto = select_backend("auto", AttentionCall(pattern, place, dtype, needs_grad=backward)).name
        square, seen = grid.height == grid.width, f"window {window}" if window else "whole"
        for name, measured in found.items():
            seconds, peak = measured.get("seconds"), measured.get("peak_bytes")
            rows.append(
                {
                    "name": f"{name}, side {grid.height if square else grid}, {seen}",
                    "side": grid.height if square else list(grid),
                    "tokens": grid.tokens,
                    "window": window,
                    "backend": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "device": place.type,
                    "batch": batch,
                    "batch_size": batch,
                    "heads": heads,
                    "head_dim": head_dim,
                    "backward": backward,
                    "seconds": seconds,
                    "times_dense": dense / seconds if dense is not None and seconds is not None else None,
                    "images_per_second": batch / seconds if seconds else None,
                    "peak_bytes": peak,
                    "peak_memory_bytes": peak,
                    "kv_cache_bytes": 0,
                    "reason": measured.get("reason"),
                    "auto": auto,
                    "chosen": name in (auto, "auto"),
                }
            )
    return rows


def _measure(
    pattern: AttentionPattern,
    backends: Sequence[str],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """`seconds` and `peak_bytes` of each backend on one pattern, or the `reason` why there are none."""
    random = generator("attention_sweep", pattern.queries, pattern.window)
    q_BHQD, k_BHKD, v_BHKD, gradient_BHQD = (
        torch.randn(shape, generator=random).to(device, dtype).requires_grad_(backward) for _ in range(4)
    )

    def run(name: str, calls: int = 1) -> None:
        with torch.set_grad_enabled(backward):
            for _ in range(calls):
                o_BHQD = attend(q_BHQD, k_BHKD, v_BHKD, pattern, scale=shape[-1] ** -0.5, backend=name)
                if backward:
                    torch.autograd.grad(o_BHQD, (q_BHQD, k_BHKD, v_BHKD), gradient_BHQD.detach())

    found: dict[str, dict[str, Any]] = {name: {} for name in backends}
    calls: dict[str, int] = {}
    for name in backends:
        try:
            run(name)  # whatever is compiled or kept is compiled and kept now
        except BackendError as error:
            found[name]["reason"] = str(error)
            continue
        calls[name] = max(1, round(SECONDS_AT_ONCE / max(seconds_of(partial(run, name), device), 1e-7)))
        if device.type == "cuda":
            with allocation_peak(device) as peak:
                run(name)
            found[name]["peak_bytes"] = peak.peak_bytes
    rounds = [
        {name: seconds_of(partial(run, name, count), device) / count for name, count in calls.items()}
        for _ in range(repeats)
    ]
    for name in calls:
        found[name]["seconds"] = statistics.median(each[name] for each in rounds)
    return found
