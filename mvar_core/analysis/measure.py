"""Instruments: seconds on any device, also by stage, and the peak of what torch's allocators hand out."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mvar_core.runtime import synchronize

OTHER = "other"


@dataclass
class AllocationPeak:
    """Filled in when the block of `allocation_peak` ends: the peak beyond what was held before."""

    peak_bytes: int = 0


@contextmanager
def allocation_peak(device: torch.device | str = "cpu") -> Iterator[AllocationPeak]:
    """The most memory that torch's allocator hands out at once within the block.

    On CUDA the allocator's own counter is read. On a CPU torch's profiler records every allocation and release: all
    tensors and the scratch space that kernels get from torch's allocator, to the byte; not what libraries get from the
    system by themselves. Recording takes time. What was allocated before the block does not count, nor does its
    release.
    """
    place = torch.device(device)
    result = AllocationPeak()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        before = torch.cuda.memory_allocated(place)
        torch.cuda.reset_peak_memory_stats(place)
        yield result
        torch.cuda.synchronize(place)
        result.peak_bytes = torch.cuda.max_memory_allocated(place) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        yield result
    assert recorder.profiler is not None
    assert recorder.profiler.kineto_results is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorder.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    sizes = (size for _, size in sorted(events, key=lambda event: event[0]))
    result.peak_bytes = max(0, *itertools.accumulate(sizes, initial=0))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of `run`: by the device's own events on CUDA, elsewhere by the clock."""
    synchronize(device)
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000
    begun = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begun


class StageClock:
    """Charges time to stages while chosen methods of chosen objects run.

    At every boundary the device is waited for, so that the whole is a little slower than without the clock.
    """

    def __init__(self, device: torch.device):
        self.device, self._stage, self._since = device, OTHER, 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._watched = ExitStack()

    def watch(self, owner: Any, method: str, stage: str | Callable[..., str], then: str | None = None) -> None:
        """Charge calls of a method of `owner` to a stage, or to the one that a function of the call's arguments names.

        What follows a call belongs to the stage `then`, until the next boundary; by default to what was before.
        """
        original = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            outer = self._stage
            self._enter(stage if isinstance(stage, str) else stage(*arguments, **keywords))
            try:
                return original(*arguments, **keywords)
            finally:
                self._enter(then or outer)

        setattr(owner, method, timed)
        self._watched.callback(delattr, owner, method)

    def run(self, work: Callable[[], object]) -> dict[str, float]:
        """Seconds by stage of one run, in the order in which stages first appear; then the objects are as before."""
        with self._watched:
            self._seconds.clear()
            synchronize(self.device)
            self._stage, self._since = OTHER, time.perf_counter()
            work()
            self._enter(OTHER)
        ordered = dict(self._seconds)
        ordered[OTHER] = ordered.pop(OTHER, 0.0)
        return ordered

    def _enter(self, stage: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self._seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
