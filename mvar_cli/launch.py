"""`--nproc N`: the same command in N processes on this machine, through torchrun's own launcher."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_core.errors import ConfigError, MvarError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SECONDS_TO_SAVE = 600
"""How long interrupted processes may take to finish a step and write a checkpoint."""

_LAUNCHED = "MVAR_LAUNCHED"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"

NumProcesses = Annotated[
    int,
    typer.Option(
        "--nproc", min=1, metavar="N", help="Processes on this machine, one per GPU.", rich_help_panel="Machine"
    ),
]


class ElsewhereError(MvarError):
    """What another process has found wrong, and says."""


@dataclass(frozen=True)
class Worker:
    """What the environment says of this process, as torchrun sets it.

    Attributes:
        rank: This process's number.
        count: How many processes there are.
        launched: Whether `--nproc` started it, so that the launching process speaks for all.
    """

    rank: int
    count: int
    launched: bool

    @classmethod
    def here(cls) -> Worker:
        """This process; alone where torchrun did not start it."""
        if "RANK" not in os.environ:
            return cls(0, 1, False)
        return cls(int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1")), _LAUNCHED in os.environ)


def launchable(name: str, run: Callable[..., None], arguments: Sequence[str]) -> Callable[..., None]:
    """A command's function with the option `--nproc`, which runs it in processes of their own.

    Args:
        name: The command's name.
        run: Its function.
        arguments: What was typed after the name; the processes get the same.
    """
    typed = [*name.split(), *arguments]  # now: the parser takes its list apart

    @functools.wraps(run)
    def launched(*positional: Any, nproc: int = 1, **named: Any) -> None:
        worker = Worker.here()
        if worker.count > 1 and nproc not in (1, int(os.environ.get("LOCAL_WORLD_SIZE", nproc))):
            raise ConfigError(
                f"--nproc {nproc} inside torchrun, which has started {os.environ['LOCAL_WORLD_SIZE']} processes here.",
                "Leave out --nproc: torchrun's --nproc-per-node says how many.",
            )
        if nproc > 1 and worker.count == 1:
            raise typer.Exit(launch(typed, nproc, str(named.get("device", "auto"))))
        run(*positional, **named)

    hints = typing.get_type_hints(run, include_extras=True)
    option = inspect.Parameter("nproc", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=NumProcesses)
    own = [
        parameter.replace(annotation=hints[parameter.name]) for parameter in inspect.signature(run).parameters.values()
    ]
    launched.__signature__ = inspect.Signature([*own, option])  # type: ignore[attr-defined]
    launched.__annotations__ = {**hints, "nproc": NumProcesses}
    return launched


def launch(arguments: Sequence[str], count: int, device: str = "auto") -> int:
    """Run `mvar` with these arguments in `count` processes on the named device; returns the exit code.

    Signals are passed on, and the processes may finish what they are at. The first one that fails ends the others, and
    what it said is printed once.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    _check_devices(device, count)
    # Its warnings repeat, in several lines, what is printed below in one.
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = os.environ.get("MVAR_DEBUG") == "1"
    os.environ[_LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    further: dict[str, Any] = {}
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:  # older ones wait 30 s and cannot be told otherwise
        further["shutdown_timeout"] = SECONDS_TO_SAVE
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        **further,
    )
    try:
        launch_agent(config, sys.executable, ["-u", "-m", "mvar_cli", *arguments])
    except ChildFailedError as error:
        code, text = verdict(error.failures, count)
        if text:
            typer.echo(text, err=True)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        del os.environ[_LAUNCHED]
    return 0


def verdict(failures: Mapping[int, ProcessFailure], count: int) -> tuple[int, str]:
    """Exit code and line for processes that failed: the first cause counts, what followed from it does not."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int, int]:
        rank, failure = item
        # SIGTERM is how the launcher ends the others.
        followed = bool(_told(failure).get("consequence")) or failure.exitcode == -signal.SIGTERM
        return followed, failure.timestamp, rank

    rank, failure = min(failures.items(), key=order)
    told = _told(failure)
    if failure.exitcode < 0:
        return 1, (
            f"error: process {rank + 1} of {count} was ended by {failure.signal_name()}, and the others with it. "
            "Run the same command again: what can be resumed goes on from where it was last saved."
        )
    if "line" not in told and failure.exitcode == 1:
        return 1, f"error: process {rank + 1} of {count} ended with exit code 1 without saying why."
    return failure.exitcode, str(told.get("line", ""))


def report(line: str, *, consequence: bool = False, silent: bool = False) -> None:
    """Say why this process fails: on stderr, or to the process that launched it.

    Args:
        line: What went wrong.
        consequence: Another process has failed, and this one because of it.
        silent: Another process says the same.
    """
    path = os.environ.get(_ERROR_FILE)
    if path is not None:
        # torchrun's own layout, so that its summary shows the line as well.
        content = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(
            json.dumps({"message": content, "line": line, "consequence": consequence}), encoding="utf-8"
        )
    if not (Worker.here().launched or silent):
        typer.echo(line, err=True)


def leave(code: int) -> typer.Exit:
    """What to raise to end with this code; a process of several ends here, for its exit could wait for the others."""
    if Worker.here().count > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return typer.Exit(code)


def lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another process has gone."""
    if Worker.here().count == 1:
        return False
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "gloo", "tcpstore")
    return type(error).__name__.startswith("Dist") or (
        isinstance(error, RuntimeError) and any(s in text for s in signs)
    )


def _told(failure: ProcessFailure) -> dict[str, Any]:
    data = failure.error_file_data
    return data if isinstance(data, dict) else {}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_devices(device: str, count: int) -> None:
    """Refuse more processes than GPUs, where GPUs are what the processes would use."""
    import torch

    available = torch.cuda.device_count()
    if device.startswith("cuda:"):
        raise ConfigError(f"--device {device} is one GPU, and --nproc {count} needs {count}.", "Use --device cuda.")
    if device in ("auto", "cuda") and 0 < available < count:
        raise ConfigError(
            f"--nproc {count}: this machine has {available} GPUs, and each process takes one.",
            f"Use --nproc {available}, or --device cpu.",
        )
