"""Groups of options: a class in a command's signature is one option for each of its fields."""

import inspect
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import mvar_core as mvar
from mvar_cli import options
from mvar_cli.groups import Group, flattened
from mvar_core.config import RunConfig


class Size(Group):
    height: Annotated[int, typer.Option("--height")] = 2
    width: Annotated[int | None, typer.Option("--width")] = None


def draw(*, name: Annotated[str, typer.Option("--name")], size: Size, loud: bool = False) -> None:
    """Draw it."""
    typer.echo(f"{name} {size} {loud}")


def test_a_group_reaches_the_command_as_one_value():
    app = typer.Typer()
    app.command()(flattened(draw))
    assert CliRunner().invoke(app, ["--name", "a", "--loud"]).stdout == "a {'height': 2} True\n"
    assert CliRunner().invoke(app, ["--name", "a", "--width", "3"]).stdout == "a {'height': 2, 'width': 3} False\n"
    assert list(inspect.signature(flattened(draw)).parameters) == ["name", "height", "width", "loud"]


def test_settings_that_were_not_typed_are_not_set():
    settings = options.SamplingOptions.build({"cfg": 2.0, "top_k": None, "cfg_scales": "4-9"})
    assert settings == mvar.SamplingConfig(cfg=2.0, cfg_scales=(4, 9))
    assert settings.model_fields_set == {"cfg", "cfg_scales"}


@pytest.mark.parametrize("values", [{"cfg": -1.0}, {"cfg_scales": "a-b"}, {"cfg_schedule": "steep"}])
def test_a_bad_setting_is_an_error_that_names_it(values):
    with pytest.raises(mvar.ConfigError, match=next(iter(values))):
        options.SamplingOptions.build(values)


def test_loop_options_are_keys_of_their_sections():
    keys = {parameter.name for parameter in options.LoopOptions.parameters()}
    assert keys & set(RunConfig().train.model_dump()) >= {"micro_batch", "ema", "checkpoint_every"}
