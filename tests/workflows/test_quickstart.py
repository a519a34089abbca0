"""The quickstart, with a tiny model: what it leaves, and that it resumes."""

import re

import numpy as np
import pytest
from PIL import Image

import mvar_core as mvar
from mvar_core.errors import ConfigError, DataError
from mvar_core.io.resumable import DirectoryLock

SETTINGS = (
    "image_size=16", "patch_sizes=[1,2,4]", "attention.windows=[0,0,3]", "data.augmented_views=0",
    "transformer.embed_dim=16", "train.steps=4", "train_tokenizer.steps=4", "train_tokenizer.kmeans_batches=1",
)  # fmt: skip
MACHINE = mvar.Machine(device="cpu")


def test_from_nothing_to_a_report(tmp_path, caplog):
    out = tmp_path / "quickstart"
    stages = []
    result = mvar.quickstart(
        out, num=4, settings=SETTINGS, machine=MACHINE, progress=lambda stage, *_, **__: stages.append(stage)
    )
    assert {"tokenizer", "tokenizing", "training", "sampling", "attention"} <= set(stages)
    assert 0 <= result.classifier_accuracy <= 1
    assert result.demo_fid > result.demo_fid_floor > 0
    assert np.isfinite([result.loss, result.reconstruction_psnr, result.seconds]).all()
    page = (out / "index.html").read_text()
    assert result.report == str(out / "index.html")
    assert page.count("data:image/svg+xml") == 4
    assert len(re.findall(r'<img class="pixels" style="[^"]*" src="data:image/png;base64,', page)) == 3
    assert "mvar convert" in page
    assert (out / "attention" / "report.html").is_file()
    assert not re.search(r'(?:src|href)="(?!#|data:|attention/report.html")', page)
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert all(f"{name}:" in page for name in used)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    with Image.open(result.grid) as grid:
        assert grid.size[1] > 10 * 16

    pipeline = mvar.Pipeline.from_pretrained(result.model, device="cpu", dtype="float32")
    labels = [label for label in range(10) for _ in range(4)]
    with np.load(out / "samples.npz") as samples:
        assert np.array_equal(samples["arr_0"], pipeline.sample(labels, seed=0).images.numpy())
        assert samples["labels"].tolist() == labels

    with DirectoryLock(out), pytest.raises(DataError, match="at work in"):
        mvar.quickstart(out, num=4, settings=SETTINGS, machine=MACHINE)
    with caplog.at_level("INFO", "mvar"):
        again = mvar.quickstart(out, num=4, settings=SETTINGS, machine=MACHINE)
    assert f"{out} is finished" in caplog.text
    for name in ("loss", "demo_fid", "reconstruction_psnr", "classifier_accuracy", "nearest_distance"):
        assert getattr(again, name) == getattr(result, name), name


def test_what_cannot_be_started_is_refused_and_a_dry_run_does_nothing(tmp_path):
    with pytest.raises(ConfigError, match="--minutes"):
        mvar.quickstart(tmp_path / "out", minutes=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(DataError, match="other"):
        mvar.quickstart(tmp_path / "other", settings=SETTINGS)
    planned = mvar.quickstart(tmp_path / "out", minutes=1, dry_run=True)
    assert planned.dry_run.cost.parameters > 0
    assert planned.dry_run.configuration["train"]["steps"] < 1000
    assert not (tmp_path / "out").exists()
