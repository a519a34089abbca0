"""`--nproc N`: several processes that behave like one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvar_cli.app import COMMANDS, load_command
from mvar_core.data.tokens import TokenCache
from mvar_core.distributed import Heartbeat, first_failure, lost_connection
from mvar_core.training.metrics import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mvar_cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def processes_named(word: str) -> list[int]:
    """Processes whose command line holds a word, without this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def test_every_shared_command_has_the_option_and_no_other():
    for entry in COMMANDS:
        names = {name for parameter in load_command(entry).params for name in parameter.opts}
        assert ("--nproc" in names) == entry.shared, entry.name


@pytest.mark.slow
def test_two_processes_print_one_result_and_leave_nothing_behind(model, classifier, images, tmp_path):
    options = ["--checkpoint", model, "--num-samples", 5, "--reference", images]
    options += ["--features", classifier, "--metrics", "fid", "--cache", tmp_path / "cache", "--json"]
    code, out, err = finish(start("evaluate", *options, "--nproc", "2"))
    assert code == 0, err
    assert json.loads(out)["processes"] == 2
    assert processes_named(str(tmp_path)) == []


def test_what_all_processes_find_wrong_is_said_once(model, classifier, images):
    options = ["--checkpoint", model, "--num-samples", 3, "--reference", images]
    options += ["--features", classifier, "--metrics", "fid"]
    code, out, err = finish(start("evaluate", *options, "--nproc", "2"))  # each process needs two images
    lines = [line for line in err.splitlines() if not line.startswith("--attention")]
    assert (code, out) == (1, "")
    assert len(lines) == 1, err
    assert lines[0].startswith("error: 3 images are too few for 2 processes")


def test_wrong_usage_starts_no_process(mvar):
    assert mvar("evaluate", "--nproc", "2").code == 2
    assert mvar("evaluate", "--nproc", "0", "--reference", "digits").code == 2
    assert "No such option" in mvar("convert", "--nproc", "2").err


