"""`mvar ablate`: rows, tables, what is gone on with and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from mvar_cli import ablation
from mvar_cli.commands.ablate import parse_prefixes, parse_seeds, parse_windows
from mvar_core.data.tokens import TokenCache, split_off
from mvar_core.errors import ConfigError, DataError
from mvar_core.workflows.bench_row import MEASUREMENTS, measure_alone


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
    monkeypatch.setattr(ablation, "measure_alone", lambda request: MEASUREMENTS[request.what](request))


@pytest.fixture
def command(preset, tokens, model, images, classifier):
    return [
        "ablate", "--preset", preset, "--tokens", tokens, "--checkpoint", model, "--validation", tokens,
        "--reference", images, "--features", "demo", "--demo-classifier", classifier, "--device", "cpu",
        "--prefixes", "all,1", "--windows", "whole,9", "--seeds", 2, "--num", 4, "--bench-batch", 2,
        "--set", "train.log_every=1",
    ]  # fmt: skip


def weights(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("transformer.safetensors"))}


def test_two_settings_on_two_seeds(mvar, command, tmp_path, monkeypatch):
    out = tmp_path / "out"
    planned = mvar(*command, "--out", out, "--dry-run", "--json").json
    assert [row["done"] for row in planned["rows"]] == [False] * 4
    assert not out.exists()
    result = mvar(*command, "--out", out, "--json").json
    rows = result["rows"]
    assert [(row["scale_prefixes"], row["seed"]) for row in rows] == [("all", 0), (1, 0), ("all", 1), (1, 1)]
    for row in rows:
        assert row["steps"] == 4
        assert row["windows"] == [0, 0, 0]
        assert len(row["validation_scale_loss"]) == len(row["validation_scale_accuracy"]) == 3
        assert row["scores"]["fid"] > 0
        assert 0 <= row["scores"]["classifier_accuracy"] <= 1
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
    for found in result["aggregate"]:
        own = [row for row in rows if row["setting"] == found["setting"]]
        for name, values in (
            ("validation_loss", [row["validation_loss"] for row in own]),
            ("fid", [row["scores"]["fid"] for row in own]),
        ):
            assert found[name]["mean"] == np.mean(values)
            assert found[name]["std"] == np.std(values, ddof=1)
        last = [row["validation_scale_loss"][-1] for row in own]
        assert found["validation_scale_loss"][-1]["std"] == np.std(last, ddof=1)
    prefixes, windows = result["ablations"]
    assert [entry["label"] for entry in windows["entries"]] == ["whole", "9 = whole"]
    assert windows["sentences"] == []  # one model alone has nothing to be compared with
    assert ["2 seeds" in text for text in prefixes["sentences"]] == [True, True]
    ratio = rows[1]["attention_gmacs"] / rows[0]["attention_gmacs"]
    assert f"1 takes {ratio:.2f} of the attention" in prefixes["savings"]
    assert windows["savings"] == ""
    assert json.loads((out / "ablation.json").read_text())["rows"] == rows
    text = (out / "ablation.md").read_text()
    assert prefixes["sentences"][0] in text
    assert "| 9 = whole |" in text
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "ablation.svg").read_text().startswith("<?xml")

    # What is there is neither trained nor measured again; the tables are the same.
    monkeypatch.setattr(ablation, "train_run", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(ablation, "measure_alone", lambda *_: pytest.fail("measured again"))
    assert mvar(*command, "--out", out, "--json").json["aggregate"] == result["aggregate"]
    shown = mvar(*command, "--out", out)
    for word in ("Scale prefixes", "Windows", "demo-FID", "±", "KV cache", prefixes["sentences"][0]):
        assert word in shown.out

    # Another experiment is refused with what differs, and nothing is lost.
    refused = mvar(*command, "--out", out, "--steps", 5).error
    assert "train.steps is 4 there, 5 asked" in refused
    assert mvar(*command, "--out", out, "--num", 5, "--dry-run", "--json").json["refused"].count("num is 4 there") == 1
    assert (out / "ablation.json").is_file()


def test_more_seeds_and_windows_add_rows(mvar, command, tmp_path, monkeypatch):
    out = tmp_path / "out"
    few = ["--prefixes", "none", "--seeds", "1", "--out", out, "--json"]
    mvar(*command, *few)
    before = weights(out)
    assert len(before) == 1
    trained = []
    train_run = ablation.train_run
    monkeypatch.setattr(
        ablation, "train_run", lambda *args, **kwargs: trained.append(args[4].parts[-2:]) or train_run(*args, **kwargs)
    )
    result = mvar(*command, *few, "--windows", "0,0,3", "--seeds", "0,5").json
    assert trained == [
        ("prefixes-1-windows-0-0-3", "seed-0"),
        ("prefixes-1-windows-whole", "seed-5"),
        ("prefixes-1-windows-0-0-3", "seed-5"),
    ]
    assert len(result["rows"]) == 4
    assert {name: content for name, content in weights(out).items() if name in before} == before


KILLED_IN_A_ROW = """
import os, signal, sys
from pathlib import Path
end = sys.argv.pop(1)
rename = Path.replace
def replace(self, target):
    result = rename(self, target)
    if str(target).endswith(end):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
