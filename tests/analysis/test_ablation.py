"""Which models an ablation compares."""

import pytest

from mvar_core.analysis.ablation import Setting, plan_ablations, settings_of
from mvar_core.config.presets import load_config
from mvar_core.errors import ConfigError

DIGITS = load_config("digits")  # sides 1 2 4 8, a window on the last


def labels(ablation):
    return [(label, setting.scale_prefixes, setting.windows) for label, setting in ablation.entries]


def test_the_papers_tables_on_digits():
    prefixes, windows = plan_ablations(DIGITS, ["all", 3, 2, 1], [3, 5, 7, 9, "whole", (0, 0, 3, 5)])
    none = (0, 0, 0, 0)
    assert labels(prefixes) == [("all", "all", none), ("3", 3, none), ("2", 2, none), ("1", 1, none)]
    assert labels(windows) == [
        ("3", 1, (0, 0, 0, 3)),
        ("5", 1, (0, 0, 0, 5)),
        ("7", 1, (0, 0, 0, 7)),
        ("9 = whole", 1, none),
        ("whole", 1, none),
        ("0,0,3,5", 1, (0, 0, 3, 5)),
    ]
    assert prefixes.baseline == Setting("all", none)
    assert windows.baseline == Setting(1, none)
    assert windows.labels[windows.baseline] == "whole"
    # The whole scale at one prefix stands in both tables and is trained once.
    assert len(settings_of((prefixes, windows))) == 8
    assert len({setting.name for setting in settings_of((prefixes, windows))}) == 8


def test_a_number_is_the_window_of_the_windowed_scales_of_the_preset():
    published = load_config("mvar-d16-256")
    (table,) = plan_ablations(published, [], [7, 15])
    assert labels(table) == [
        ("7", 1, (0,) * 8 + (7, 7)),
        # 15 covers the 13×13 scale, not the 16×16 one.
        ("15 = 0,0,0,0,0,0,0,0,0,15", 1, (0,) * 9 + (15,)),
    ]
    assert table.baseline == table.entries[0][1]


def test_auto_windows_say_what_they_are():
    (table,) = plan_ablations(DIGITS, [], ["auto:3", "auto:7", "whole"])
    assert labels(table) == [
        ("auto:3 = 0,0,0,3", 1, (0, 0, 0, 3)),
        ("auto:7 = whole", 1, (0, 0, 0, 0)),
        ("whole", 1, (0, 0, 0, 0)),
    ]


def test_models_that_are_the_same_are_one_setting():
    pyramid = DIGITS.pyramid
    assert Setting.of(pyramid, 4, (1, 3, 5, 9)) == Setting("all", (0, 0, 0, 0))
    (table,) = plan_ablations(DIGITS, [4, "all"], [])
    assert [label for label, _ in table.entries] == ["4 = all", "all"]
    assert table.labels == {Setting("all", (0, 0, 0, 0)): "all"}


def test_a_setting_is_applied_to_a_run():
    run = Setting(2, (0, 0, 0, 5)).apply(DIGITS, 7)
    assert (run.attention.scale_prefixes, run.attention.windows, run.seed) == (2, (0, 0, 0, 5), 7)
    assert run.train == DIGITS.train
    assert run.transformer == DIGITS.transformer
    assert Setting(1, (0, 0, 0, 0)).apply(DIGITS, 0).windows == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("prefixes", "windows", "problem"),
    [([], [], "nothing to compare"), ([5], [], "1 … 4"), ([], [4], "odd"), ([], [(0, 0, 3)], "4 scales")],
)
def test_what_cannot_be_compared_is_refused(prefixes, windows, problem):
    with pytest.raises(ConfigError, match=problem):
        plan_ablations(DIGITS, prefixes, windows)
