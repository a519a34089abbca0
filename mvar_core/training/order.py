"""Which rows a step trains on: a pure function of the step, so that a resumed run reads what it would have read."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

from mvar_core.config.training import TrainConfig
from mvar_core.errors import ConfigError, DataError

Fetched = TypeVar("Fetched")


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch.

    At 2.56 M rows this takes 0.1 s an epoch and 10 MB; a batch is then a look-up of microseconds. A Feistel network
    would need no memory and no such pause, but 0.25 ms for each batch of 448: more time over the epoch, for an order
    that is less than uniformly random.
    """
    permutation = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    permutation = permutation.astype(np.min_scalar_type(count - 1))
    permutation.flags.writeable = False  # it is shared through the cache
    return permutation


def batch_rows(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Rows (batch_size,) int64 of the step that follows `step` others, out of `count`; DataError where there are none.

    Each epoch is a fresh permutation, which depends on (seed, epoch) alone. A batch at the end of an epoch continues
    into the next, so that every row is seen equally often.
    """
    if count < 1:
        raise DataError("There is nothing to train on: the data holds no images.", "Check --data or --tokens.")
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, count)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _permutation(count, seed, int(epoch))[places[chosen]]
    return rows


def planned_steps(config: TrainConfig, rows: int) -> int:
    """How many optimizer steps a run takes: `steps` where given, else `epochs` passes over `rows`."""
    if config.steps is not None:
        return config.steps
    if config.epochs is None:
        raise ConfigError("Neither train.steps nor train.epochs is set.", "Add --steps or --epochs.")
    return max(1, math.ceil(config.epochs * rows / config.batch_size))


def prefetch(fetch: Callable[[int], Fetched], start: int, stop: int, ahead: int = 2) -> Generator[Fetched, None, None]:
    """Results of `fetch(start)` … `fetch(stop - 1)` in order, read by one thread while the caller computes.

    One thread, because sources of images need not be safe to read from several. `ahead` steps are read ahead; 0 reads
    in the caller's thread.
    """
    if ahead == 0:
        yield from map(fetch, range(start, stop))
        return
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mvar-batches")
    try:
        waiting: list[Future[Fetched]] = []
        for step in range(start, stop):
            waiting.append(executor.submit(fetch, step))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