Path.replace = replace
from mvar_cli.app import main
main()
"""


def test_a_killed_run_goes_on_within_its_row(mvar, command, tmp_path, monkeypatch):
    """Killed after the first checkpoint of the second row: that row goes on from it, the first is left as it is."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    one = ["--seeds", "1", "--json"]
    expected = mvar(*command, *one, "--out", straight).json
    end = "prefixes-1-windows-whole/seed-0/checkpoints/step-00000002.pt"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_ROW, end, *map(str, [*command, *one]), "--out", str(out)],
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.parts[-3] for path in out.rglob("row.json")] == ["prefixes-all-windows-whole"]
    planned = mvar(*command, *one, "--out", out, "--dry-run").json
    assert [row["done"] for row in planned["rows"]] == [True, False]

    steps = []
    train_run = ablation.train_run

    def watched(console, *args, **kwargs):
        show = console._show
        console._show = lambda done, *rest: (steps.append(done), show(done, *rest))
        return train_run(console, *args, **kwargs)

    monkeypatch.setattr(ablation, "train_run", watched)
    found = mvar(*command, *one, "--out", out).json
    assert steps == [3, 4]
    assert weights(out) == weights(straight)
    timeless = ("validation_loss", "validation_scale_loss", "fid", "loss")
    for here, there in zip(found["aggregate"], expected["aggregate"], strict=True):
        assert {name: here[name] for name in timeless} == {name: there[name] for name in timeless}


def test_an_interrupted_row_goes_on(mvar, command, tmp_path, monkeypatch):
    one = ["--seeds", "1", "--prefixes", "1", "--windows", "whole", "--out", tmp_path / "out", "--json"]

    def interrupting(*_):
        def show(done, *_):
            if done == 3:
                raise KeyboardInterrupt

        return show

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "_steps_of_all", interrupting)
        stopped = mvar(*command, *one)
    assert stopped.code == 130
    assert "The same command goes on from here" in stopped.err
    (row,) = (tmp_path / "out" / "rows").glob("*/*")
    assert [path.name for path in (row / "checkpoints").iterdir()] == ["step-00000002.pt", "step-00000003.pt"]
    assert not (row / "row.json").exists()
    assert mvar(*command, *one).json["rows"][0]["steps"] == 4


def test_a_row_is_what_train_makes_of_its_setting(mvar, command, preset, tokens, model, tmp_path):
    """So rows of one seed share first weights, data and order, which follow from the seed."""
    out = tmp_path / "out"
    mvar(*command, "--prefixes", "2", "--seeds", "3,", "--windows", "0,0,3", "--out", out, "--json")
    for name, setting in (("prefixes-2-windows-whole", "2, windows: []"), ("prefixes-1-windows-0-0-3", "1")):
        alone = tmp_path / name
        given = ["--preset", preset, "--tokens", tokens, "--checkpoint", model, "--seed", 3, "--device", "cpu"]
        trained = mvar("train", *given, "--set", f"attention={{scale_prefixes: {setting}}}", "--out", alone, "--json")
        assert trained.json["steps"] == 4
        file = "transformer.safetensors"
        assert (alone / file).read_bytes() == (out / "rows" / name / "seed-3" / file).read_bytes()


def test_rows_take_the_same_turns(mvar, command, tmp_path):
    """Which scales the interleaved curriculum trains alone follows from the preset, not from each row's windows."""
    out = tmp_path / "out"
    mvar(*command, "--seeds", 1, "--set", "train.curriculum=interleaved", "--windows", "3", "--out", out, "--json")
    turns = {yaml.safe_load(path.read_text())["train"]["scales_alone"] for path in out.rglob("config.yaml")}
    assert turns == {1}


def test_images_are_tokenized_and_a_tokenizer_is_trained(mvar, preset, images, classifier, tmp_path, capfd):
    out = tmp_path / "out"
    given = [
        "ablate", "--preset", preset, "--data", images, "--device", "cpu", "--prefixes", "none", "--windows", "3,whole",
        "--seeds", 1, "--num", 2, "--bench-batch", 1, "--out", out,
    ]  # fmt: skip
    result = mvar(*given, "--json").json
    assert len(result["rows"]) == 2
    assert (out / "tokenizer" / "tokenizer.safetensors").is_file()
    assert result["images"] + result["held_out"] == 12
    # Without the Inception network there is no FID, and the report says why.
    scores = result["rows"][0]["scores"]
    assert scores["fid"] is None
    assert "Inception" in scores["reasons"]["fid"]
    assert "FID is not computed" in (out / "ablation.md").read_text()
    before = weights(out)
    assert mvar(*given, "--json").json["aggregate"] == result["aggregate"]
    assert weights(out) == before
    mvar(*given, "--overwrite", "--set", "train.optimizer.lr=1e-2", "--json")
    assert weights(out).keys() == before.keys()
    assert weights(out) != before