def test_a_command_for_one_process_is_refused_under_torchrun(mvar, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        outcome = mvar("convert", "--out", "nowhere")
    assert outcome.code == 1
    assert "runs in one process" in outcome.err


class Failure:
    """What torchrun says of a process that failed."""

    def __init__(self, exitcode: int, timestamp: int, **told: Any):
        self.exitcode = exitcode
        self.timestamp = timestamp
        self.error_file_data = told

    def signal_name(self) -> str:
        return signal.Signals(-self.exitcode).name


@pytest.mark.parametrize(
    ("failures", "code", "text"),
    [
        ({0: Failure(1, 5, line="error: no such file")}, 1, "error: no such file"),
        ({0: Failure(1, 5, line="error: lost", consequence=True), 1: Failure(1, 6, line="error: cause")}, 1, "cause"),
        ({0: Failure(1, 7, line="error: later"), 1: Failure(1, 6, line="error: first")}, 1, "first"),
        ({1: Failure(-9, 5)}, 1, "process 2 of 2 was ended by SIGKILL"),
        ({0: Failure(-15, 5), 1: Failure(1, 5, line="error: cause")}, 1, "cause"),
        ({0: Failure(-15, 5), 1: Failure(-9, 5)}, 1, "process 2 of 2 was ended by SIGKILL"),
        ({0: Failure(1, 5)}, 1, "process 1 of 2 ended with exit code 1"),
        ({0: Failure(130, 5)}, 130, ""),
    ],
)
def test_the_first_cause_is_what_is_told(failures, code, text):
    found_code, found = first_failure(failures, 2)
    assert found_code == code
    assert text in found
    assert text or not found


def test_errors_of_connections_are_told_apart_where_there_are_several_processes(monkeypatch):
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert not lost_connection(error)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_connection(error)
    assert not lost_connection(RuntimeError("shape mismatch"))


class Store(dict):
    """The part of a TCPStore that a heartbeat uses."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()


def test_a_process_that_is_silent_ends_all():
    store = Store()
    first, second, third = (Heartbeat(rank, 3, silence=30) for rank in range(3))
    for now in range(0, 100, 10):
        assert {beat.problem(store, now) for beat in (first, second, third)} == {None}
    assert first.problem(store, 110) is None  # the second is silent from here on
    assert third.problem(store, 110) is None
    assert "process 2 of 3 has not been heard from for" in str(first.problem(store, 141))
    assert "process 2 of 3" in str(third.problem(store, 142))


def test_the_first_process_is_watched_and_a_finished_one_is_not_missed():
    store = Store()
    first, second = Heartbeat(0, 2, silence=30), Heartbeat(1, 2, silence=30)
    assert second.problem(store, 0) is None
    assert second.problem(store, 31) is not None  # it has never begun
    store.clear()
    first, second = Heartbeat(0, 2, silence=30), Heartbeat(1, 2, silence=30)
    first.problem(store, 0)
    second.problem(store, 0)
    store.set("mvar/beat/0", "done")
    assert second.problem(store, 50) is None
    assert second.problem(store, 100) is None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_ctrl_c_ends_all_processes_with_130(model, classifier, images, tmp_path):
    options = ["--checkpoint", model, "--num-samples", 100_000, "--reference", images]
    options += ["--features", classifier, "--cache", tmp_path / "cache"]
    process = start("evaluate", *options, "--nproc", "2")
    until = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*.npz")) and time.monotonic() < until:  # the reference is done
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert err.count("interrupted") == 1
    assert "Traceback" not in err
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".npz"}
    assert processes_named(str(tmp_path)) == []


def test_train_in_two_processes_gives_the_model_of_one(mvar, preset, tokens, model, tmp_path):
    options = ["--preset", preset, "--tokens", tokens, "--checkpoint", model, "--steps", 4, "--json"]
    code, out, err = finish(start("train", *options, "--out", tmp_path / "two", "--fsdp", "--nproc", "2"))
    assert code == 0, err
    found = json.loads(out)
    assert (found["steps"], found["processes"]) == (4, 2)
    assert mvar("train", *options, "--out", tmp_path / "one").json["loss"] == pytest.approx(found["loss"], abs=1e-5)
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert names[0] == names[1]


def test_a_batch_that_processes_cannot_share_is_one_line(preset, tokens, model, tmp_path):
    options = ["--preset", preset, "--tokens", tokens, "--checkpoint", model, "--out", tmp_path / "run"]
    code, out, err = finish(start("train", *options, "--batch-size", 3, "--fsdp", "--nproc", "2"))
    assert (code, out) == (1, "")
    assert err.count("error: ") == 1
    assert "A batch of 3 images cannot be shared by 2 processes with --fsdp" in err


@pytest.mark.slow
def test_what_the_first_process_alone_looks_at_is_one_line(preset, tokens, model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    options = ["--preset", preset, "--tokens", tokens, "--checkpoint", model, "--out", tmp_path / "full"]
    code, _, err = finish(start("train", *options, "--nproc", "2"))  # what the first process alone looks at
    assert (code, err.count("error: ")) == (1, 1), err
    assert "is not empty" in err


@pytest.mark.slow
def test_tokenizer_tokens_and_samples_in_two_processes_are_those_of_one(preset, images, model, tmp_path):
    """Also the whole way on a machine with two GPUs: train-tokenizer, tokenize, sample."""
    commands = {
        "tokenizer": ["train-tokenizer", "--preset", preset, "--data", images],
        "tokens": ["tokenize", "--checkpoint", model, "--data", images],
        "samples": ["sample", "--checkpoint", model, "--class", "all", "--num", 3, "--format", "npz", "--save-tokens"],
    }
    for name, command in commands.items():
        for count in (1, 2):
            ending = ".npz" if name == "samples" else ""
            code, _, err = finish(start(*command, "--out", tmp_path / f"{name}-{count}{ending}", "--nproc", count))
            assert code == 0, err
    first, second = (np.load(tmp_path / f"samples-{count}.npz") for count in (1, 2))
    assert np.array_equal(first["tokens"], second["tokens"])
    assert np.array_equal(first["arr_0"], second["arr_0"])
    rows = np.arange(12)
    one, two = (TokenCache.open(tmp_path / f"tokens-{count}").batch(rows) for count in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    lines = [read_metrics(tmp_path / f"tokenizer-{count}" / "metrics.jsonl")[-1] for count in (1, 2)]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], abs=1e-4)


def run_of(out: Path, preset: Path, model: Path, images: Path, *more: Any) -> tuple[np.ndarray, list[float]]:
    """Tokens and losses of a training that starts from images."""
    options = ["--preset", preset, "--checkpoint", model, "--data", images, "--out", out, "--device", "cpu"]
    options += ["--dtype", "float32", "--set", "train.log_every=1", "--set", "data.crops=2", "--json", *more]
    code, found, err = finish(start("train", *options))
    assert code == 0, err
    assert json.loads(found)["steps"] == 4
    cache = TokenCache.open(out / "tokens")
    tokens = np.stack([np.asarray(cache.batch(np.array([row]))[0][0]) for row in range(len(cache))])
    return tokens, [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
def test_processes_share_the_tokenizing_and_the_training_of_images(preset, model, images, tmp_path):
    alone, losses = run_of(tmp_path / "one", preset, model, images)
    tokens, shared_losses = run_of(tmp_path / "two", preset, model, images, "--nproc", "2")
    assert np.array_equal(tokens, alone)
    assert len(alone) == 24
    np.testing.assert_allclose(shared_losses, losses, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp"], ["--compile"], ["--fsdp", "--compile"]])
def test_processes_share_a_fine_tuning(preset, model, tokens, tmp_path, more):
    """Every process starts from the same weights; blocks may be compiled, and activations computed again."""
    losses = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        options = ["--preset", preset, "--var-checkpoint", model, "--tokens", tokens, "--out", out, "--device", "cpu"]
        options += ["--dtype", "float32", "--set", "train.log_every=1", "--activation-checkpointing", "--json"]
        code, printed, err = finish(start("finetune-from-var", *options, *(["--nproc", 2, *more] if count > 1 else [])))
        assert code == 0, err
        assert json.loads(printed)["processes"] == count
        assert set(json.loads((out / "started-from.json").read_text())["counts"]) == {"loaded"}
        losses[count] = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
