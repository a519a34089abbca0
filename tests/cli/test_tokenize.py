"""`mvar tokenize` as a user runs it: in several processes, killed and run again, on every kind of source."""

from __future__ import annotations

import io
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvar_core.data.tokens import TokenCache

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


def test_a_tar_shard_gives_the_tokens_of_its_folder(mvar, model, images, tmp_path):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for number, path in enumerate(sorted(images.rglob("*.png"))):
            for extension, content in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    caches = []
    for data, out in ((images, "folder"), (tmp_path / "shard-0.tar", "tar")):
        options = ["--checkpoint", model, "--data", data, "--out", tmp_path / out, "--crops", 2]
        assert mvar("tokenize", *options, "--json").json["views"] == 2
        caches.append(TokenCache.open(tmp_path / out))
    rows = np.arange(len(caches[0]))
    assert len(rows) == 24
    assert caches[0].class_names == caches[1].class_names
    for first, second in zip(caches[0].batch(rows), caches[1].batch(rows), strict=True):
        assert first.equal(second)


def test_bad_images_stop_the_command_or_are_left_out(mvar, model, images, tmp_path):
    import shutil

    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/dog/1.png").write_bytes(b"damaged")
    options = ["--checkpoint", model, "--data", tmp_path / "images", "--out", tmp_path / "tokens"]
    assert "dog/1.png is not an image" in mvar("tokenize", *options).error
    result = mvar("tokenize", *options, "--skip-bad", "--json").json
    assert result["images"] == 11
    assert result["skipped"] == ["dog/1.png"]
    cache = TokenCache.open(tmp_path / "tokens", verify=True)
    assert cache.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert cache.item_name(5) == "dog/2.png"
    assert mvar("tokenize", *options, "--json").json["encoded"] == 0  # complete, as it is


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_bytes_of_an_uninterrupted_run(model, tmp_path):
    options = ["--checkpoint", model, "--data", "digits", "--flip", "--batch-size", 4]
    options += ["--set", "data.augmented_views=10", "--json"]
    whole = start([*options, "--out", tmp_path / "whole"])
    began = time.monotonic()
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    duration = time.monotonic() - began
    out, kills, delays = tmp_path / "killed", 0, random.Random(0)
    while kills < 10:
        process = start([*options, "--out", out])
        try:
            while process.poll() is None and not (out / "manifest.partial.json").exists():
                time.sleep(0.01)
            process.wait(2 + delays.random() * duration / 10)
            raise AssertionError("it ended before it was killed ten times")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        process.communicate()
        kills += 1
        for path in out.glob("tokens-*.npy"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    final = start([*options, "--out", out])
    final.communicate(timeout=300)
    assert final.returncode == 0
    assert contents(out) == contents(tmp_path / "whole")
