"""The attention sweep: every row says what was measured, next to dense, and what "auto" would have picked."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from mvar_core.analysis import attention_sweep
from mvar_core.analysis.attention_sweep import sweep
from mvar_core.kernels import attend
from mvar_core.kernels.backend import AttentionCall
from mvar_core.kernels.select import select_backend
from mvar_core.pyramid import AttentionPattern, Grid

SIZES = {"heads": 2, "head_dim": 8, "batch": 1, "repeats": 1}


@pytest.fixture(autouse=True)
def one_call_is_enough(monkeypatch):
    monkeypatch.setattr(attention_sweep, "SECONDS_AT_ONCE", 0.0)


def test_a_row_for_each_side_window_and_backend():
    rows = sweep([4, (3, 5)], [0, 3], ["dense", "tiled"], **SIZES)
    expected = list(itertools.product((4, [3, 5]), (0, 3), ("dense", "tiled")))
    assert [(row["side"], row["window"], row["backend"]) for row in rows] == expected
    assert [row["tokens"] for row in rows] == [16] * 4 + [15] * 4
    for row in rows:
        assert row["seconds"] > 0
        assert (row["heads"], row["head_dim"], row["batch"], row["backward"]) == (2, 8, 1, False)
        assert (row["dtype"], row["device"], row["peak_bytes"], row["reason"]) == ("float32", "cpu", None, None)


def test_seconds_are_medians_and_ratios_are_to_dense(monkeypatch):
    """Dense takes 6, 8 and 40 seconds, tiled 2, 1 and 9, the first call of each apart."""
    clock = {"dense": iter([99.0, 6.0, 8.0, 40.0]), "tiled": iter([99.0, 2.0, 1.0, 9.0])}
    monkeypatch.setattr(attention_sweep, "seconds_of", lambda run, device: next(clock[run.args[0]]))
    dense, tiled = sweep([4], [3], ["dense", "tiled"], **{**SIZES, "repeats": 3})
    assert (dense["seconds"], dense["times_dense"]) == (8.0, 1.0)
    assert (tiled["seconds"], tiled["times_dense"]) == (2.0, 4.0)


def test_without_dense_there_is_no_ratio():
    (row,) = sweep([4], [3], ["tiled"], **SIZES)
    assert row["times_dense"] is None


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", None)
    select_backend.cache_clear()
    dense, natten = sweep([4], [3], ["dense", "natten"], **SIZES)
    select_backend.cache_clear()
    assert natten["seconds"] is None
    assert natten["times_dense"] is None
    assert "natten is not installed" in natten["reason"]
    assert dense["seconds"] > 0


@pytest.mark.parametrize("side", [8, 40])
@pytest.mark.parametrize("backward", [False, True])
def test_rows_name_what_auto_picks(side, backward):
    rows = sweep([side], [3], ["dense", "tiled", "auto"], backward=backward, **SIZES)
    call = AttentionCall(AttentionPattern(Grid(side, side), 3), torch.device("cpu"), torch.float32, backward)
    picked = select_backend("auto", call).name
    assert {row["auto"] for row in rows} == {picked}
    assert [row["backend"] for row in rows if row["chosen"]] == [picked, "auto"]


def test_backward_measures_a_pass_with_gradients(monkeypatch):
    seen = []

    def spy(q, k, v, pattern, **options):
        seen.append((q.requires_grad and torch.is_grad_enabled(), q.dtype))
        return attend(q, k, v, pattern, **options)

    monkeypatch.setattr(attention_sweep, "attend", spy)
    sweep([4], [3], ["dense"], backward=True, dtype=torch.bfloat16, **SIZES)
    assert set(seen) == {(True, torch.bfloat16)}
    seen.clear()
    sweep([4], [3], ["dense"], **SIZES)
    assert set(seen) == {(False, torch.float32)}
