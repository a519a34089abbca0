"""Groups of options."""

import inspect
from typing import Annotated

import pytest
import typer

import mvar_core as mvar
from mvar_cli import options
from mvar_cli.options import Group, grouped, signature
from mvar_core.config import RunConfig


class Size(Group):
    height: Annotated[int, typer.Option("--height")] = 2
    width: Annotated[int | None, typer.Option("--width")] = None


def show(*, name: Annotated[str, typer.Option("--name")], size: Annotated[dict, Size], loud: bool = False) -> None:
    """Show what arrived."""
    print(name, size, loud)


def test_a_group_is_one_value_of_the_command_and_one_option_for_each_of_its_fields(capsys):
    flat = signature(show, extra=(bool, True))
    assert {name: option.default for name, option in flat.parameters.items()} == {
        "name": inspect.Parameter.empty, "height": 2, "width": None, "loud": False, "extra": True
    }  # fmt: skip
    show(**grouped(show, {"name": "a", "height": 2, "width": None, "loud": True}))
    show(**grouped(show, {"name": "a", "height": 2, "width": 3, "loud": False}))
    assert capsys.readouterr().out == "a {'height': 2} True\na {'height': 2, 'width': 3} False\n"
    assert [parameter.name for parameter in Size.only("width").parameters()] == ["width"]


@pytest.mark.parametrize(("group", "section"), [(options.SamplingOptions, mvar.SamplingConfig),
                                                (options.MachineOptions, mvar.Machine)])  # fmt: skip
def test_every_setting_has_an_option(group, section):
    assert {parameter.name for parameter in group.parameters()} == set(section.model_fields)


def test_settings_that_were_not_typed_are_not_set():
    settings = options.SamplingOptions.build({"cfg": 2.0, "top_k": None, "cfg_scales": "4-9"})
    assert settings == mvar.SamplingConfig(cfg=2.0, cfg_scales=(4, 9))
    assert settings.model_fields_set == {"cfg", "cfg_scales"}


@pytest.mark.parametrize("values", [{"cfg": -1.0}, {"cfg_scales": "a-b"}, {"cfg_schedule": "steep"}])
def test_a_bad_setting_is_an_error_that_names_it(values):
    with pytest.raises(mvar.ConfigError, match=next(iter(values))):
        options.SamplingOptions.build(values)


def test_loop_options_are_keys_of_their_sections():
    keys = {parameter.name for parameter in options.TrainOptions.parameters()}
    assert keys & set(RunConfig().train.model_dump()) >= {"micro_batch", "ema", "checkpoint_every"}
