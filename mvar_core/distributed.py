"""The processes of one job: rank and world size, collectives, how the processes are started and how they end.

torchrun, or `launch`, starts them; `connect` joins them while a block runs and yields the `World` through which
everything else speaks to the other processes. A single process is the same object with a world size of one.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mvar_core.environment import LAUNCHED, inside_torchrun, report_failure, torchrun_number
from mvar_core.errors import ConfigError, MvarError, one_line

Value = TypeVar("Value")

SECONDS_TO_SAVE = 600
"""How long interrupted processes may take to finish a step and write a checkpoint."""
SECONDS_BETWEEN_BEATS = 3.0
SECONDS_OF_SILENCE = 30.0
_ENDED = "mvar/ended"
_RESUME = "Run the same command again: what can be resumed continues from where it was last saved."


class RemoteError(MvarError):
    """A problem that another process has found and reports."""


@dataclass(frozen=True)
class World:
    """The processes that share one job; `local_rank` is this one's number on its machine, and that of its GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that reads and writes what exists once."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process where `name` leaves the choice: one GPU each."""
        if self.world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """This process's share of some pieces of work, in turns."""
        return items[self.rank :: self.world_size]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any_rank(False)

    def broadcast_object(self, value: Value) -> Value:
        """Rank 0's value, in all processes."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return cast("Value", values[0])

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Give a tensor rank 0's values, in all processes, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor.detach(), src=0)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' values."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def all_gather_object(self, value: Value) -> list[Value]:
        """Every process's value, in the order of ranks, in all processes."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set in some process; all processes ask together."""
        if self.world_size == 1:
            return flag
        raised = torch.tensor(int(flag))  # between processors: it must not wait for a GPU
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def run_on_rank_zero(self, compute: Callable[[], Value]) -> Value:
        """What `compute` returns in rank 0, in all processes; the others wait for it.

        An MvarError or OSError of `compute` is raised there, and a RemoteError in the others, so that none waits.
        """
        value: Any = None
        failed: Exception | None = None
        try:
            value = compute() if self.is_rank_zero else None
        except (MvarError, OSError) as error:
            failed = error
        value, problem = self.broadcast_object((value, None if failed is None else str(failed)))
        if problem is not None:
            raise failed or RemoteError(problem)
        return cast("Value", value)


