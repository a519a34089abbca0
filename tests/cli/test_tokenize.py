"""`mvar tokenize` as a user runs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "mvar_cli", "tokenize"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(arguments: list[Any], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_processes_write_the_cache_of_one(mvar, model, tmp_path):
    options = ["--checkpoint", model, "--data", "digits:test", "--flip"]
    alone = mvar("tokenize", *options, "--out", tmp_path / "one", "--json").json
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    team = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = [*options, "--out", tmp_path / "two", "--json"]
    started = [start(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **team) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs[0][0].count("\n") == 1  # one JSON object, from the first process alone
    assert outputs[1][0] == ""
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert alone["images"] == 360
    assert alone["views"] == 2
    sizes = [path.stat().st_size for path in (tmp_path / "one").glob("*.npy")]
    assert alone["bytes"] == sum(sizes)
    assert alone["bytes_per_view"] == sum(sizes) / 720


def test_images_that_were_left_out_are_listed(mvar, model, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/dog/1.png").write_bytes(b"damaged")
    options = ["--tokenizer", model, "--data", tmp_path / "images", "--out", tmp_path / "tokens"]
    assert "dog/1.png" in mvar("tokenize", *options).error
    assert "dog/1.png" in mvar("tokenize", *options, "--skip-bad").out


def test_an_option_that_is_gone_says_what_to_type(mvar, model, images, tmp_path):
    given = ["--tokenizer", model, "--data", images, "--out", tmp_path / "out", "--shard-images", 3]
    assert mvar("tokenize", *given).code == 2


def test_splits_are_said_once_and_their_names_work(mvar, model, preset, images, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(images, root / "train")
    shutil.copytree(images / "dog", root / "valid/dog")
    (root / "train/dog/notes.doc").write_bytes(b"x")
    found = mvar("train-tokenizer", "--data", root, "--preset", preset, "--steps", 1, "--out", tmp_path / "tok")
    assert found.code == 0
    assert found.err.count(f"{root}:valid") == found.err.count("1 .doc") == 1
    found = mvar("tokenize", "--tokenizer", model, "--data", f"{root}:valid", "--out", tmp_path / "tokens", "--json")
    assert found.json["images"] == 4


def test_the_limit_of_pixels_and_the_hint_that_raises_it(mvar, model, images, tmp_path):
    options = ["tokenize", "--tokenizer", model, "--data", images, "--out", tmp_path / "tokens"]
    found = mvar(*options, "--max-pixels", 100)
    assert found.code == 1
    hint = found.error[found.error.index("--max-pixels") :].split(".")[0].split()
    assert hint == ["--max-pixels", "256"]
    assert mvar(*options, *hint).code == 0
