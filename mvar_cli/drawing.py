"""Drawing samples shard by shard, in one process or several, each writing while it draws."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import typer
from numpy.typing import NDArray

from mvar_cli.old_console import Progress
from mvar_cli.parts import Parts
from mvar_cli.processes import Processes
from mvar_core.errors import DataError, MvarError
from mvar_core.sampling.writers import WriterPool

if TYPE_CHECKING:
    from mvar_core.pipeline import Pipeline

SECONDS_BETWEEN_LOOKS = 0.5
"""How often the first process looks for what the others have finished."""

Value = TypeVar("Value")


class Chunk(NamedTuple):
    """Samples that are ready, in the order in which they were asked for.

    Attributes:
        images: uint8 (B, H, W, 3).
        tokens: (B, L).
        stages: uint8 (B, S, H, W, 3), where asked for.
    """

    images: NDArray[np.uint8]
    tokens: NDArray[np.integer]
    stages: NDArray[np.uint8] | None


Draw = Callable[[Sequence[int], Sequence[int], Callable[[int, int], None]], Iterable[Chunk]]
"""draw(labels, indices, progress) gives the samples of these labels and global numbers in chunks of any size."""


def pipeline_draws(
    pipeline: Pipeline, conditions_of: Callable[[Sequence[int]], NDArray | None] = lambda _: None, **settings: Any
) -> Draw:
    """How a pipeline draws with settings of `Pipeline.stream`.

    Args:
        pipeline: The model.
        conditions_of: The vectors of samples of some global numbers; None where labels say what they are.
        **settings: Of `Pipeline.stream`.
    """

    def draw(labels: Sequence[int], indices: Sequence[int], progress: Callable[[int, int], None]) -> Iterator[Chunk]:
        conditions = conditions_of(indices)
        for samples in pipeline.stream(labels, conditions=conditions, indices=indices, progress=progress, **settings):
            stages = samples.stages.numpy() if samples.stages is not None else None
            yield Chunk(samples.images.numpy(), samples.tokens.numpy(), stages)

    return draw


def draw_shards(parts: Parts, shards: Sequence[int], draw: Draw, progress: Progressing, pool: WriterPool) -> None:
    """Draw some shards and write each as soon as it is complete.

    Chunks may cross the borders of shards, so that how many samples run together does not depend on them.

    Raises:
        DataError: The disk is full.
    """
    request = parts.request
    indices = [index for shard in shards for index in request.span(shard)]
    labels = request.labels[indices].tolist() if indices else []
    rest: list[Chunk] = []
    remaining = iter(shards)
    shard = next(remaining, None)
    try:
        with pool:
            for chunk in draw(labels, indices, progress.own):
                rest.append(chunk)
                while shard is not None and sum(len(one.images) for one in rest) >= len(request.span(shard)):
                    complete, rest = _split(rest, len(request.span(shard)))
                    pool.submit(parts.write, shard, complete.images, complete.tokens, complete.stages)
                    shard = next(remaining, None)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"The disk of {parts.directory} is full; {len(parts.present())} of {len(request.shards)} parts are kept.",
            "Free some space, then the same command goes on from there.",
        ) from None


class Progressing:
    """One process's progress joined with what the files say of the others'.

    Args:
        parts: Where all processes write.
        kept: Shards that were there before.
        own: Shards that this process draws.
        report: Called as report(done, total), in samples of all processes.
    """

    def __init__(self, parts: Parts, kept: set[int], own: Sequence[int], report: Progress):
        self.parts = parts
        self.report = report
        self._resumed = parts.samples_in(kept)
        self._not_others = kept | set(own)
        self._own_done = self._others_done = 0
        self._looked = time.monotonic()
        self._alone = len(self._not_others) == len(parts.request.shards)
        self._tell()

    def own(self, done: int, total: int) -> None:
        """This process has drawn `done` samples of its `total`."""
        self._own_done = done
        if not self._alone and time.monotonic() - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._look()
        self._tell()

    def wait_for_others(self) -> None:
        """Come back when every shard of every process is there."""
        while not self._alone and self._look() < self.parts.request.total:
            self._tell()
            time.sleep(SECONDS_BETWEEN_LOOKS / 5)
        self._tell()

    def _look(self) -> int:
        self._others_done = self.parts.samples_in(self.parts.present() - self._not_others)
        self._looked = time.monotonic()
        return self._resumed + self._own_done + self._others_done

    def _tell(self) -> None:
        self.report(self._resumed + self._own_done + self._others_done, self.parts.request.total)


def agreed(team: Processes, compute: Callable[[], Value]) -> Value:
    """What `compute` gives in the first process, in all; a problem it finds there ends all, and is told once.

    Raises:
        MvarError: In the first process.
        typer.Exit: In the others.
    """

    def attempt() -> tuple[Value | None, Exception | None]:
        try:
            return compute(), None
        except (MvarError, OSError) as error:
            return None, error

    value, error = team.from_first(attempt)
    if error is not None:
        if team.first:
            raise error
        raise typer.Exit(1)
    return value  # type: ignore[return-value]


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM, with which batch systems and launchers end processes, is taken as Ctrl-C (in the main thread alone)."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _split(chunks: list[Chunk], count: int) -> tuple[Chunk, list[Chunk]]:
    """The first `count` samples, and the rest."""
    taken: list[Chunk] = []
    rest = list(chunks)
    while count:
        chunk = rest.pop(0)
        if len(chunk.images) > count:
            rest.insert(0, _rows(chunk, slice(count, None)))
            chunk = _rows(chunk, slice(count))
        taken.append(chunk)
        count -= len(chunk.images)
    if len(taken) == 1:
        return taken[0], rest
    stages = [chunk.stages for chunk in taken if chunk.stages is not None]
    joined = Chunk(
        np.concatenate([chunk.images for chunk in taken]),
        np.concatenate([chunk.tokens for chunk in taken]),
        np.concatenate(stages) if stages else None,
    )
    return joined, rest


def _rows(chunk: Chunk, rows: slice) -> Chunk:
    return Chunk(*(array[rows] if array is not None else None for array in chunk))  # type: ignore[arg-type]
