"""The parts of the command line that need no model: selection, amounts, JSON, writers, page."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import typer
from PIL import Image

from mvar_cli import console
from mvar_cli.console import format_cell
from mvar_cli.options import parse_numbers
from mvar_core.config.machine import parse_bytes
from mvar_core.errors import ConfigError
from mvar_core.formatting import format_bytes, format_count, format_seconds
from mvar_core.results import Result, plain


@pytest.mark.parametrize(
    ("text", "count"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512", 512), ("80mib", 80 * 2**20)]
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["a lot", "GB", "12 apples", "1e"])
def test_amounts_that_are_none(text):
    with pytest.raises(ConfigError, match="24GB"):
        parse_bytes(text)


def test_comma_lists():
    assert parse_numbers("1,2,4", "--pyramid") == (1, 2, 4)
    with pytest.raises(ConfigError, match="--pyramid"):
        parse_numbers("1,x", "--pyramid")


@dataclass(frozen=True, kw_only=True)
class Measured(Result):
    loss: float
    values: object
    interrupted: bool = False


def test_json_is_one_strict_object(capsys, monkeypatch):
    monkeypatch.setattr(console.output, "as_json", True)
    console.say("left out")
    console.table("left out", ("a",), [(1,)])
    console.show(Measured(loss=float("nan"), values={"array": np.arange(2), "x": np.float32(0.5)}), ("loss",))
    captured = capsys.readouterr().out
    assert json.loads(captured) == {"loss": None, "values": {"array": [0, 1], "x": 0.5}, "interrupted": False}
    assert captured.count("\n") == 1
    assert plain({1: (1, float("inf"))}) == {"1": [1, None]}


def test_an_interrupted_result_exits_with_130(capsys):
    with pytest.raises(typer.Exit) as end:
        console.show(Measured(loss=0.25, values=None, interrupted=True), ("loss",))
    assert end.value.exit_code == 130
    assert "0.25" in capsys.readouterr().out


def test_cells():
    assert [format_cell(value) for value in (None, True, 12345, 0.0, 3.14159, 27.18, 1e-7, "x")] == [
        "–", "yes", "12,345", "0", "3.142", "27.18", "1.000e-07", "x",
    ]  # fmt: skip
    assert format_bytes(1536) == "1.5 KiB"
    assert format_count(310_000_000) == "310 M"
    assert [format_seconds(seconds) for seconds in (1.26, 61, 3725)] == ["1.3 s", "1 min 01 s", "1 h 02 min"]


def test_progress_without_a_terminal_speaks_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 40.0])
    monkeypatch.setattr("mvar_cli.console.time.monotonic", lambda: next(clock))
    for done in (0, 10, 40):
        console.progress("work", done, 100)
    console.end_progress()
    assert capsys.readouterr().err == "work: 40/100 1 images/s, 1 min 00 s left\n"


def read(file):
    with Image.open(file) as image:
        return np.asarray(image)
