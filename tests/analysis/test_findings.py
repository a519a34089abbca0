from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from attention_reports import report_of

from mvar_core.analysis.findings import find, neighbourhood
from mvar_core.analysis.recommendation import WINDOWS


def with_masses(report, scale_mass=None, own_windows=None):
    """The report with other masses in every head; `own_windows` are fractions of the own mass within each window."""
    shape = report.scale_mass_by_head.shape
    scale_mass = report.even.scale_mass if scale_mass is None else np.asarray(scale_mass, dtype=float)
    window_mass = np.stack([report.even.window_mass_by_scale[k] for k in WINDOWS], axis=-1)
    if own_windows is not None:
        for scale in range(len(scale_mass)):
            window_mass[scale, scale] = scale_mass[scale, scale] * np.asarray(own_windows)
    return replace(
        report,
        scale_mass_by_head=np.broadcast_to(scale_mass, shape),
        window_mass_by_head=np.broadcast_to(window_mass, (*shape, len(WINDOWS))),
    )


PYRAMID = (1, 2, 4, 10)
LOCAL = [0.5, 0.8, 0.9, 0.95, 1, 1, 1, 1]


def test_even_attention_shows_nothing_however_large_its_scales_are():
    found = find(with_masses(report_of(PYRAMID)))
    assert found["adjacent"] == pytest.approx(found["even_adjacent"])
    assert found["adjacent"] > 0.5  # the last scale and the one before have most of the tokens
    assert found["neighbours"] == pytest.approx(found["even_neighbours"])
    assert (found["adjacent_verdict"], found["neighbours_verdict"]) == ("not shown", "not shown")


def test_adjacent_and_near_attention_is_what_the_paper_says():
    mass = [[1, 0, 0, 0], [0.1, 0.9, 0, 0], [0, 0.2, 0.8, 0], [0, 0.02, 0.18, 0.8]]
    found = find(with_masses(report_of(PYRAMID), mass, LOCAL))
    tokens = np.array([4, 16, 100]) / 120
    assert found["own"] == pytest.approx(tokens @ [0.9, 0.8, 0.8])
    assert found["previous"] == pytest.approx(tokens @ [0.1, 0.2, 0.18])
    assert found["adjacent"] == pytest.approx(tokens @ [1, 1, 0.98])
    assert found["window"] == 7
    assert found["neighbours"] == pytest.approx(0.95)
    assert found["even_neighbours"] == pytest.approx(0.49)  # of the last scale alone: the others are no larger than 7
    assert (found["adjacent_verdict"], found["neighbours_verdict"]) == ("shown", "shown")
    assert "80 %" in found["sentences"][0]
    json.dumps(found)


def test_attention_to_the_first_scale_is_not_what_the_paper_says():
    mass = np.zeros((4, 4))
    mass[:, 0] = 1
    mass[1:, 0], mass[range(1, 4), range(1, 4)] = 0.8, 0.2
    found = find(with_masses(report_of(PYRAMID), mass))
    assert found["adjacent_verdict"] == "not shown"


def test_what_the_model_cannot_do_otherwise_shows_nothing():
    found = find(report_of((1, 2, 4, 8), 1, (0, 0, 0, 3)))
    assert (found["adjacent_verdict"], found["neighbours_verdict"]) == ("by construction", "by construction")


def test_more_than_even_and_yet_not_most_is_said_so():
    found = find(with_masses(report_of((1, 2, 4, 16)), None, [0.01, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1]))
    assert found["neighbours"] == pytest.approx(0.4)
    assert found["even_neighbours"] == pytest.approx(49 / 256)
    assert found["neighbours_verdict"] == "not shown"
    assert "2.1 times" in found["sentences"][1]


def test_layers_that_differ_are_named():
    report = report_of(PYRAMID)
    mass = report.scale_mass_by_head.copy()
    mass[0, :, -1], mass[1, :, -1] = (0.1, 0.1, 0.1, 0.7), (0.3, 0.3, 0.2, 0.2)
    said = find(replace(report, scale_mass_by_head=mass))["sentences"][-1]
    assert said.index("layer 2") < said.index("20 %") < said.index("layer 1") < said.index("70 %")


def test_a_neighbourhood_is_smaller_than_half_of_the_last_scale():
    assert neighbourhood(report_of((1, 2, 4, 8))) == 3
    assert neighbourhood(report_of((1, 2, 10))) == 7
