"""A split of a folder, as DIR:val, wherever images are accepted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mvar_core as mvar
from mvar_core.data.tokens import TokenCache
from mvar_core.errors import DataError


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each of three classes to train on, two of two classes to validate on."""
    root = tmp_path_factory.mktemp("splits") / "set"
    shutil.copytree(images, root / "Train")
    for name in ("dog", "golden retriever"):
        (root / "valid" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / "valid" / name / f"{number}.png")
    return root


def test_tokenize(folder, model, tmp_path):
    for data, names, labels in (
        (str(folder), ("cat", "dog", "golden retriever"), [0] * 4 + [1] * 4 + [2] * 4),
        (f"{folder}:valid", ("cat", "dog", "golden retriever"), [1, 1, 2, 2]),
    ):
        out = tmp_path / data.rpartition(":")[2].strip("/")[-5:]
        cache = TokenCache.open(mvar.tokenize(tokenizer=model, data=data, out=out).path)
        assert cache.class_names == names
        assert cache.labels.tolist() == labels


def test_training_on_one_and_validation_on_the_other(folder, model, tmp_path):
    out = tmp_path / "run"
    arguments = {"data": str(folder), "validation": f"{folder}:val", "tokenizer": model, "depth": 1, "batch_size": 4}
    result = mvar.train(out=out, steps=2, **arguments)
    assert result.validation_loss > 0
    assert TokenCache.open(out / "validation").num_images == 4
    assert mvar.train(out=out, steps=2, **arguments).validation_loss == result.validation_loss  # finished already
    with pytest.raises(DataError, match="nowhere does not exist"):
        mvar.train(out=tmp_path / "other", steps=1, **{**arguments, "validation": tmp_path / "nowhere"})


def test_a_tokenizer_is_measured_on_the_other_split(folder, preset, tmp_path):
    result = mvar.train_tokenizer(data=str(folder), out=tmp_path / "tok", preset=str(preset), steps=2)
    lines = [json.loads(line) for line in (tmp_path / "tok/metrics.jsonl").read_text().splitlines()]
    assert result.psnr is not None
    assert lines


def test_measures(folder, model, classifier, tmp_path):
    val = f"{folder}:val"
    scores = mvar.evaluate(samples=val, reference=str(folder), features=classifier)
    assert scores.num_samples == 4
    made = mvar.make_reference(data=val, out=tmp_path / "reference.npz", features=classifier)
    assert made.num_reference == 4
    assert mvar.evaluate_likelihood(checkpoint=model, data=val, num_samples=3)
    assert mvar.evaluate_reconstruction(checkpoint=model, reference=val, features=classifier).images == 4
    mvar.analyze_attention(model, tmp_path / "attention", data=val, num=4)


def test_the_largest_image(folder, model, tmp_path):
    small = mvar.Machine(max_pixels=200)
    for act in (
        lambda: mvar.tokenize(tokenizer=model, data=str(folder), out=tmp_path / "tokens", machine=small),
        lambda: mvar.train_tokenizer(data=str(folder), out=tmp_path / "tok", machine=small),
        lambda: mvar.edit(folder / "Train/cat", tmp_path / "out", checkpoint=model, box=(0, 0, 8, 8), machine=small),
        lambda: mvar.evaluate(samples=str(folder), reference=str(folder), features="demo", machine=small),
    ):
        with pytest.raises(DataError, match=r"\.png.*16×16.*--max-pixels 256"):
            act()