def world() -> World:
    """The processes that are connected now; outside `connect`, this one alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), torchrun_number("LOCAL_RANK", 0))
    return World()


@contextmanager
def connect(device: str = "cpu") -> Iterator[World]:
    """The processes that torchrun started, connected while the block runs; without torchrun, this one alone.

    Inside another `connect` it yields the world that is connected already. A process that dies without closing its
    connections, because its machine is gone, ends the others within a minute. `device` is as the user named it: tensors
    on a GPU travel between GPUs (NCCL), results between processors (gloo).
    """
    if (dist.is_available() and dist.is_initialized()) or not inside_torchrun():
        yield world()
        return
    here = World(*(torchrun_number(name, 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if not here.is_rank_zero:
        logging.getLogger("mvar").setLevel(logging.ERROR)
    own = here.device(device)
    if own.startswith("cuda") and dist.is_nccl_available():
        torch.cuda.set_device(own)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    with Heartbeat(here.rank, here.world_size):
        yield here
        dist.all_reduce(torch.zeros(()))  # until all are done: rank 0 may hold the store
    # Not where an error ends the block: the others may be waiting for what this process will not send.
    dist.destroy_process_group()


class Heartbeat:
    """A thread that shows, while entered, that this process lives, and ends it when another process does not.

    A process that fails closes its connections, and the others notice at once. One whose machine loses power or
    network does not, and the collectives' own timeout must be long: writing a checkpoint may take many minutes. Rank 0
    watches all others, and all others watch rank 0; after `silence` seconds without a sign of life one counts as dead.
    """

    def __init__(self, rank: int, world_size: int, silence: float = SECONDS_OF_SILENCE):
        self.rank, self.world_size, self.silence = rank, world_size, silence
        self.watched = range(1, world_size) if rank == 0 else range(1)
        self._beats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stopped = threading.Event()
        # Not a daemon: one that is inside the store when the interpreter ends would abort the process.
        self._thread = threading.Thread(target=self._run, name="mvar-heartbeat")

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopped.set()
        self._thread.join()

    def problem(self, store: Any, now: float) -> str | None:
        """Give a sign of life in the shared store and look for the others'; what is wrong at `now` (s), if anything."""
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
                text = f"process {rank + 1} of {self.world_size} has not been heard from for {now - since:.0f} s"
                store.set(_ENDED, text)
                return text
        return None

    def _run(self) -> None:
        # A connection of its own: on a shared one, what the main thread waits for would hold up the signs of life.
        address, timeout = os.environ["MASTER_ADDR"], datetime.timedelta(seconds=self.silence)
        store = dist.TCPStore(address, torchrun_number("MASTER_PORT", 0), is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        while True:
            try:
                problem = self.problem(store, time.monotonic())
            except (RuntimeError, ConnectionError) as error:
                problem = f"the first machine of the job cannot be reached: {one_line(error)[:200]}"
            if problem is not None and not self._stopped.is_set():
                # From this thread: the main one may be waiting inside a collective, where nothing reaches it.
                report_failure(f"error: {problem}. {_RESUME}", consequence=True)
                sys.stderr.flush()
                os._exit(1)
            if self._stopped.wait(SECONDS_BETWEEN_BEATS):
                with suppress(RuntimeError, ConnectionError):
                    store.set(f"mvar/beat/{self.rank}", "done")
                return


@contextmanager
def _handling(*numbers: signal.Signals, by: Callable[[int, Any], None]) -> Iterator[None]:
    """Signals handled while the block runs; outside the main thread, where handlers cannot be set, as before."""
    here = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, by) for number in numbers} if here else {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """A flag that the first Ctrl-C or SIGTERM sets while the block runs, so that the current step can finish.

    A second Ctrl-C interrupts at once. A second SIGTERM does not: launchers and batch systems send several.
    """
    flag = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set()

    with _handling(signal.SIGINT, signal.SIGTERM, by=handle):
        yield flag


def sigterm_as_interrupt() -> AbstractContextManager[None]:
    """SIGTERM, with which batch systems and launchers end processes, raises KeyboardInterrupt in the main thread."""
    return _handling(signal.SIGTERM, by=signal.default_int_handler)


def launch(arguments: Sequence[str], nproc: int, device: str = "auto") -> tuple[int, str]:
    """Run `python -m mvar_cli` with these arguments in `nproc` processes through torchrun's own launcher.

    Signals are passed on, and the processes may finish what they are doing. The first one that fails ends the others.
    Returns the exit code, and what the process that failed first has to say; empty where nothing is left to say.
    ConfigError where there are more processes than GPUs.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    available = torch.cuda.device_count()
    if device.startswith("cuda:"):
        raise ConfigError(f"--device {device} is one GPU, and --nproc {nproc} needs {nproc}.", "Use --device cuda.")
    if device in ("auto", "cuda") and 0 < available < nproc:
        raise ConfigError(
            f"--nproc {nproc}: this machine has {available} GPUs, and each process uses one.",
            f"Use --nproc {available}, or --device cpu.",
        )
    # Its warnings repeat, in several lines, what is reported in one.
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = os.environ.get("MVAR_DEBUG") == "1"
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // nproc)))
    # torch before 2.10 has no such setting and waits 30 s.
    known = "shutdown_timeout" in LaunchConfig.__dataclass_fields__
    further: dict[str, Any] = {"shutdown_timeout": SECONDS_TO_SAVE} if known else {}
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=str(uuid.uuid4()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, logs_specs=DefaultLogsSpecs(), **further,
    )  # fmt: skip
    try:
        launch_agent(config, sys.executable, ["-u", "-m", "mvar_cli", *arguments])
    except ChildFailedError as error:
        return first_failure(error.failures, nproc)
    except SignalException as error:
        return 128 + int(error.sigval), ""
    finally:
        del os.environ[LAUNCHED]
    return 0, ""


def first_failure(failures: Mapping[int, Any], nproc: int) -> tuple[int, str]:
    """Exit code and line for processes that failed: of the first one that did not fail because another had."""

    def reported(failure: Any) -> dict[str, Any]:  # by `report_failure`, in the process that failed
        return failure.error_file_data if isinstance(failure.error_file_data, dict) else {}

    def order(item: tuple[int, Any]) -> tuple[bool, int, int]:
        rank, failure = item
        # SIGTERM is how the launcher ends the others.
        followed = bool(reported(failure).get("consequence")) or failure.exitcode == -signal.SIGTERM
        return followed, failure.timestamp, rank

    rank, failure = min(failures.items(), key=order)
    process = f"error: process {rank + 1} of {nproc}"
    if failure.exitcode < 0:
        return 1, f"{process} was ended by {failure.signal_name()}, and the others with it. {_RESUME}"
    if "line" not in reported(failure) and failure.exitcode == 1:
        return 1, f"{process} ended with exit code 1 and no message."
    return failure.exitcode, str(reported(failure).get("line", ""))


def lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another process has gone."""
    if isinstance(error, MvarError) or "RANK" not in os.environ:
        return False
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "gloo", "tcpstore")
    return type(error).__name__.startswith("Dist") or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
