"""A sign of life between processes, so that none waits for one whose machine is gone.

A process that fails closes its connections, and the others notice at once. One whose machine loses power or network
does not, and what waits for it would wait for the collectives' timeout, which must be long: writing a checkpoint may
take many minutes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

SECONDS_BETWEEN = 3.0
SECONDS_OF_SILENCE = 30.0

_ENDED = "mvar/ended"


class Heartbeat:
    """A thread that shows, for as long as it is entered, that this process lives, and ends it when another does not.

    The first process watches all others, and all others watch the first one.

    Args:
        rank: This process's number.
        count: How many there are.
        between: Seconds between two signs of life.
        silence: Seconds without any after which a process counts as dead.
    """

    def __init__(self, rank: int, count: int, between: float = SECONDS_BETWEEN, silence: float = SECONDS_OF_SILENCE):
        self.rank = rank
        self.watched = range(1, count) if rank == 0 else range(1)
        self.count = count
        self.between = between
        self.silence = silence
        self._beats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stopped = threading.Event()
        # Not a daemon: one that is inside the store when the interpreter ends would abort the process.
        self._thread = threading.Thread(target=self._run, name="mvar-heartbeat")

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def problem(self, store: Any, now: float) -> str | None:
        """Give a sign of life and look for the others'; what is wrong, if anything is.

        Args:
            store: The store that all processes share.
            now: Seconds on any clock that does not jump.
        """
        self._beats += 1
        store.set(f"mvar/beat/{self.rank}", str(self._beats))
        if store.check([_ENDED]):
            return store.get(_ENDED).decode()
        for rank in self.watched:
            key = f"mvar/beat/{rank}"
            beat = store.get(key) if store.check([key]) else b""
            known, since = self._seen.get(rank, (None, now))
            if beat != known:
                self._seen[rank] = (beat, now)
            elif beat != b"done" and now - since > self.silence:
                text = f"process {rank + 1} of {self.count} has not been heard from for {now - since:.0f} s"
                store.set(_ENDED, text)
                return text
        return None

    def _run(self) -> None:
        import datetime

        import torch.distributed as dist

        # A connection of its own: on a shared one, what the main thread waits for would hold up the signs of life.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=self.silence),
        )
        while True:
            try:
                problem = self.problem(store, time.monotonic())
            except (RuntimeError, ConnectionError) as error:
                problem = f"the first machine of the job cannot be reached: {' '.join(str(error).split())[:200]}"
            if problem is not None and not self._stopped.is_set():
                self._end(problem)
            if self._stopped.wait(self.between):
                with suppress(RuntimeError, ConnectionError):
                    store.set(f"mvar/beat/{self.rank}", "done")
                return

    def _end(self, problem: str) -> None:
        """End this process from its thread: the main one may be waiting inside a collective, where nothing reaches."""
        from mvar_cli.launch import report

        report(
            f"error: {problem}. Run the same command again: what can be resumed goes on from where it was last saved.",
            consequence=True,
        )
        sys.stderr.flush()
        os._exit(1)
