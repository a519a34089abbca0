"""How long work reports how far it is: one callback, the same for every function of the public face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called whenever some work is done; an exception that it raises ends the work."""

    def __call__(self, stage: str, done: int, total: int, *, unit: str = "images", note: str = "") -> None:
        """Report how many units of a stage, for example "tokenizing", are done, also by an earlier, interrupted run.

        `note` has further figures to show, for example the loss.
        """
        ...


def silent(stage: str, done: int, total: int, *, unit: str = "images", note: str = "") -> None:
    """Report to nobody."""


def stage(progress: Progress | None, name: str, unit: str = "images") -> Callable[[int, int], None]:
    """A callback (done, total) that reports as one stage of `progress`."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total, unit=unit)

    return report


def running_total(report: Callable[[int], None] | None) -> Callable[[int], None]:
    """A callback that is called with the units done since its last call, and reports how many are done in all."""
    done = 0

    def add(units: int) -> None:
        nonlocal done
        done += units
        if report is not None:
            report(done)

    return add
