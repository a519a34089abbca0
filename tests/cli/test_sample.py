"""`mvar sample` stopped at any moment: what it leaves, and that the same command ends as if it had not been stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mvar_core.sampling.shards import SampleOutput

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

DRIVER = """
import importlib, json, os, signal, sys
import torch, PIL.Image
from mvar_cli.app import app
import mvar_core.pipeline, pathlib

def run(arguments, module, name, when, number, kind):
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for step in path:
        owner = getattr(owner, step)
    original = getattr(owner, last)
    calls = [0]

    def counted(*positional, **named):
        calls[0] += 1
        hit = calls[0] == number
        if hit and when == "before":
            os.kill(os.getpid(), kind)
        result = original(*positional, **named)
        if hit and when == "after":
            os.kill(os.getpid(), kind)
        return result

    setattr(owner, last, counted)
    app(arguments, prog_name="mvar")

# A shell that starts the tests in the background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
ends = []
for scenario in json.loads(sys.stdin.read()):
    child = os.fork()
    if not child:
        code = 99
        try:
            run(*scenario)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("ENDS" + json.dumps(ends))
"""


def parts_directory(out):
    return SampleOutput.of(out).shards


def stop(scenarios):
    """Run each command until the named call, and end it there by a signal; returns how each ended, and stderr."""
    text = json.dumps([[list(map(str, arguments)), *rest] for arguments, *rest in scenarios])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=text, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ENDS")[1]), done.stderr


def content(*paths):
    """Every file below some paths, hidden ones too, with its bytes."""
    files = [(path.name, file) for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return {(name, file.name): file.read_bytes() for name, file in files if file.is_file()}


KILL, INTERRUPT = int(signal.SIGKILL), int(signal.SIGINT)
# N = 6: a shard each. Renames: the manifest, six shards, the output (and its strips).
MOMENTS_NPZ = {
    "first-shard-written": ("mvar_core.sampling.shards", "SampleShards.write", "after", 1),
    "third-shard-without-its-name": ("pathlib", "Path.replace", "before", 4),
    "while-assembling": ("mvar_core.sampling.shards", "npz_member", "before", 2),
    "all-but-the-name": ("pathlib", "Path.replace", "before", 8),
    "named-but-not-cleaned": ("pathlib", "Path.replace", "after", 8),
}
MOMENTS_PNG = {
    "between-pictures-of-a-shard": ("PIL.Image", "Image.save", "after", 5),
    "pictures-without-their-record": ("pathlib", "Path.replace", "before", 4),
    "before-the-tokens": ("mvar_core.sampling.shards", "npz_member", "before", 1),
    "between-images-and-strips": ("pathlib", "Path.replace", "after", 8),
}


@pytest.mark.parametrize(("output", "moments"), [("npz", MOMENTS_NPZ), ("png", MOMENTS_PNG)])
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(mvar, model, tmp_path, output, moments):
    options = ["sample", "--checkpoint", model, "--class", "all", "--num", 2, "--format", output, "--save-tokens"]
    options += ["--batch-size", 2, *(["--stages"] if output == "png" else [])]
    suffix = ".npz" if output == "npz" else ""

    def finals(name):
        return [path for path in (tmp_path / f"{name}{suffix}", tmp_path / f"{name}-stages") if path.exists()]

    assert mvar(*options, "--out", tmp_path / f"straight{suffix}").code == 0
    expected = sorted(content(*finals("straight")).values())
    scenarios = [[[*options, "--out", tmp_path / f"{name}{suffix}"], *moment, KILL] for name, moment in moments.items()]
    ends, _ = stop(scenarios)
    assert ends == [-signal.SIGKILL] * len(moments)
    for name in moments:
        left = finals(name)
        if left:
            assert name in ("named-but-not-cleaned", "between-images-and-strips")
            whole = {path.name.removeprefix(name): content(path) for path in left}
            for ending, files in whole.items():
                straight = content(tmp_path / f"straight{ending}")
                assert sorted(files.values()) == sorted(straight.values())
        done = mvar(*options, "--out", tmp_path / f"{name}{suffix}", "--json").json
        assert done["images"] == 6
        assert done["resumed"] == {"third-shard-without-its-name": 2, "pictures-without-their-record": 2}.get(
            name, {"first-shard-written": 1, "between-pictures-of-a-shard": 2}.get(name, 6)
        )
        assert sorted(content(*finals(name)).values()) == expected
        assert not parts_directory(tmp_path / f"{name}{suffix}").exists()
        assert all(os.path.isfile(path) for path in done["outputs"])


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_resume(mvar, model, tmp_path):
    options = ["sample", "--checkpoint", model, "--class", "all", "--num", 2, "--format", "npz", "--batch-size", 1]
    first = [*options, "--out", tmp_path / "none.npz", "--json"]
    second = [*options, "--out", tmp_path / "some.npz", "--json"]
    ends, errors = stop(
        [
            [first, "mvar_core.sampling.images", "sample_tokens", "before", 1, INTERRUPT],
            [second, "mvar_core.sampling.images", "sample_tokens", "before", 4, INTERRUPT],
            [[*options, "--out", tmp_path / "term.npz"], "mvar_core.sampling.images", "sample_tokens", "before", 4,
             int(signal.SIGTERM)],
        ]
    )  # fmt: skip
    assert ends == [130, 130, 130]
    assert "3 of 6 images are kept" in errors
    assert "same command" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [".some.npz.parts", ".term.npz.parts"]
    outcome = mvar(*second)
    assert outcome.json["resumed"] == 3
    assert "3 of 6 images exist already" in outcome.err
    mvar(*options, "--out", tmp_path / "straight.npz")
    assert (tmp_path / "some.npz").read_bytes() == (tmp_path / "straight.npz").read_bytes()


def test_a_started_run_refuses_other_settings_before_slow_work(mvar, model, tmp_path, monkeypatch):
    options = ["sample", "--checkpoint", model, "--class", "all", "--num", 2, "--out", tmp_path / "x.npz"]
    ends, _ = stop([[options, "mvar_core.sampling.shards", "SampleShards.write", "after", 2, KILL]])
    assert ends == [-signal.SIGKILL]
    with monkeypatch.context() as patch:
        patch.setattr("mvar_core.pipeline.Pipeline.from_pretrained", None)
        error = mvar(*options, "--seed", 1, "--class", "0").error
        assert "settings.seed is 0 there, 1 asked" in error
        assert "--overwrite" in error
        assert "save_tokens is false there, true asked" in mvar(*options, "--save-tokens").error
        (tmp_path / "x.npz").write_text("mine")
        assert "already exists" in mvar(*options).error
        (tmp_path / "x.npz").unlink()
    done = mvar(*options, "--seed", 1, "--overwrite", "--json").json
    assert done["resumed"] == 0
    assert not parts_directory(tmp_path / "x.npz").exists()


def test_other_weights_under_the_same_name_are_other_settings(mvar, model, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    options = ["sample", "--checkpoint", copy, "--class", "all", "--num", 2, "--out", tmp_path / "x.npz"]
    stop([[options, "mvar_core.sampling.shards", "SampleShards.write", "after", 2, KILL]])
    path = copy / "transformer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "weights is" in mvar(*options).error


def test_a_resumed_run_that_lacks_nothing_loads_no_model(mvar, model, tmp_path, monkeypatch):
    options = ["sample", "--checkpoint", model, "--class", "all", "--num", 2, "--out", tmp_path / "x.npz"]
    stop([[options, *MOMENTS_NPZ["while-assembling"], KILL]])
    monkeypatch.setattr("mvar_core.pipeline.Pipeline.from_pretrained", None)
    assert mvar(*options, "--json").json["resumed"] == 6


def test_bad_input_leaves_nothing(mvar, model, tmp_path, monkeypatch):
    options = ["sample", "--checkpoint", model, "--out", tmp_path / "x.npz"]
    monkeypatch.setattr("mvar_core.pipeline.Pipeline.from_pretrained", None)
    for extra, message in (
        (["--class", "3"], "#0 … #2"),
        (["--class", "0", "--top-k", "99"], "99"),
        (["--class", "0", "--attention", "dens"], "dense"),
        (["--class", "0", "--memory", "lots"], "24GB"),
        (["--class", "0", "--format", "png"], "directory"),
        (["--class", "0", "--num", "1000000000000"], "free"),
    ):
        assert message in mvar(*options, *extra).error
    assert list(tmp_path.iterdir()) == []


def launched(*arguments, nproc=2):
    command = [sys.executable, "-m", "mvar_cli", *map(str, arguments), "--nproc", str(nproc)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_processes_generate_what_one_does_and_resume_what_one_began(mvar, model, tmp_path):
    options = ["sample", "--checkpoint", model, "--class", "all", "--num", 3, "--save-tokens", "--json"]
    straight, begun = tmp_path / "straight.npz", tmp_path / "begun.npz"
    for size in (1, 3, 8):
        mvar(*options, "--out", tmp_path / f"{size}.npz", "--batch-size", size).json  # noqa: B018
    one = (tmp_path / "8.npz").read_bytes()
    assert (tmp_path / "1.npz").read_bytes() == one == (tmp_path / "3.npz").read_bytes()
    two = launched(*options, "--out", straight, "--batch-size", 2)
    assert (two["processes"], two["images"], two["resumed"]) == (2, 9, 0)
    assert straight.read_bytes() == one
    ends, _ = stop([[[*options, "--out", begun], "mvar_core.sampling.shards", "SampleShards.write", "after", 4, KILL]])
    assert ends == [-signal.SIGKILL]
    more = launched(*options, "--out", begun)
    assert 3 <= more["resumed"] <= 4
    assert begun.read_bytes() == one
    with np.load(begun) as file:
        assert file["labels"].tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.slow
@pytest.mark.parametrize("output", ["npz", "png"])
def test_killed_at_random_moments(mvar, model, tmp_path, output):
    chance = random.Random(7)
    options = ["sample", "--checkpoint", model, "--class", "all", "--num", 300, "--format", output, "--batch-size", 8]
    suffix = ".npz" if output == "npz" else ""
    began = time.monotonic()
    assert mvar(*options, "--out", tmp_path / f"straight{suffix}").code == 0
    longest = time.monotonic() - began
    out = tmp_path / f"killed{suffix}"
    command = [sys.executable, "-m", "mvar_cli", *map(str, options), "--out", str(out)]
    kills = 0
    while not out.exists():
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as child:
            deadline = time.monotonic() + 60
            while not parts_directory(out).exists() and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, longest / 8))
            if kills < 20:
                child.kill()
            kills += 1
    if parts_directory(out).exists():
        assert mvar(*options, "--out", out).code == 0
    assert kills > 5
    assert sorted(content(out).values()) == sorted(content(tmp_path / f"straight{suffix}").values())


@pytest.mark.slow
def test_a_killed_process_of_two_leaves_a_run_that_resumes(mvar, model, tmp_path):
    options = ["sample", "--checkpoint", model, "--class", "all", "--num", 100, "--format", "npz", "--json"]
    out = tmp_path / "two.npz"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["--", "mvar_cli"]  # without the dashes torchrun takes --num for an option of its own
    with subprocess.Popen([*command, *map(str, options), "--out", str(out), "--batch-size", "1"], env=ENVIRONMENT,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:  # fmt: skip
        deadline = time.monotonic() + 120
        while len(list(parts_directory(out).glob("shard-*.npz"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0
    assert not out.exists()
    done = mvar(*options, "--out", out).json
    assert done["resumed"] > 0
    mvar(*options, "--out", tmp_path / "one.npz")
    assert out.read_bytes() == (tmp_path / "one.npz").read_bytes()
