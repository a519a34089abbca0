"""Threads that encode and write while the model computes the next images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from mvar_core.distributed import available_cores

LARGEST_POOL = 4


class WriterPool:
    """A few threads with a short queue: `submit` waits while it is full, so that memory stays bounded.

    The first error of a thread is raised by the next `submit`, or where the block ends. If the block ends by an
    interruption, everything submitted is finished; if it ends by an error, what has not begun is dropped.

    Args:
        threads: How many; by default half of this process's cores, at most four.
        waiting: Pieces of work that may wait in addition to those in progress.
        processes: Processes of this job on this machine, which share its cores.
    """

    def __init__(self, threads: int | None = None, waiting: int = 1, processes: int = 1):
        threads = threads or max(1, min(LARGEST_POOL, available_cores() // (2 * processes)))
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="mvar-writer")
        self._slots = threading.BoundedSemaphore(threads + waiting)
        self._futures: set[Future[Any]] = set()
        self._error: BaseException | None = None

    def __enter__(self) -> WriterPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = kind is not None and not issubclass(kind, KeyboardInterrupt)
        try:
            if not failed:
                self.finish()
        finally:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run `work(*arguments)` in a thread; waits for a free slot."""
        self._slots.acquire()
        self._raise_error()
        future = self._executor.submit(self._run, work, arguments)
        self._futures = {one for one in self._futures if not one.done()} | {future}

    def finish(self) -> None:
        """Wait until all submitted work is done."""
        for future in list(self._futures):
            future.result()
        self._raise_error()

    def _run(self, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            if self._error is None:
                work(*arguments)
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._slots.release()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
