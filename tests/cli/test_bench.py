"""`mvar bench`: rows, ratios, what is refused, and that a row is measured in a process of its own."""

import os

import pytest
import torch

from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine
from mvar_core.config.presets import load_config
from mvar_core.errors import MvarError
from mvar_core.workflows import bench, bench_row
from mvar_core.workflows.bench import twins
from mvar_core.workflows.bench_row import MEASUREMENTS, Request, measure_alone, measure_sampling

KEYS = {"name", "seconds", "images_per_second", "peak_memory_bytes", "kv_cache_bytes", "batch_size"}


@pytest.fixture
def in_process(monkeypatch):
    """Rows measured here, which spares the start of a process for each."""
    monkeypatch.setattr(bench, "measure_alone", lambda request: MEASUREMENTS[request.what](request))


@pytest.mark.usefixtures("in_process")
def test_sampling_compares_var_with_mvar(mvar, preset, tmp_path):
    picture = tmp_path / "bench.svg"
    result = mvar(
        "bench", "--preset", preset, "--batch-size", "1,3", "--repeats", 2, "--published-style", "--device", "cpu",
        "--plot", picture, "--json",
    ).json  # fmt: skip
    rows = result["rows"]
    assert [(row["batch_size"], row["name"]) for row in rows] == [
        (batch, name) for batch in (1, 3) for name in ("VAR, published style", "VAR", "MVAR")
    ]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["seconds"] > 0
        assert len(row["runs"]) == 2
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["seconds"])
        assert row["peak_memory_bytes"] > row["process_bytes"] / 2 > 0
        baseline = next(other for other in rows if other["batch_size"] == row["batch_size"])
        assert row["baseline"] == "VAR, published style"
        assert row["times_faster"] == pytest.approx(baseline["seconds"] / row["seconds"])
        stages = row["stages"]
        assert {"conditioning", "transformer, scale 1", "transformer, scale 3", "quantizer", "decoder"} <= stages.keys()
        assert all(seconds >= 0 for seconds in stages.values())
    assert {"drawing", "other"} <= rows[1]["stages"].keys()
    assert {"torch", "processor", "date", "cores"} <= result["machine"].keys()
    assert picture.read_text().startswith("<?xml")
    # The cache is measured, not computed; VAR's holds all scales of both halves, MVAR has none.
    config = load_config(str(preset))
    var = twins(config)[0][1]
    assert [row["kv_cache_bytes"] for row in rows[1:3]] == [cost_of(var).kv_cache_bytes, 0]


@pytest.mark.usefixtures("in_process")
def test_training_measures_a_whole_step(mvar, preset, tmp_path):
    outcome = mvar(
        "bench", "--preset", preset, "--what", "train", "--batch-size", 2, "--repeats", 1, "--device", "cpu",
        "--plot", tmp_path / "bench.png", "--json",
    )  # fmt: skip
    rows = outcome.json["rows"]
    assert [row["name"] for row in rows] == ["VAR", "MVAR"]
    for row in rows:
        assert row.keys() >= KEYS
        assert {"forward", "backward", "update"} <= row["stages"].keys()
        assert row["stages"]["backward"] > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("in_process")
