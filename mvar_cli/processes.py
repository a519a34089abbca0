"""One command in several processes, as torchrun starts them: who does what, and who speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mvar_cli.console import Console, Progress
from mvar_cli.launch import ElsewhereError, Worker
from mvar_core.errors import MvarError

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
        if self.count == 1:
            return compute()
        import torch.distributed as dist

        values: list[Any] = [None, None]
        failed: MvarError | None = None
        if self.first:
            try:
                values[0] = compute()
            except MvarError as error:
                failed, values[1] = error, str(error)
        dist.broadcast_object_list(values, src=0)
        if failed is not None:
            raise failed
        if values[1] is not None:
            raise ElsewhereError(values[1])
        value: Value = values[0]
        return value


@contextmanager
def processes(device: str = "cpu") -> Iterator[Processes]:
    """The processes that torchrun started, connected for as long as the block runs; without torchrun, this one alone.

    A process that dies without closing its connections (its machine is gone) ends the others within a minute.

    Args:
        device: As the user named it. Tensors on a GPU travel between GPUs (NCCL); results travel between processors'
            memories (gloo), whatever device computes them.
    """
    worker = Worker.here()
    if worker.count == 1:
        yield Processes()
        return
    import logging

    import torch
    import torch.distributed as dist

    from mvar_cli.heartbeat import Heartbeat

    team = Processes(worker.rank, worker.count, int(os.environ.get("LOCAL_RANK", "0")))
    if not team.first:
        logging.getLogger("mvar").setLevel(logging.ERROR)
    own = team.device(device)
    if own.startswith("cuda") and dist.is_nccl_available():
        torch.cuda.set_device(own)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    with Heartbeat(worker.rank, worker.count):
        yield team
        dist.all_reduce(torch.zeros(()))  # until all are done: the first process may hold the store
    # Not where an error ends the block: the others may be waiting for what this process will not send.
    dist.destroy_process_group()
