"""`mvar.ablate`: rows, tables, what is resumed and what is refused."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mvar_core as mvar
from mvar_core.config import Machine
from mvar_core.data.tokens import TokenCache, split_off
from mvar_core.errors import CheckpointError, ConfigError, DataError, MvarError
from mvar_core.io.resumable import DirectoryLock
from mvar_core.workflows import ablate as workflow
from mvar_core.workflows.bench_row import MEASUREMENTS, measure_alone

CPU = Machine(device="cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums of several threads round in an order of their own; the process that is killed has one thread too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    """Costs measured here, which spares the start of a process for each."""
    monkeypatch.setattr(workflow, "measure_alone", lambda request: MEASUREMENTS[request.what](request))


@pytest.fixture
def arguments(preset, tokens, model, images, classifier):
    return {
        "preset": str(preset), "tokens": tokens, "tokenizer": model, "validation": tokens, "reference": str(images),
        "features": str(classifier), "prefixes": ("all", 1), "windows": ("whole", 9), "seeds": 2, "num": 4,
        "settings": ["train.log_every=1"], "machine": CPU,
    }  # fmt: skip


def one_row(arguments):
    return {**arguments, "prefixes": (), "windows": ("whole",), "seeds": 1}


def weights(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("transformer.safetensors"))}


def times(out):
    """When each file of rows and costs was written."""
    return {path: path.stat().st_mtime_ns for room in ("rows", "costs") for path in (out / room).rglob("*.*")}


def test_two_settings_on_two_seeds(arguments, tmp_path):
    out = tmp_path / "out"
    planned = mvar.ablate(**arguments, out=out, dry_run=True)
    assert [row["done"] for row in planned.rows] == [False] * 4
    assert planned.to_dict()["refused"] is None
    assert not out.exists()
    result = mvar.ablate(**arguments, out=out)
    rows = result.rows
    assert [(row["scale_prefixes"], row["seed"]) for row in rows] == [("all", 0), (1, 0), ("all", 1), (1, 1)]
    for row in rows:
        assert row["steps"] == 4
        assert row["windows"] == [0, 0, 0]
        assert len(row["validation_scale_loss"]) == len(row["validation_scale_accuracy"]) == 3
        assert row["scores"]["fid"] > 0
        assert row["scores"]["classifier_accuracy"] is None  # cats and dogs are no digits
        assert "sfid" in row["scores"]["reasons"]
        assert row["cost"]["seconds_per_image"] > 0
        assert row["cost"]["peak_memory_bytes"] > row["cost"]["allocated_bytes"] > row["cost"]["weight_bytes"] > 0
        assert len(row["cost"]["rounds"]) == 3
        assert (out / row["model"] / "samples.png").is_file()
        assert not (out / row["model"] / "checkpoints").exists()
    assert rows[0]["attention_gmacs"] > rows[1]["attention_gmacs"]
    assert rows[0]["kv_cache_bytes"] > rows[1]["kv_cache_bytes"] == 0
    assert rows[0]["cost"]["measured_kv_cache_bytes"] > rows[1]["cost"]["measured_kv_cache_bytes"] == 0

    # Over seeds: numpy's mean and deviation, number by number and scale by scale.
    for found in result.aggregate:
        own = [row for row in rows if row["setting"] == found["setting"]]
        for name, values in (
            ("validation_loss", [row["validation_loss"] for row in own]),
            ("fid", [row["scores"]["fid"] for row in own]),
        ):
            assert found[name]["mean"] == np.mean(values)
            assert found[name]["std"] == np.std(values, ddof=1)
        last = [row["validation_scale_loss"][-1] for row in own]
        assert found["validation_scale_loss"][-1]["std"] == np.std(last, ddof=1)
    prefixes, windows = result.ablations
    assert [entry["label"] for entry in windows["entries"]] == ["whole", "9 = whole"]
    assert windows["sentences"] == []  # one model alone has nothing to be compared with
    assert len(prefixes["sentences"]) == 2
    ratio = rows[1]["attention_gmacs"] / rows[0]["attention_gmacs"]
    assert f"{ratio:.2f} of the attention" in prefixes["savings"]
    assert windows["savings"] == ""
    written = json.loads((out / "ablation.json").read_text())
    assert written["rows"] == rows
    assert written["features"] == "demo"
    text = (out / "ablation.md").read_text()
    assert prefixes["sentences"][0] in text
    assert "| 9 = whole |" in text
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "ablation.svg").read_text().startswith("<?xml")

    # What is there is neither trained nor measured again; the tables are the same.
    before = times(out)
    assert mvar.ablate(**arguments, out=out).aggregate == result.aggregate
    assert times(out) == before

    # Another ablation is refused with what differs, and nothing is lost.
    with pytest.raises(DataError, match=r"train\.steps is 4 there, 5 asked"):
        mvar.ablate(**arguments, out=out, steps=5)
    planned = mvar.ablate(**{**arguments, "num": 5}, out=out, dry_run=True)
    assert "num is 4 there" in planned.to_dict()["refused"]
    scored_by = out / "scoring.json"
    scored_by.write_text(scored_by.read_text().replace('"demo"', '"other"'))
    with pytest.raises(CheckpointError, match="features is other there, demo asked"):
        mvar.ablate(**arguments, out=out)
    assert times(out) == before


def test_more_seeds_and_windows_add_rows(arguments, tmp_path):
    out = tmp_path / "out"
    mvar.ablate(**one_row(arguments), out=out)
    before = weights(out)
    assert len(before) == 1
    more = {**one_row(arguments), "windows": ("whole", (0, 0, 3)), "seeds": (0, 5)}
    result = mvar.ablate(**more, out=out)
    assert [(row["windows"][-1], row["seed"]) for row in result.rows] == [(0, 0), (3, 0), (0, 5), (3, 5)]
    assert len(weights(out)) == 4
    assert {name: content for name, content in weights(out).items() if name in before} == before


KILLED_IN_A_ROW = """
import json, os, signal, sys
from pathlib import Path
end, arguments = sys.argv[1], json.loads(sys.argv[2])
rename = Path.replace
def replace(self, target):
    result = rename(self, target)
    if str(target).endswith(end):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