def test_tables_name_model_ratio_and_stages(mvar, preset):
    outcome = mvar("bench", "--preset", preset, "--batch-size", 2, "--repeats", 1, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    for word in ("MVAR", "KV cache", "faster than VAR", "where the time goes", "decoder", "resident"):
        assert word in outcome.out


def test_attention_sweep(mvar, preset, tmp_path):
    result = mvar(
        "bench", "--preset", preset, "--what", "attention", "--sides", "4,6", "--windows", "0,3", "--batch-size", 1,
        "--repeats", 1, "--device", "cpu", "--plot", tmp_path / "sweep.png", "--json",
    ).json  # fmt: skip
    rows = result["rows"]
    assert {(row["side"], row["window"]) for row in rows} == {(4, 0), (4, 3), (6, 0), (6, 3)}
    assert {"dense", "tiled"} <= {row["backend"] for row in rows}
    for row in rows:
        assert row.keys() >= KEYS
        assert row["seconds"] > 0
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_a_row_has_a_process_of_its_own(preset):
    request = Request(
        what="sample",
        config=load_config(str(preset)),
        batch_size=1,
        repeats=1,
        machine=Machine(device="cpu"),
        breakdown=False,
    )
    ballast = torch.ones(150_000_000)  # 600 MB that a child must not be charged for
    row = measure_alone(request)
    assert 0 < row["process_bytes"] <= row["peak_memory_bytes"] < ballast.nbytes
    assert "stages" not in row


def test_what_a_process_finds_wrong_is_said(preset, monkeypatch):
    request = Request(
        what="sample", config=load_config(str(preset)), machine=Machine(device="cpu", attention="nonsense")
    )
    with pytest.raises(MvarError, match="not a backend"):
        measure_alone(request)

    class Ended:
        def __init__(self, code, out="", err=""):
            self.returncode, self.stdout, self.stderr = code, out, err

    monkeypatch.setattr(bench_row.subprocess, "run", lambda *_, **__: Ended(-9))
    assert "memory" in measure_alone(request)["reason"]
    monkeypatch.setattr(bench_row.subprocess, "run", lambda *_, **__: Ended(1, err="Traceback\nKeyError: 'x'\n"))
    with pytest.raises(MvarError, match="KeyError"):
        measure_alone(request)


def test_a_row_without_memory_is_a_row_with_a_reason(mvar, preset, monkeypatch):
    def measure(request):
        return {"reason": "out of memory"} if request.batch_size > 1 else measure_sampling(request)

    monkeypatch.setattr(bench, "measure_alone", measure)
    outcome = mvar("bench", "--preset", preset, "--batch-size", "1,64", "--repeats", 1, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "batch 64: out of memory" in outcome.out


def test_twins_of_every_kind(preset):
    config = load_config("mvar-d16-256")
    assert [(label, twin.attention.scale_prefixes) for label, twin in twins(config)] == [("VAR", "all"), ("MVAR", 1)]
    assert not any(twins(config)[0][1].windows)
    assert twins(config)[1][1] is config
    var = load_config("var-d16-256")
    assert twins(var)[1][1].attention == config.attention
    between = load_config("mvar-d16-256", ["attention.scale_prefixes=3"])
    assert [label for label, _ in twins(between)] == ["VAR", "3 scale prefixes"]
    windowed = load_config("var-d16-256", ["attention.windows=7"])
    assert [label for label, _ in twins(windowed)] == ["VAR", "VAR with windows"]


@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_is_measured_with_its_own_weights(mvar, model):
    rows = mvar("bench", "--checkpoint", model, "--batch-size", 1, "--repeats", 1, "--device", "cpu", "--json").json
    assert [row["name"] for row in rows["rows"]] == ["VAR", "MVAR"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "nothing to measure"),
        (["--preset", "digits", "--what", "sampel"], "sample"),
        (["--preset", "digits", "--batch-size", "1,x"], "whole numbers"),
        (["--preset", "digits", "--batch-size", "0"], "1 … 16,777,216 images"),
        (["--preset", "digits", "--plot", "picture.gif"], ".png or .svg"),
        (["--preset", "digits", "--top-k", "65"], "65"),
        (["--preset", "digits", "--attention", "nonsense"], "nonsense"),
        (["--preset", "digits", "--what", "attention", "--windows", "4"], "odd"),
        (["--preset", "digits", "--what", "attention", "--windows", "99999999999999999999"], "9999"),
        (["--preset", "digits", "--what", "attention", "--sides", "0"], "sides of 1"),
        (["--preset", "digits", "--what", "attention", "--sides", "8,100000"], "100000"),
        (["--preset", "digits", "--batch-size", "9999999999999999999999"], "16,777,216"),
        (["--checkpoint", os.devnull], "model directory"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_measured(mvar, monkeypatch, arguments, problem):
    monkeypatch.setattr(bench, "measure_alone", lambda request: pytest.fail("measured"))
    assert problem in mvar("bench", "--device", "cpu", *arguments).error
