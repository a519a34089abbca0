"""Times of attention over one scale: sides × windows × backends, every figure beside that of dense attention.

Backends take turns within each repetition, so that a machine that slows down slows all of them, and each figure is a
median. On CUDA the device's own events measure; elsewhere the clock does.
"""

# Shape suffixes: B batch, H heads, Q queries, K keys, D head width.

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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

    Args:
        sides: One side, or (height, width), per scale, in tokens.
        windows: Sides of the windows; 0 is the whole scale.
        backends: Names that `attend` takes, for example "dense" and "tiled"; "auto" is another name for one of them.
        heads: Attention heads, H.
        head_dim: Width of a head, D.
        batch: Images at a time, B.
        dtype: Of queries, keys and values.
        device: Where to measure.
        backward: Measure the forward and the backward pass together, rather than the forward pass alone.
        repeats: Repetitions that the median is taken of.
        progress: Called with a few words before each side and window.

    Returns:
        One row for each side, window and backend: `side`, `tokens`, `window`, `backend`, `dtype`, `device`, `batch`,
        `heads`, `head_dim`, `backward`; `seconds` of one call (None where the backend cannot run, with the `reason`);
        `times_dense` (how many times faster than dense, None without dense among `backends`); `peak_bytes` (what
        the call allocates at most, output included, on CUDA; None elsewhere); `auto` (the backend that "auto" picks
        here) and `chosen` (whether that is this row's).
    """
    place = torch.device(device)
    rows: list[dict[str, Any]] = []
    for side in sides:
        for window in windows:
            grid = Grid(side, side) if isinstance(side, int) else Grid(*side)
            pattern = AttentionPattern(grid, window)
            if progress is not None:
                progress(f"{grid}, window {window}")
            found = _measure(pattern, backends, (batch, heads, head_dim), dtype, place, backward, repeats)
            dense = found.get("dense", (None, None, None))[0]
            auto = select_backend("auto", AttentionCall(pattern, place, dtype, needs_grad=backward)).name
            for name, (seconds, peak_bytes, reason) in found.items():
                rows.append(
                    {
                        "side": grid.height if grid.height == grid.width else list(grid),
                        "tokens": grid.tokens,
                        "window": window,
                        "backend": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "device": place.type,
                        "batch": batch,
                        "heads": heads,
                        "head_dim": head_dim,
                        "backward": backward,
                        "seconds": seconds,
                        "times_dense": dense / seconds if dense is not None and seconds is not None else None,
                        "peak_bytes": peak_bytes,
                        "reason": reason,
                        "auto": auto,
                        "chosen": name in (auto, "auto"),
                    }
                )
    return rows


def _measure(
    pattern: AttentionPattern,
    backends: Sequence[str],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    repeats: int,
) -> dict[str, tuple[float | None, int | None, str | None]]:
    """Seconds, peak bytes and the reason why there are none, of each backend on one pattern."""
    batch, heads, head_dim = shape
    random = generator("attention_sweep", pattern.queries, pattern.window)

    def normal() -> Tensor:
        x_BHQD = torch.randn(batch, heads, pattern.queries, head_dim, generator=random)
        return x_BHQD.to(device, dtype).requires_grad_(backward)

    q_BHQD, k_BHKD, v_BHKD = inputs = normal(), normal(), normal()
    gradient_BHQD = normal().detach()

    def run(name: str) -> None:
        with torch.set_grad_enabled(backward):
            o_BHQD = attend(q_BHQD, k_BHKD, v_BHKD, pattern, scale=head_dim**-0.5, backend=name)
            if backward:
                torch.autograd.grad(o_BHQD, inputs, gradient_BHQD)

    found: dict[str, tuple[float | None, int | None, str | None]] = {}
    calls: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    for name in backends:
        try:
            run(name)  # whatever is compiled or kept is compiled and kept now
        except BackendError as error:
            found[name] = (None, None, str(error))
            continue
        once = _seconds(run, name, 1, device)
        calls[name] = max(1, round(SECONDS_AT_ONCE / max(once, 1e-7)))
        peaks[name] = _peak_bytes(run, name, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, count in calls.items():
            times[name].append(_seconds(run, name, count, device))
    found |= {name: (statistics.median(values), peaks[name], None) for name, values in times.items()}
    return {name: found[name] for name in backends}


def _seconds(run: Callable[[str], None], name: str, calls: int, device: torch.device) -> float:
    """Seconds of one call, the mean of `calls` of them in a row."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            run(name)
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000 / calls
    begun = time.perf_counter()
    for _ in range(calls):
        run(name)
    if device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - begun) / calls


def _peak_bytes(run: Callable[[str], None], name: str, device: torch.device) -> int | None:
    """What a call allocates at most beyond its inputs, where the device counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(name)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
