"""Which models an ablation compares, and what their runs come to over seeds."""

import numpy as np
import pytest

from mvar_core.analysis.ablation import Setting, Spread, over_seeds, plan_ablations, settings_of
from mvar_core.config.presets import load_config
from mvar_core.errors import ConfigError, DataError
from mvar_core.reports.ablation_plots import Point, plot_ablations

DIGITS = load_config("digits")  # sides 1 2 4 8, a window on the last


def labels(ablation):
    return [(entry.label, entry.setting.scale_prefixes, entry.setting.windows) for entry in ablation.entries]


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
    assert windows.label(windows.baseline) == "whole"
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
    assert table.baseline == table.entries[0].setting


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
    assert [entry.label for entry in table.entries] == ["4 = all", "all"]
    assert len(table.settings) == 1


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


def test_mean_and_deviation_are_numpys():
    rows = [
        {"loss": 1.5, "scales": [1.0, 2.0], "fid": None},
        {"loss": 2.0, "scales": [2.0, 2.5], "fid": 3.0},
        {"loss": 4.0, "scales": [6.0, 0.5], "fid": float("nan")},
    ]
    found = over_seeds(rows, ["loss", "scales", "fid", "absent"])
    assert found["loss"]["mean"] == np.mean([1.5, 2.0, 4.0])
    assert found["loss"]["std"] == np.std([1.5, 2.0, 4.0], ddof=1)
    assert [scale["std"] for scale in found["scales"]] == [np.std(v, ddof=1) for v in ([1, 2, 6], [2, 2.5, 0.5])]
    assert found["fid"] == {"mean": 3.0, "std": None, "n": 1, "values": [3.0]}
    assert found["absent"] == {"mean": None, "std": None, "n": 0, "values": []}
    assert Spread.of([2.0, 2.0]).std == 0


def test_the_picture_shows_every_setting(tmp_path):
    points = [Point("all", 2.0, (1.0, 2.0), 1.5, 0.7), Point("1", 1.0, (1.2,), 1.2, None)]
    panels = {"Scale prefixes": {"FID": points, "loss": points}, "Windows": {"FID": points, "loss": []}}
    paths = [tmp_path / "a.png", tmp_path / "a.svg"]
    plot_ablations(panels, paths, title="t", cost_name="GMACs", levels={"FID": ("real", 0.5)})
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_text().startswith("<?xml")
    with pytest.raises(DataError, match="nothing to draw"):
        plot_ablations({"Windows": {"FID": []}}, paths, title="t", cost_name="GMACs")
