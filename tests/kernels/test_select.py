"""Which backend runs: explicit choices hold or fail with the reason, "auto" chooses and says why."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from mvar_core.errors import BackendError
from mvar_core.kernels import BACKEND_NAMES, attend, available_backends, check_backend, natten, select
from mvar_core.kernels.backend import AttentionCall
from mvar_core.pyramid import AttentionPattern, Grid

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WHOLE = AttentionPattern(Grid(32, 32))
COVERED = AttentionPattern(Grid(5, 5), 7)
SMALL = AttentionPattern(Grid(16, 16), 7)
LARGE = AttentionPattern(Grid(24, 24), 7)
WIDE = AttentionPattern(Grid(16, 36), 7)
FLAT = AttentionPattern(Grid(7, 5), 7)


@pytest.fixture(autouse=True)
def forget_choices():
    """Choices and what was logged are kept per process; every test starts without them."""
    for kept in (select.select_backend, select._log_once):
        kept.cache_clear()
    yield
    for kept in (select.select_backend, select._log_once):
        kept.cache_clear()


def chosen(pattern, device=CPU, dtype=torch.float32):
    return select.select_backend("auto", AttentionCall(pattern, device, dtype)).name


@pytest.fixture
def no_natten(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", None)


def fake_natten(monkeypatch, has_kernels):
    module = type(sys)("natten")
    module.HAS_LIBNATTEN = has_kernels
    monkeypatch.setitem(sys.modules, "natten", module)


@pytest.mark.parametrize(
    ("pattern", "name"), [(WHOLE, "dense"), (COVERED, "dense"), (LARGE, "tiled"), (WIDE, "tiled"), (FLAT, "dense")]
)
def test_auto_on_a_cpu(pattern, name):
    assert chosen(pattern) == name


# What of dense (d) and tiled (t) was the fastest, or within a tenth of it, for windows of 3, 7 and 13 on each side, on
# two CPU cores: benchmarks/results/attention.json.
FORWARD = {13: "tdd", 16: "tdd", 18: "ttd", 24: "ttt", 32: "ttt", 48: "ttt", 64: "ttt"}
TRAINING = {
    torch.float32: {13: "ddd", 16: "ddd", 18: "ddd", 24: "ddd", 32: "ttd", 48: "ttt"},
    torch.bfloat16: {13: "ddd", 16: "ddd", 18: "ddd", 24: "ddd", 32: "ddd", 48: "ddd"},
}


@pytest.mark.parametrize("dtype", TRAINING, ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_auto_picks_the_measured_winner(no_natten, needs_grad, dtype):
    table = TRAINING[dtype] if needs_grad else FORWARD
    picked = {
        side: "".join(
            select.select_backend(
                "auto", AttentionCall(AttentionPattern(Grid(side, side), window), CPU, dtype, needs_grad)
            ).name[0]
            for window in (3, 7, 13)
        )
        for side in table
    }
    assert picked == table


@pytest.mark.parametrize(
    ("pattern", "with_kernels", "without"),
    [(WHOLE, "dense", "dense"), (SMALL, "natten", "dense"), (LARGE, "natten", "tiled")],
)
def test_auto_on_cuda(monkeypatch, pattern, with_kernels, without):
    fake_natten(monkeypatch, True)
    assert chosen(pattern, CUDA) == with_kernels
    assert chosen(pattern, CUDA, torch.float64) == without
    select.select_backend.cache_clear()
    fake_natten(monkeypatch, False)
    assert chosen(pattern, CUDA) == without


def test_auto_without_natten(no_natten):
    assert [chosen(pattern, CUDA) for pattern in (WHOLE, SMALL, LARGE)] == ["dense", "dense", "tiled"]


def test_auto_logs_each_situation_once_with_reasons(caplog, make_inputs):
    caplog.set_level(logging.INFO, "mvar")
    for pattern in (SMALL, SMALL, AttentionPattern(Grid(15, 15), 9), COVERED):
        attend(*make_inputs(pattern)[:3], pattern, scale=1.0)
    messages = [record.getMessage() for record in caplog.records if record.name == "mvar"]
    assert len(messages) == 2
    assert "dense for windowed scales on cpu" in messages[0]
    assert "not natten: " in messages[0]
    assert "not tiled: at this size dense attention is faster" in messages[0]
    assert "dense for whole scales" in messages[1]


def test_an_explicit_choice_logs_nothing(caplog, make_inputs):
    caplog.set_level(logging.INFO, "mvar")
    attend(*make_inputs(SMALL)[:3], SMALL, scale=1.0, backend="dense")
    assert not caplog.records


def test_an_unknown_backend_names_the_nearest(make_inputs):
    with pytest.raises(BackendError, match=r"'tile' is not a backend\. Did you mean tiled"):
        attend(*make_inputs(SMALL)[:3], SMALL, scale=1.0, backend="tile")


def test_an_explicit_choice_that_cannot_run_says_why(no_natten, make_inputs):
    with pytest.raises(BackendError, match=r"--attention natten: natten is not installed .*pip install"):
        attend(*make_inputs(SMALL)[:3], SMALL, scale=1.0, backend="natten")
    assert dict(available_backends())["natten"] is not None


def test_natten_refuses_what_it_cannot_run(monkeypatch):
    fake_natten(monkeypatch, False)
    with pytest.raises(BackendError, match="does not run in float64"):
        check_backend("natten", [SMALL], CPU, torch.float64)
    with pytest.raises(BackendError, match="does not run on mps"):
        check_backend("natten", [SMALL], torch.device("mps"), torch.float32)
    check_backend("natten", [WHOLE, SMALL], CPU, torch.float32)


def test_a_broken_natten_is_reported_and_not_raised(monkeypatch, tmp_path):
    (tmp_path / "natten.py").write_text("raise ImportError('undefined symbol: torch')\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "natten"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    reason = natten.BACKEND.cannot_run(AttentionCall(SMALL, CPU, torch.float32))
    assert reason == "natten cannot be imported: undefined symbol: torch"
    assert chosen(SMALL) == "dense"


def test_check_backend_accepts_auto_and_refuses_unknown_names():
    check_backend("auto", [WHOLE, SMALL, LARGE], CPU, torch.float32, needs_grad=True)
    with pytest.raises(BackendError, match="'flash' is not a backend"):
        check_backend("flash", [WHOLE], CPU, torch.float32)


def test_names():
    assert BACKEND_NAMES == ("auto", "dense", "flex", "natten", "reference", "tiled")
    assert {name for name, reason in available_backends() if reason is None} >= {"dense", "flex", "reference", "tiled"}
