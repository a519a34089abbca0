"""Sampling and editing to files from Python; how interruptions resume is tested on the command line."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mvar_core as mvar
from mvar_core.errors import ConfigError, DataError
from mvar_core.sampling.images import Samples
from mvar_core.sampling.shards import SampleShards
from mvar_core.workflows.edit import EditResult

CPU = mvar.Machine(device="cpu", dtype="float32")


def test_samples_are_those_of_the_pipeline(model: Path, tmp_path: Path) -> None:
    settings = mvar.SamplingConfig(cfg=2.0)
    seen: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int, *, unit: str = "images", note: str = "") -> None:
        seen.append((stage, done, total))

    out = tmp_path / "a.npz"
    result = mvar.sample_to(
        out, checkpoint=model, classes=[2, "cat"], num=2, settings=settings, seed=3, machine=CPU, progress=progress
    )
    assert (result.images, result.resumed, result.outputs, result.interrupted) == (4, 0, (out,), False)
    assert result.settings["cfg"] == 2.0
    assert result.settings["top_k"] == 8, "as the model recommends"
    assert seen[-1][1:] == (4, 4)
    same = mvar.Pipeline.from_pretrained(model, machine=CPU).sample([2, 2, 0, 0], settings=settings, seed=3)
    with np.load(out) as file:
        assert np.array_equal(file["arr_0"], same.images.numpy())
        assert file["labels"].tolist() == [2, 2, 0, 0]
        assert file["class_names"].tolist() == ["cat", "dog", "golden retriever"]
    assert result.to_dict()["classes"] == [{"name": "golden retriever", "index": 2}, {"name": "cat", "index": 0}]


def test_classes_that_are_called_by_numbers(model: Path, tmp_path: Path) -> None:
    """A number is a name first; folders and their names say which class is which."""
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "class_names": ["1", "2", "10"]}))

    def chosen(classes: Any) -> list[tuple[str, int]]:
        out = tmp_path / f"out-{classes}"
        result = mvar.sample_to(out, checkpoint=tmp_path / "model", classes=classes, machine=CPU)
        assert json.loads((out / "classes.json").read_text()) == ["1", "2", "10"]
        assert [path.name.partition("_")[2] for path in result.outputs] == [f"{c['index']}.png" for c in result.classes]
        return [(each["name"], each["index"]) for each in result.classes]

    assert chosen("2") == [("2", 1)]
    assert chosen("#2") == [("10", 2)]
    assert chosen([2, "10,1"]) == [("10", 2), ("1", 0)]
    with pytest.raises(DataError, match="'#0'"):
        chosen("0")
    pipe = mvar.Pipeline.from_pretrained(tmp_path / "model", machine=CPU)
    assert pipe.classes.resolve("10, #0") == [2, 0]
    assert pipe.sample(["10", "10", 0]).labels == pipe.sample([2, 2, 0]).labels
    edited = mvar.edit(
        tmp_path / "out-2" / "00000_1.png", tmp_path / "e.npz", checkpoint=model, box=(0, 0, 8, 8), machine=CPU
    )
    with np.load(tmp_path / "e.npz") as file:
        assert edited.classes == ()
        assert "class_names" not in file


def test_nothing_to_generate_and_dry_runs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--class"):
        mvar.sample_to(tmp_path / "x", checkpoint=model)
    planned = mvar.sample_to(tmp_path / "x", checkpoint=model, classes="all", num=2, dry_run=True, machine=CPU)
    assert planned.to_dict()["images"] == 6
    image = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(image)
    edit = mvar.edit(image, tmp_path / "y", checkpoint=model, box=(0, 0, 8, 8), dry_run=True, machine=CPU)
    assert edit.to_dict()["edits"][0]["kept_by_scale"] == [1, 3, 12]
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_full_disk_says_what_is_kept_and_the_same_call_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SampleShards.write

    def full(shards: SampleShards, shard: int, samples: Samples) -> None:
        if shard >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(shards, shard, samples)

    def sample(name: str) -> mvar.SampleResult:
        return mvar.sample_to(tmp_path / name, checkpoint=model, classes="all", num=2, batch_size=1, machine=CPU)

    with monkeypatch.context() as patch:
        patch.setattr(SampleShards, "write", full)
        with pytest.raises(DataError, match=r"x\.npz.* is full; 3 of 6 images are kept\. .*same command"):
            sample("x.npz")
    assert [path.name for path in tmp_path.iterdir()] == [".x.npz.parts"]
    assert sample("x.npz").resumed == 3
    sample("y.npz")
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


@pytest.mark.parametrize(("name", "form"), [("x.npz", None), ("x.png", None), ("x", "png")])
def test_a_finished_output_is_done_and_other_settings_are_refused(
    model: Path, tmp_path: Path, name: str, form: str | None
) -> None:
    def sample(**further: Any) -> mvar.SampleResult:
        return mvar.sample_to(tmp_path / name, checkpoint=model, classes="all", format=form, machine=CPU, **further)

    first = sample(stages=True)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    again = sample(stages=True)
    assert (again.images, again.resumed, again.images_per_second) == (3, 3, None)
    assert again.outputs == first.outputs
    with pytest.raises(DataError, match="--overwrite"):
        sample(stages=True, seed=1)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert sample(stages=True, seed=1, overwrite=True).resumed == 0
    first.outputs[-1].unlink()
    if form == "png":
        with pytest.raises(DataError, match="--overwrite"):
            sample(stages=True, seed=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num", 0), ("num", -1), ("num", 1.5), ("num", 10**30), ("seed", -1), ("seed", 1.5), ("seed", 2**64),
     ("batch_size", 0), ("batch_size", -1), ("batch_size", 1.5), ("classes", 99), ("classes", [-1]), ("classes", [""]),
     ("settings", {"cfg": math.inf}), ("machine", {"memory": math.inf}), ("format", "gif"), ("tokenizer", "/nowhere"),
     ("out", ""), ("out", "/dev/null"), ("out", "x.jpg"), ("checkpoint", "/dev/zero"), ("words", "x")],
)  # fmt: skip
def test_wrong_values_are_refused_and_leave_nothing(model: Path, tmp_path: Path, name: str, value: object) -> None:
    arguments = {"out": tmp_path / "x", "checkpoint": model, "classes": "all", "machine": CPU, name: value}
    with pytest.raises(mvar.MvarError):
        mvar.sample_to(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_images_to_edit_with_odd_names_and_of_odd_kinds(model: Path, tmp_path: Path) -> None:
    def edit(*images: object, **further: object) -> EditResult:
        options = {"checkpoint": model, "box": (0, 0, 8, 16), "machine": CPU, **further}
        return mvar.edit(images, tmp_path / "out", overwrite=True, **options)

    for name in (b"\xff\xfe.png", b"two\nlines.png", "ünï.png".encode()):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        with path.open("wb") as file:
            Image.new("RGB", (16, 16)).save(file, format="PNG")
        result = edit(path)
        assert result.images == 1
        json.dumps(result.to_dict(), ensure_ascii=False).encode()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for images in ((), (tmp_path / "pipe.png",), (tmp_path / "eps.png",), (tmp_path / "loop.png",), ("/dev/zero",)):
        with pytest.raises(mvar.MvarError, match=str(images[0]) if images else "no image"):
            edit(*images)
        with pytest.raises(mvar.MvarError):
            edit(path, box=None, mask=images[0] if images else "")