@pytest.mark.slow
def test_digits_from_nothing(mvar, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "measure_alone", measure_alone)
    result = mvar(
        "ablate", "--preset", "digits", "--data", "digits", "--device", "cpu", "--prefixes", "all,1", "--windows", "3",
        "--seeds", 2, "--steps", 200, "--set", "train_tokenizer.steps=60", "--out", tmp_path / "out", "--json",
    ).json  # fmt: skip
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        scores = row["scores"]
        assert scores["demo_fid"] == pytest.approx(scores["fid"], rel=1e-6)
        assert 0 < scores["demo_fid_floor"] < scores["demo_fid_class_means"]
        assert row["cost"]["memory_is"].startswith("resident")


def test_part_of_a_cache_is_read_as_a_whole_one(tokens):
    cache = TokenCache.open(tokens)
    train, held = split_off(cache, 0.25, seed=0)
    assert (train.num_images, held.num_images) == (9, 3)
    assert sorted([*train.images, *held.images]) == list(range(12))
    for part in (train, held):
        rows = np.arange(len(part))[::-1]
        found, labels = part.batch(rows)
        views = cache.num_views
        expected, expected_labels = cache.batch(part.images[rows // views] * views + rows % views)
        assert torch.equal(found, expected)
        assert torch.equal(labels, expected_labels)
        assert part.item_name(0) == cache.item_name(int(part.images[0]) * views)
        with pytest.raises(IndexError):
            part.batch(np.array([len(part)]))
    assert np.array_equal(split_off(cache, 0.25, seed=0)[1].images, held.images)
    assert not np.array_equal(split_off(cache, 0.25, seed=1)[1].images, held.images)
    with pytest.raises(DataError, match="none can be held out"):
        split_off(split_off(cache, 0.01, seed=0)[1], 0.5, seed=0)


def test_lists_of_settings():
    assert parse_prefixes("all, 2,1") == ["all", 2, 1]
    assert parse_prefixes("none") == []
    assert parse_windows(["3,5,7,9,whole"], 4) == [3, 5, 7, 9, "whole"]
    assert parse_windows(["3", "5", "0,0,3,5"], 4) == [3, 5, (0, 0, 3, 5)]
    assert parse_windows(["3;0,0,3,5;0"], 4) == [3, (0, 0, 3, 5), "whole"]
    assert parse_windows(["3,5,7,9"], 4) == [3, 5, 7, 9]
    assert parse_windows(["auto,auto:5,7"], 4) == ["auto", "auto:5", 7]
    assert parse_windows(["none"], 4) == []
    assert parse_seeds("3", 0) == (0, 1, 2)
    assert parse_seeds("2", 10) == (10, 11)
    assert parse_seeds("7,", 0) == (7,)
    assert parse_seeds("5,1", 0) == (5, 1)


@pytest.mark.parametrize(
    ("parse", "problem"),
    [
        (lambda: parse_prefixes("all,x"), "neither a number nor all"),
        (lambda: parse_windows(["0,0,3"], 4), "found 3 entries"),
        (lambda: parse_windows(["0,whole"], 2), "write whole in place of 0"),
        (lambda: parse_windows(["big"], 4), "neither a number nor whole"),
        (lambda: parse_windows(["auto:"], 4), "neither a number nor whole"),
        (lambda: parse_windows(["0,0,0,auto"], 4), "write whole in place of 0"),
        (lambda: parse_seeds("x", 0), "--seeds"),
        (lambda: parse_seeds("0", 0), "at least one"),
        (lambda: parse_seeds("1,1", 0), "twice"),
    ],
)
def test_lists_that_make_no_sense(parse, problem):
    with pytest.raises(ConfigError, match=problem):
        parse()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--data", "digits"], "not both"),
        (["--windows", "4"], "odd"),
        (["--prefixes", "9"], "1 … 3"),
        (["--windows", "none"], "stands alone"),
        (["--steps", "3", "--epochs", "2"], "--steps and --epochs"),
        (["--attention", "nonsense"], "nonsense"),
        (["--checkpoint", os.devnull], "model directory"),
        (["--validation", "/nowhere"], "token cache"),
        (["--demo-classifier", "/nowhere"], "no demo classifier"),
    ],
)
def test_wrong_requests_are_refused_before_a_row_is_trained(mvar, command, tmp_path, arguments, problem, monkeypatch):
    monkeypatch.setattr(ablation, "train_run", lambda *_, **__: pytest.fail("trained"))
    assert problem in mvar(*command, "--out", tmp_path / "out", *arguments).error


def test_what_is_not_an_experiment_is_not_written_over(mvar, command, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in mvar(*command, "--out", tmp_path).error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
