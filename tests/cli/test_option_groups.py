"""Groups of options: a dataclass in a command's signature is one option for each of its fields."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from mvar_cli.app import COMMANDS, load_command
from mvar_cli.old_groups import LoopOptions, TransformerLoopOptions, ungrouped
from mvar_core.config import RunConfig


@dataclass(frozen=True)
class Size:
    height: Annotated[int, typer.Option("--height")]
    width: Annotated[int, typer.Option("--width")] = 3


def draw(*, name: Annotated[str, typer.Option("--name")], size: Size, loud: bool = False) -> None:
    """Draw it."""
    typer.echo(f"{name} {size} {loud}")


def test_a_group_reaches_the_command_as_one_value():
    app = typer.Typer()
    app.command()(ungrouped(draw))
    found = CliRunner().invoke(app, ["--name", "a", "--height", "2", "--loud"])
    assert found.stdout == "a Size(height=2, width=3) True\n"
    assert CliRunner().invoke(app, ["--name", "a"]).exit_code == 2  # --height has no default
    assert list(inspect.signature(ungrouped(draw)).parameters) == ["name", "height", "width", "loud"]
    assert ungrouped(draw).__doc__ == draw.__doc__


def test_a_command_without_groups_is_left_as_it_is():
    def plain(name: str = "") -> None: ...

    assert ungrouped(plain) is plain


def test_loop_options_are_keys_of_their_sections():
    assert set(LoopOptions().keys) <= set(RunConfig().train_tokenizer.model_dump())
    assert set(TransformerLoopOptions().keys) <= set(RunConfig().train.model_dump())


@pytest.mark.parametrize("name", ["train", "finetune-from-var"])
def test_both_trainings_have_the_same_loop(name):
    entry = next(entry for entry in COMMANDS if entry.name == name)
    options = {parameter.name for parameter in load_command(entry).params}
    assert set(TransformerLoopOptions().keys) <= options
