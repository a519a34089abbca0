"""A training run that is killed at any moment: the same command finishes it to the bit, and no file is ever partial."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from mvar_cli.app import app
from mvar_core.training.metrics import read_metrics

CLOCKED = {"images_per_second", "tokens_per_second", "peak_memory_bytes"}

# Runs `mvar` and kills itself with SIGKILL just before or after a file takes its final name.
KILLED_AT_RENAME = """
import os, pathlib, signal, sys
name, when = sys.argv.pop(1), sys.argv.pop(1)
rename = pathlib.Path.replace
def replace(self, target):
    if when == "after":
        rename(self, target)
    if str(target) == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return target if when == "after" else rename(self, target)
pathlib.Path.replace = replace
from mvar_cli.__main__ import main
main()
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of several threads round in an order of their own; the processes that are killed have one thread too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def command(preset: Path, model: Path, tokens: Path) -> Callable[[Path], list[str]]:
    """A training run of the tiny model that writes every kind of file, into a given directory."""
    loop = "keep=1", "sample_every=4", "log_every=3", "checkpoint_every=5"
    settings = [word for setting in loop for word in ("--set", f"train.{setting}")]
    given = ["train", "--preset", preset, "--tokens", tokens, "--validation", tokens, "--checkpoint", model]
    given += ["--steps", 12, "--ema", 0.9, "--micro-batch", 2, *settings]
    return lambda out: [*map(str, given), "--out", str(out)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def check_whole(out: Path) -> None:
    """Every file that has its final name can be read to its end."""
    for path in out.rglob("*"):
        if path.is_dir() or path.name.startswith("."):
            continue
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            assert yaml.safe_load(path.read_text())["name"]
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        else:
            assert path.name in ("metrics.jsonl", "README.md"), path


def check_equal(out: Path, expected: Path) -> None:
    """The same files with the same weights, and the same lines of metrics.jsonl but for the clock."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (out, expected)]
    assert names[0] == names[1]
    for name in ("transformer.safetensors", "best/transformer.safetensors", "samples/step-00000012.png"):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    assert measures(out) == measures(expected)


def measures(out: Path) -> list[dict[str, Any]]:
    lines = read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]


@pytest.fixture(scope="module")
def expected(command: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("expected") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert CliRunner().invoke(app, command(out)).exit_code == 0
    torch.set_num_threads(threads)
    check_whole(out)
    return out


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("checkpoints/step-00000010.pt", "before"),
        ("samples/step-00000008.png", "before"),
        ("transformer.safetensors", "after"),
    ],
)
def test_a_run_killed_while_it_writes_resumes_to_the_same_bits(mvar, command, expected, tmp_path, name, when):
    """Before a checkpoint or a picture takes its name, and when the weights are there but not yet their config.json."""
    out = tmp_path / "out"
    code = [sys.executable, "-c", KILLED_AT_RENAME, str(out / name), when]
    done = subprocess.run([*code, *command(out)], capture_output=True, env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_whole(out)
    assert (out / name).exists() == (when == "after")
    assert not (out / "config.json").exists()
    assert mvar(*command(out)).code == 0
    check_whole(out)
    check_equal(out, expected)


@pytest.mark.slow
def test_runs_killed_at_ten_random_moments_end_in_the_same_bits(mvar, command, expected, tmp_path):
    source, kills, finished = random.Random(0), 0, 0
    out = tmp_path / "out-0"
    while kills < 10:
        before = (out / "config.yaml").stat().st_mtime_ns if (out / "config.yaml").exists() else 0
        child = subprocess.Popen(
            [sys.executable, "-m", "mvar_cli", *command(out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
        # The session's first act is to write config.yaml: what comes before changes nothing.
        while child.poll() is None and (
            not (out / "config.yaml").exists() or (out / "config.yaml").stat().st_mtime_ns == before
        ):
            time.sleep(0.002)
        time.sleep(source.uniform(0, 0.7))
        child.kill()
        if child.wait() == 0:  # it had finished; the next one is killed in a directory of its own
            check_equal(out, expected)
            finished += 1
            out = tmp_path / f"out-{finished}"
            continue
        kills += 1
        check_whole(out)
    assert mvar(*command(out)).code == 0
    check_whole(out)
    check_equal(out, expected)
