"""The environment variables by which torchrun tells each of its processes which one it is and where to report."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from mvar_core.errors import ConfigError

LAUNCHED = "MVAR_LAUNCHED"
"""Set for processes that `mvar --nproc` started: the launching process prints for all of them."""


def torchrun_number(name: str, default: int) -> int:
    """One of torchrun's variables, such as RANK; ConfigError where it is set, but not to a whole number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise ConfigError(f"The environment variable {name} is {text!r}, not a whole number.", f"Run `unset {name}`.")
    return int(text)


def inside_torchrun() -> bool:
    """Whether this is one of several processes that torchrun, or --nproc, has started.

    ConfigError where variables contradict each other, or some are missing.
    """
    if "RANK" not in os.environ or (world_size := torchrun_number("WORLD_SIZE", 1)) == 1:
        return False
    rank, missing = torchrun_number("RANK", 0), {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing or rank >= world_size:
        problem = f"{' and '.join(sorted(missing))} missing" if missing else f"the last rank is {world_size - 1}"
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={world_size} are set as by torchrun, but {problem}.",
            "Start the command with torchrun or --nproc, or run `unset RANK WORLD_SIZE`.",
        )
    torchrun_number("MASTER_PORT", 0)
    return True


def report_failure(line: str, *, consequence: bool = False, silent: bool = False) -> None:
    """Say why this process fails: on stderr, or to the process that launched it.

    It may be a `consequence` of another process's failure; where another process says the same, this one is `silent`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        # torchrun's own layout, so that its summary shows the line as well.
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        content = {"message": message, "line": line, "consequence": consequence}
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    if not silent and LAUNCHED not in os.environ:
        print(line, file=sys.stderr)