Path.replace = replace
import mvar_core as mvar
mvar.ablate(**{**arguments, "machine": mvar.Machine(device="cpu")})
"""


def test_a_killed_run_resumes_within_its_row(arguments, tmp_path):
    """Killed after the first checkpoint of the second row: that row resumes from it, the first is left as it is."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    arguments["seeds"] = 1
    expected = mvar.ablate(**arguments, out=straight)
    end = "prefixes-1-windows-whole/seed-0/checkpoints/step-00000002.pt"
    typed = json.dumps({**arguments, "machine": None, "out": out}, default=str)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_ROW, end, typed],
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.parts[-3] for path in out.rglob("row.json")] == ["prefixes-all-windows-whole"]
    assert [row["done"] for row in mvar.ablate(**arguments, out=out, dry_run=True).rows] == [True, False]

    steps = []

    def progress(stage, done, total, *, unit="images", note=""):
        if stage == "ablation":
            steps.append((done, total))

    found = mvar.ablate(**arguments, out=out, progress=progress)
    assert steps == [(7, 8), (8, 8)]
    assert weights(out) == weights(straight)
    for here, there in zip(found.aggregate, expected.aggregate, strict=True):
        for name in ("validation_loss", "validation_scale_loss", "fid", "loss"):
            assert here[name] == there[name]


def test_an_interrupted_row_resumes(arguments, tmp_path):
    out = tmp_path / "out"

    def interrupting(stage, done, total, *, unit="images", note=""):
        if stage == "ablation" and done == 3:
            raise KeyboardInterrupt

    stopped = mvar.ablate(**one_row(arguments), out=out, progress=interrupting)
    assert stopped.interrupted
    assert stopped.rows == []
    assert stopped.sections() == []
    (row,) = (out / "rows").glob("*/*")
    assert (row / "checkpoints" / "step-00000003.pt").is_file()
    assert not (row / "row.json").exists()
    assert mvar.ablate(**one_row(arguments), out=out).rows[0]["steps"] == 4


def test_a_row_is_what_train_makes_of_its_setting(arguments, preset, tokens, model, tmp_path):
    """So rows of one seed share first weights, data and order, which follow from the seed."""
    out = tmp_path / "out"
    mvar.ablate(**{**arguments, "prefixes": (2,), "seeds": (3,), "windows": ((0, 0, 3),)}, out=out)
    for name, setting in (("prefixes-2-windows-whole", "2, windows: []"), ("prefixes-1-windows-0-0-3", "1")):
        alone = mvar.train(
            preset=str(preset), tokens=tokens, tokenizer=model, seed=3, machine=CPU, out=tmp_path / name,
            settings=[f"attention={{scale_prefixes: {setting}}}"],
        )  # fmt: skip
        file = "transformer.safetensors"
        assert (alone.model / file).read_bytes() == (out / "rows" / name / "seed-3" / file).read_bytes()


def test_rows_train_the_same_scales_alone(arguments, tmp_path):
    """Which scales the interleaved curriculum trains alone follows from the preset, not from each row's windows."""
    arguments |= {"seeds": 1, "settings": ["train.curriculum=interleaved"], "windows": (3,)}
    mvar.ablate(**arguments, out=tmp_path / "out")
    turns = {yaml.safe_load(path.read_text())["train"]["scales_alone"] for path in tmp_path.rglob("config.yaml")}
    assert turns == {1}


