"""Commands run in this process, on the tiny model of tests/tiny.py."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from mvar_cli.app import app


class Outcome:
    """What a command did."""

    def __init__(self, result: Any):
        self.code: int = result.exit_code
        self.out: str = result.stdout
        self.err: str = result.stderr
        self.exception = result.exception

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one line of a problem that can be fixed; with --json also an object on stdout."""
        assert self.code == 1, (self.code, self.out, self.err)
        lines = [line for line in self.err.splitlines() if not line.startswith("--attention")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        assert not self.out or json.loads(self.out).keys() == {"error", "hint"}
        return lines[0]


Run = Callable[..., Outcome]


@pytest.fixture
def mvar() -> Run:
    """Run a command: every argument is turned into text."""

    def run(*arguments: Any) -> Outcome:
        return Outcome(CliRunner().invoke(app, [str(argument) for argument in arguments]))

    return run
