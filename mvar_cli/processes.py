"""One command in several processes, as torchrun starts them: who does what, and who speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mvar_cli.old_console import Console, Progress

Value = TypeVar("Value")


class SilentConsole(Console):
    """The console of a process that is not the first: it prints nothing."""

    def say(self, text: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def table(self, title: str, columns: Any, rows: Any) -> None:
        """Nothing."""

    def finish(self, result: Any) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, title: str, unit: str = "images") -> Iterator[Progress]:
        """A progress bar that nobody sees."""
        yield Progress(title, unit, lambda *_: None)


@dataclass(frozen=True)
class Processes:
    """The processes of one command.

    Attributes:
        rank: This process's number.
        count: How many there are.
        local_rank: This process's number on its machine, which is also the number of its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes what there is one of, and that prints."""
        return self.rank == 0

    def console(self, as_json: bool) -> Console:
        """Where this process prints."""
        return Console(as_json) if self.first else SilentConsole(as_json)

    def device(self, name: str) -> str:
        """The device of this process where `name` leaves the choice: one GPU each."""
        import torch

        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """What `compute` gives in the first process, in all of them; the others wait for it.

        Raises:
            MvarError: What `compute` raised, in all of them, so that none waits for one that has failed.
        """
        from mvar_core import distributed

        return distributed.world().run_on_rank_zero(compute)


@contextmanager
def processes(device: str = "cpu") -> Iterator[Processes]:
    """The processes that torchrun started, connected for as long as the block runs."""
    from mvar_core import distributed

    with distributed.connect(device) as world:
        yield Processes(world.rank, world.world_size, world.local_rank)
