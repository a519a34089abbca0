"""Sampling and editing to files from Python; how interruptions resume is tested on the command line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mvar_core as mvar
from mvar_core.errors import ConfigError

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
