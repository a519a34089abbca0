"""Of the old command line: what is left of its launcher until the last command has moved."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mvar_cli.app import leave as leave

__all__ = ["Worker", "leave"]


@dataclass(frozen=True)
class Worker:
    """What the environment says of this process."""

    rank: int
    count: int

    @classmethod
    def here(cls) -> Worker:
        """This process."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