def test_images_are_tokenized_and_a_tokenizer_is_trained(preset, images, tmp_path):
    out = tmp_path / "out"
    arguments = {
        "preset": str(preset), "data": images, "prefixes": (), "windows": (3, "whole"), "seeds": 1, "num": 2,
        "out": out, "machine": CPU,
    }  # fmt: skip
    result = mvar.ablate(**arguments)
    assert len(result.rows) == 2
    assert (out / "tokenizer" / "tokenizer.safetensors").is_file()
    assert result.images + result.held_out == 12
    # Without the Inception network there is no FID, and the report says why.
    scores = result.rows[0]["scores"]
    assert scores["fid"] is None
    assert "Inception" in scores["reasons"]["fid"]
    assert scores["reasons"]["fid"].rstrip(".") in (out / "ablation.md").read_text()
    before = weights(out)
    assert mvar.ablate(**arguments).aggregate == result.aggregate
    assert weights(out) == before
    mvar.ablate(**arguments, overwrite=True, settings=["train.optimizer.lr=1e-2"])
    assert weights(out).keys() == before.keys()
    assert weights(out) != before


@pytest.mark.slow
def test_digits_from_scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "measure_alone", measure_alone)
    result = mvar.ablate(
        preset="digits", data="digits", machine=CPU, prefixes=("all", 1), windows=(3,), seeds=2, steps=200,
        settings=["train_tokenizer.steps=60"], out=tmp_path / "out",
    )  # fmt: skip
    assert len(result.rows) == 6
    for row in result.rows:
        scores = row["scores"]
        assert scores["demo_fid"] == pytest.approx(scores["fid"], rel=1e-6)
        assert 0 < scores["demo_fid_floor"] < scores["demo_fid_class_means"]
        assert row["cost"]["memory_is"].startswith("resident")


def test_a_share_of_a_cache_is_read_as_a_whole_one(tokens):
    cache = TokenCache.open(tokens)
    train, held = split_off(cache, 0.25, seed=0)
    assert (train.num_images, held.num_images) == (9, 3)
    assert sorted([*train.images, *held.images]) == list(range(12))
    for share in (train, held):
        rows = np.arange(len(share))[::-1]
        found, labels = share.batch(rows)
        views = cache.num_views
        expected, expected_labels = cache.batch(share.images[rows // views] * views + rows % views)
        assert torch.equal(found, expected)
        assert torch.equal(labels, expected_labels)
        with pytest.raises(IndexError):
            share.batch(np.array([len(share)]))
    assert np.array_equal(split_off(cache, 0.25, seed=0)[1].images, held.images)
    assert not np.array_equal(split_off(cache, 0.25, seed=1)[1].images, held.images)
    with pytest.raises(DataError):
        split_off(split_off(cache, 0.01, seed=0)[1], 0.5, seed=0)


@pytest.mark.parametrize(
    ("changes", "kind", "found"),
    [
        ({"data": "digits"}, ConfigError, "--tokens"),
        ({"windows": (4,)}, ConfigError, "4"),
        ({"prefixes": (9,)}, ConfigError, "9"),
        ({"seeds": (1, 1)}, ConfigError, "twice"),
        ({"seeds": 0}, ConfigError, "--seeds 0"),
        ({"seeds": 10**12}, ConfigError, "--seeds 10"),
        ({"seeds": (-1,)}, ConfigError, "--seeds"),
        ({"num": 0}, ConfigError, "--num 0"),
        ({"machine": Machine(device="cpu", attention="nonsense")}, MvarError, "nonsense"),
        ({"tokenizer": os.devnull}, MvarError, os.devnull),
        ({"validation": "/nowhere"}, DataError, "/nowhere"),
        ({"features": "/nowhere.safetensors"}, MvarError, "/nowhere"),
    ],
)
def test_wrong_requests_are_refused_before_a_row_is_trained(arguments, tmp_path, changes, kind, found):
    with pytest.raises(kind, match=found):
        mvar.ablate(**{**arguments, **changes}, out=tmp_path / "out")
    assert not list(tmp_path.rglob("rows"))


def test_a_loop_of_links_is_no_output(arguments, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="loop"):
        mvar.ablate(**arguments, out=tmp_path / "loop" / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_ablation_in_a_directory_is_told(arguments, tmp_path, overwrite):
    (tmp_path / "experiment.json").write_text("{}")
    with DirectoryLock(tmp_path), pytest.raises(DataError, match="at work"):
        mvar.ablate(**arguments, out=tmp_path, overwrite=overwrite)
    assert (tmp_path / "experiment.json").read_text() == "{}"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_not_an_ablation_is_left_alone(arguments, tmp_path, overwrite):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        mvar.ablate(**arguments, out=tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_tables_replace_tables_of_the_docs(monkeypatch):
    root = Path(__file__).parent.parent.parent
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    spec = importlib.util.spec_from_file_location("ablation_benchmark", root / "benchmarks" / "ablation.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sys.modules.pop("machine", None)
    page = (root / "docs" / "ablations.md").read_text()
    once = benchmark.embed(page, "| a |\n\n![x](ablation.png)\n")
    assert "![x](images/ablation.png)" in once
    assert benchmark.embed(once, "| a |\n\n![x](ablation.png)\n") == once
    assert "| a |" not in benchmark.embed(once, "| b |")
    assert once.split(benchmark.BEGIN)[0] == page.split(benchmark.BEGIN)[0]
