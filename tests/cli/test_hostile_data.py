"""Hostile and clumsy `--data`, `--vectors` and `--out` of `mvar tokenize`: exit 1 and one line, or the right result."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


def arguments(model, images, tmp_path, **changes):
    values = {"tokenizer": model, "data": images, "out": tmp_path / "out", **changes}
    return ["tokenize", *(word for name, value in values.items() for word in (f"--{name}", value))]


DATA = {
    "pipe": lambda path: os.mkfifo(path / "1.png"),
    "device": lambda path: (path / "1.png").symlink_to("/dev/zero"),
    "loop": lambda path: (path / "1.png").symlink_to("1.png"),
    "dangling": lambda path: (path / "1.png").symlink_to("nowhere"),
    "eps": lambda path: (path / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"),
    "undecodable class": lambda path: os.makedirs(os.fsencode(path) + b"/\xff") or _copy(path, b"\xff/1.png"),
    "undecodable image": lambda path: (_copy(path, b"\xff.png"), (path / "2.png").write_text("x")),
    "newlines": lambda path: (path / "a\nb.png").write_bytes(b"x"),
    "escapes": lambda path: (path / "\x1b[31m.png").write_bytes(b"x"),
    "empty": lambda path: None,
    "tar": lambda path: (path / "0.tar").write_bytes(b"x" * 2000),
    "parquet": lambda path: (path / "0.parquet").write_bytes(b"PAR1" + b"x" * 2000),
    "folder called png": lambda path: (path / "x.png").mkdir(),
    "circle of folders": lambda path: (path / "a").symlink_to(path),
}


def _copy(path: Path, name: bytes) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16)).save(path / "whole.tmp", format="PNG")
    os.rename(path / "whole.tmp", os.fsencode(path) + b"/" + name)


@pytest.mark.parametrize("kind", DATA)
def test_data(mvar, model, tmp_path, kind):
    (tmp_path / "data").mkdir()
    DATA[kind](tmp_path / "data")
    assert "data" in mvar(*arguments(model, tmp_path / "data", tmp_path)).error
    assert "data" in mvar(*arguments(model, tmp_path / "data", tmp_path), "--json").error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.npy"))


@pytest.mark.parametrize("name", ["x" * 300, "digits:nowhere", "photographs:val", "~nobody/x", "{0..9999999}.tar"])
def test_names(mvar, model, tmp_path, name):
    mvar(*arguments(model, name, tmp_path)).error  # noqa: B018
    assert not (tmp_path / "out").exists()


def test_an_image_with_an_undecodable_name_is_tokenized(mvar, model, tmp_path):
    (tmp_path / "data").mkdir()
    _copy(tmp_path / "data", b"\xff.png")
    (tmp_path / "data/bad.png").write_bytes(b"x")
    assert mvar(*arguments(model, tmp_path / "data", tmp_path), "--skip-bad").code == 0
    again = mvar(*arguments(model, tmp_path / "data", tmp_path), "--skip-bad")
    assert "Complete already" in again.out


def vectors(path: Path) -> dict[str, Path]:
    random = np.random.default_rng(0)
    np.save(path / "nan.npy", np.full((12, 4), np.nan, np.float32))
    np.save(path / "complex.npy", random.random((12, 4)) + 1j)
    np.save(path / "integers.npy", np.ones((12, 4), int))
    np.save(path / "flat.npy", np.ones(12, np.float32))
    np.save(path / "few.npy", np.ones((5, 4), np.float32))
    np.save(path / "none.npy", np.ones((12, 0), np.float32))
    np.save(path / "objects.npy", np.array([{}] * 12), allow_pickle=True)
    np.savez(path / "other.npz", a=np.ones(3))
    np.savez(path / "mask.npz", vectors=np.ones((12, 3, 4), np.float32), mask=np.ones((12, 9), bool))
    np.savez(path / "deep.npz", vectors=np.ones((12, 3, 4, 2), np.float32), mask=np.ones((12, 3), bool))
    np.savez(path / "masked.npz", vectors=np.ones((12, 3, 4), np.float32), mask=np.full((12, 3), np.nan))
    save_file({"vectors": np.ones((12, 4), np.int64)}, path / "integers.safetensors")
    save_file({"other": np.ones(4, np.float32)}, path / "other.safetensors")
    for name, content in {
        "empty.npy": b"", "noise.npz": b"x" * 99, "noise.safetensors": b"\xff" * 99, "text.txt": b"1 2 3",
        "header.safetensors": (10**12).to_bytes(8, "little"), "json.safetensors": (2).to_bytes(8, "little") + b"[]",
    }.items():  # fmt: skip
        (path / name).write_bytes(content)
    os.mkfifo(path / "pipe.npy")
    (path / "folder.npy").mkdir()
    return {file.name: file for file in [*path.iterdir(), path / "absent.npy"]}


def test_vectors(mvar, model, images, tmp_path):
    (tmp_path / "v").mkdir()
    for name, path in vectors(tmp_path / "v").items():
        outcome = mvar(*arguments(model, images, tmp_path, vectors=path))
        assert outcome.code == 1, name
        assert name in outcome.error
        assert not (tmp_path / "out").exists(), name


def test_outputs(mvar, model, images, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "file/below", "full", "loop", "pipe", "x" * 300, "/dev/null", "/proc/out"):
        mvar(*arguments(model, images, tmp_path, out=tmp_path / name)).error  # noqa: B018
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    assert (tmp_path / "file").read_text() == "mine"
