"""`mvar ablate`: how settings and seeds are typed, and what is printed."""

import pytest

from mvar_cli.commands.ablate import parse_prefixes, parse_seeds, parse_windows
from mvar_core.errors import ConfigError


def test_a_plan_and_a_row(mvar, preset, tokens, model, tmp_path):
    command = [
        "ablate", "--preset", preset, "--tokens", tokens, "--tokenizer", model, "--validation", tokens, "--prefixes",
        "none", "--windows", "0,0,3", "--windows", "whole", "--seeds", "4,", "--device", "cpu", "--out",
        tmp_path / "out",
    ]  # fmt: skip
    planned = mvar(*command, "--dry-run", "--json").json
    assert [(row["windows"], row["seed"], row["done"]) for row in planned["rows"]] == [
        ([0, 0, 3], 4, False),
        ([0, 0, 0], 4, False),
    ]
    assert "0,0,3" in mvar(*command, "--dry-run").out
    assert not (tmp_path / "out").exists()
    assert "/nowhere" in mvar(*command, "--features", "/nowhere.pt2").error


def test_lists_of_settings():
    assert parse_prefixes("all, 2,1") == ["all", 2, 1]
    assert parse_prefixes("none") == []
    assert parse_windows(["3,5,7,9,whole"]) == [3, 5, 7, 9, "whole"]
    assert parse_windows(["3", "5", "0,0,3,5"]) == [3, 5, (0, 0, 3, 5)]
    assert parse_windows(["3;0,0,3,5;0"]) == [3, (0, 0, 3, 5), "whole"]
    assert parse_windows(["auto,auto:5,7"]) == ["auto", "auto:5", 7]
    assert parse_windows(["none"]) == []
    assert parse_seeds("3") == 3
    assert parse_seeds("7,") == (7,)
    assert parse_seeds("5,1") == (5, 1)


@pytest.mark.parametrize(
    "parse",
    [
        lambda: parse_prefixes("all,x"),
        lambda: parse_windows(["0,whole"]),
        lambda: parse_windows(["big"]),
        lambda: parse_windows(["auto:"]),
        lambda: parse_windows(["none", "3"]),
        lambda: parse_windows(["0,0,0,auto"]),
        lambda: parse_seeds("x"),
        lambda: parse_seeds("1,,2"),
    ],
)
def test_lists_that_make_no_sense(parse):
    with pytest.raises(ConfigError):
        parse()
