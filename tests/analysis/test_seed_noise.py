"""What differences are worth against the noise of seeds."""

import math

import numpy as np
import pytest

from mvar_core.analysis.ablation import compare, holm, over_seeds, pooled_std, sentence, spread, welch


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
    assert spread([2.0, 2.0])["std"] == 0


def test_welch_is_the_closed_form():
    first, second = [1.0, 2.0, 3.0], [2.0, 4.0, 9.0]
    a, b = np.var(first, ddof=1) / 3, np.var(second, ddof=1) / 3
    t, freedom = (np.mean(first) - np.mean(second)) / math.sqrt(a + b), (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
    # Student's distribution integrated by hand, next to the library that the function asks.
    x = np.linspace(0, abs(t), 200_001)
    density = (
        math.gamma((freedom + 1) / 2)
        / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    )
    inside = float(((density[1:] + density[:-1]) / 2 * np.diff(x)).sum())
    assert welch(first, second) == pytest.approx(1 - 2 * inside, abs=1e-8)
    assert welch([1.0], second) is None
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1
    assert welch([1.0, 1.0], [2.0, 2.0]) == 0


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_noise_is_pooled_within_settings():
    groups = [[1.0, 3.0], [10.0, 10.0, 13.0], [5.0]]
    squares = np.var(groups[0], ddof=1) * 1 + np.var(groups[1], ddof=1) * 2
    assert pooled_std(groups) == pytest.approx(math.sqrt(squares / 3))
    assert pooled_std([[1.0], [2.0]]) is None


VALUES = {"whole": [1.00, 1.02, 0.98], "7": [1.01, 0.99, 1.00], "3": [1.50, 1.52, 1.51]}


def test_differences_beyond_and_within_the_noise():
    verdict = compare("FID", VALUES, "whole")
    assert [(item["name"], item["distinguishable"]) for item in verdict["comparisons"]] == [("7", False), ("3", True)]
    seven, three = verdict["comparisons"]
    assert three["difference"] == pytest.approx(0.51)
    assert three["effect"] == pytest.approx(0.51 / pooled_std(list(VALUES.values())))
    assert f"p = {three['adjusted']:.2g}" in sentence(verdict, VALUES) or three["adjusted"] < 0.001
    assert three["adjusted"] == pytest.approx(2 * three["p_value"])
    assert seven["adjusted"] == pytest.approx(max(three["adjusted"], seven["p_value"]))
    assert 0 < verdict["resolution"] < 0.51
    text = sentence(verdict, VALUES)
    assert "3 seeds" in text
    assert text.index("3 is 0.51 worse") < text.index("7 is equal")


def test_one_seed_is_not_tested():
    values = {"whole": [1.0], "3": [1.5]}
    verdict = compare("FID", values, "whole")
    assert verdict["noise"] is verdict["resolution"] is None
    assert verdict["comparisons"][0]["distinguishable"] is None
    assert "3 +0.5" in sentence(verdict, values)
    assert compare("FID", {"whole": [], "3": [1.0]}, "whole") is None
    assert compare("FID", {"whole": [1.0]}, "whole") is None


def test_seldom_a_false_alarm():
    """Settings that do not differ: of 400 tables hardly more than one in twenty calls a difference real."""
    random = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        values = {str(name): random.normal(size=3).tolist() for name in range(4)}
        alarms += any(item["distinguishable"] for item in compare("FID", values, "0")["comparisons"])
    assert alarms / 400 < 0.07
