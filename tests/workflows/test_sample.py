"""Sampling and editing to files from Python; how interruptions resume is tested on the command line."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mvar_core as mvar
from mvar_core.errors import ConfigError, DataError
from mvar_core.sampling.images import Samples
from mvar_core.sampling.shards import SampleShards

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
