from __future__ import annotations

import json

import numpy as np
import pytest

from mvar_core.analysis.cost import cost_of
from mvar_core.analysis.recommendation import (
    SAVINGS_BATCH,
    WINDOWS,
    preset_values,
    recommend,
    recommended_config,
    savings,
)
from mvar_core.config import Machine, RunConfig
from mvar_core.config.presets import load_config
from mvar_core.errors import DataError
from mvar_core.pyramid import Grid

GRIDS = (Grid(1, 1), Grid(2, 2), Grid(10, 10))


def example():
    # 100 of 105 tokens keep 0.97 on their own scale, the other 4 with a prefix keep nothing: the mean is 0.933.
    scale_mass = np.array([[1, 0, 0], [1.0, 0, 0], [0.0, 0.03, 0.97]])
    window_mass = np.zeros((3, len(WINDOWS)))
    window_mass[0] = 1
    window_mass[2] = 0.97 * np.array([0.5, 0.9, 0.96, 0.97, 0.98, 1, 1, 1])
    return scale_mass, window_mass


def test_prefixes_come_first_and_windows_take_what_is_left_to_lose():
    best = recommend(*example(), GRIDS, 0.95)
    assert best.scale_prefixes == 2
    assert best.windows == (0, 1, 5)
    assert best.kept_by_windows == pytest.approx((1, 1, 0.96))
    assert best.kept_by_prefixes == pytest.approx((1, 1, 1))
    assert best.kept_by_scale == pytest.approx((1, 1, 1 - 0.97 * 0.04))
    assert best.kept == pytest.approx((5 + 100 * (1 - 0.97 * 0.04)) / 105)
    assert best.own_windows == (0, 1, 5)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.995, 1.0])
def test_what_is_recommended_keeps_what_was_asked_and_nothing_smaller_does(keep):
    scale_mass, window_mass = example()
    tokens = np.array([1, 4, 100]) / 105

    def kept(prefixes, windows):
        total = 0.0
        for scale, window in enumerate(windows):
            own = window_mass[scale, WINDOWS.index(window)] if window else scale_mass[scale, scale]
            total += tokens[scale] * (own + scale_mass[scale, max(0, scale - prefixes + 1) : scale].sum())
        return total

    best = recommend(scale_mass, window_mass, GRIDS, keep)
    count = 3 if best.scale_prefixes == "all" else best.scale_prefixes
    assert kept(count, best.windows) == pytest.approx(best.kept)
    assert best.kept >= keep - 1e-9
    assert count == 1 or kept(count - 1, (0, 0, 0)) < keep
    # The last scale has nearly all tokens: a smaller window there would keep too little.
    last = best.windows[2]
    if last > 1 or last == 0:
        smaller = WINDOWS[WINDOWS.index(last) - 1] if last else 9
        assert kept(count, (*best.windows[:2], smaller)) < keep


def test_every_scale_keeps_the_same_share():
    """A scale that keeps less than another with its window is not spared for it."""
    grids = (Grid(9, 9), Grid(9, 9))
    window_mass = np.array([[0.1, 0.5, 0.99, 1, 1, 1, 1, 1], [0.9, 0.95, 0.96, 1, 1, 1, 1, 1]])
    best = recommend(np.eye(2), window_mass, grids, 0.92)
    assert best.scale_prefixes == 1
    assert best.windows == (5, 1)  # 0.99 and 0.9; with 3 for the first it were 0.5
    assert best.kept == pytest.approx(0.945)
    assert best.own_windows == (5, 3)


def test_a_scale_that_no_window_suits_stays_as_the_model_has_it():
    grids = (Grid(1, 1), Grid(32, 32))
    window_mass = np.array([[1] * 8, [0.001] * 8])
    assert recommend(np.eye(2), window_mass, grids, 0.95).windows == (0, 0)
    assert recommend(np.eye(2), window_mass, grids, 0.95, (0, 17)).windows == (0, 17)
    assert recommend(np.eye(2), window_mass, grids, 0.95, (0, 17)).kept == pytest.approx(1)


@pytest.mark.parametrize("keep", [0, -1, 1.5])
def test_what_is_no_fraction_is_refused(keep):
    with pytest.raises(DataError, match="keep"):
        recommend(*example(), GRIDS, keep)


def test_savings_are_those_of_the_plan():
    config = load_config("digits-var").model
    scale_mass, window_mass = np.eye(4), np.ones((4, len(WINDOWS)))
    best = recommend(scale_mass, window_mass, config.pyramid.grids, 0.95)
    assert (best.scale_prefixes, best.windows) == (1, (0, 1, 1, 1))
    found = savings(config, best, dtype_bytes=2)
    machine = Machine(device="cpu", dtype="bfloat16")
    before, after = (
        cost_of(each, machine, batch_size=SAVINGS_BATCH) for each in (config, recommended_config(config, best))
    )
    assert after.attention_gmacs < before.attention_gmacs
    for name in ("attention_gmacs", "kv_cache_bytes", "sample_peak_bytes"):
        assert found[name]["model"] == getattr(before, name)
        assert found[name]["recommended"] == getattr(after, name)
        assert found[name]["part"] == pytest.approx(getattr(after, name) / getattr(before, name))
    assert found["kv_cache_bytes"]["recommended"] == 0
    assert savings(recommended_config(config, best), best)["kv_cache_bytes"]["part"] is None
    json.dumps(found)


def test_a_preset_is_the_model_with_other_attention_and_the_training_of_its_run():
    run = load_config("digits-var", ["train.steps=7", "data.flip=true", "seed=3"], {"class_names": tuple("abcdefghij")})
    best = recommend(np.eye(4), np.ones((4, len(WINDOWS))), run.pyramid.grids, 0.95)
    values = preset_values(run.model, best, run.model_dump(mode="json"))
    found = RunConfig.model_validate(json.loads(json.dumps(values)))
    for name in ("image_size", "patch_sizes", "tokenizer", "transformer", "sampling", "class_names", "conditioning"):
        assert getattr(found, name) == getattr(run, name), name
        assert name in values or name == "conditioning"
    assert found.attention.scale_prefixes == 1
    assert found.windows == (0, 1, 1, 1)
    assert (found.train, found.data, found.seed) == (run.train, run.data, 3)
    assert found.provenance == {}
    alone = preset_values(run.model, best)
    assert not {"train", "data", "seed"} & alone.keys()
