"""`mvar evaluate` with Inception features: references of published statistics, comparability, the weights."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (48, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)


@pytest.fixture
def samples(tmp_path: Path, pixels: np.ndarray) -> Path:
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    return tmp_path / "samples.npz"


class Small:
    """In the place of the Inception network, whose weights are not at hand in tests."""

    name, dim, comparable_to_papers, weights_hash = "inception", 12, True, "hash"

    def __call__(self, batch: torch.Tensor) -> Any:
        from mvar_core.evaluation.features import Features

        pool = batch.float().mean(dim=3)[:, :, :4].flatten(1) / 255
        return Features(pool, pool, pool)


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> None:
    from mvar_core.evaluation import features

    monkeypatch.setattr(features, "find_inception_weights", lambda path: path)
    monkeypatch.setattr(features, "load_inception", lambda path, device: Small())


@pytest.mark.usefixtures("inception")
def test_an_adm_reference_of_statistics_alone_says_what_is_missing(mvar, samples, tmp_path):
    statistics = {"mu": np.zeros(12), "sigma": np.eye(12), "mu_s": np.zeros(12), "sigma_s": np.eye(12)}
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", **statistics)
    outcome = mvar(
        "evaluate", "--samples", samples, "--reference", tmp_path / "VIRTUAL_imagenet256_labeled.npz", "--json"
    )
    found = outcome.json
    assert found["fid"] > 0
    assert found["sfid"] > 0
    for name in ("precision", "recall", "kid"):
        assert found[name] is None
        assert "mean and covariance only" in found["reasons"][name]
    assert found["num_reference"] is None
    assert any("48 samples, papers measure 50,000" in reason for reason in found["why_not"])
    assert any("16×16" in reason and "is for 256" in reason for reason in found["why_not"])
    assert any("larger than that of 50,000" in warning for warning in found["warnings"])


@pytest.mark.usefixtures("inception")
def test_statistics_of_another_width_are_refused(mvar, samples, tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    error = mvar("evaluate", "--samples", samples, "--reference", tmp_path / "other.npz").error
    assert "5 features" in error
    assert "are 12" in error
    error = mvar("evaluate", "--samples", samples, "--reference", tmp_path / "other.npz", "--features", "demo").error
    assert "no images" in error


@pytest.mark.usefixtures("inception")
def test_an_adm_reference_with_images_has_everything(mvar, samples, pixels, tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.full(12, 0.4), sigma=np.eye(12), arr_0=pixels[::4])
    found = mvar("evaluate", "--samples", samples, "--reference", tmp_path / "adm.npz", "--json").json
    assert found["precision"] is not None
    assert found["kid"] is not None
    assert "mu_s" in found["reasons"]["sfid"]
    assert found["num_reference"] == 12


@pytest.mark.usefixtures("inception")
def test_inputs_that_move_figures_are_named(mvar, samples, pixels, tmp_path):
    for number, image in enumerate(pixels[:16]):
        (tmp_path / "jpeg").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "jpeg" / f"{number}.jpg")
    large = pixels.repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "large.npz", arr_0=large)
    jpeg = mvar("evaluate", "--samples", tmp_path / "jpeg", "--reference", samples, "--json").json
    assert any("16 samples are JPEG" in reason for reason in jpeg["why_not"])
    resized = mvar("evaluate", "--samples", samples, "--reference", tmp_path / "large.npz", "--json").json
    assert any("resized from 32×32 to 16×16" in reason for reason in resized["why_not"])
    made = tmp_path / "made.npz"
    mvar("evaluate", "make-reference", "--data", tmp_path / "large.npz", "--out", made)
    found = mvar("evaluate", "--samples", samples, "--reference", made, "--json").json
    assert any("measured at 32×32, the samples at 16×16" in reason for reason in found["why_not"])


@pytest.mark.usefixtures("inception")
def test_published_rows_stand_only_beside_the_same_data_at_the_same_size(mvar, samples, tmp_path):
    shutil.copy(samples, tmp_path / "imagenet.npz")
    out = mvar("evaluate", "--samples", samples, "--reference", tmp_path / "imagenet.npz").out
    assert "MVAR-d16" not in out
    np.savez(tmp_path / "faces.npz", arr_0=np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), np.uint8))
    large = ["--samples", tmp_path / "faces.npz", "--metrics", "fid", "--reference"]
    assert "MVAR-d16" not in mvar("evaluate", *large, tmp_path / "faces.npz").out
    shutil.copy(tmp_path / "faces.npz", tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    assert "MVAR-d16" in mvar("evaluate", *large, tmp_path / "VIRTUAL_imagenet256_labeled.npz").out


def test_weights_are_fetched_only_where_that_is_asked_for(mvar, samples, images, monkeypatch, tmp_path):
    from mvar_core.errors import DataError
    from mvar_core.evaluation import features

    fetched: list[Path] = []

    def find(path: Path | None) -> Path:
        if not fetched:
            raise DataError("The Inception weights are not on this machine.")
        return fetched[0]

    def download(progress: Any) -> Path:
        progress(5, 10)
        fetched.append(tmp_path / "weights.pth")
        return fetched[0]

    monkeypatch.setattr(features, "find_inception_weights", find)
    monkeypatch.setattr(features, "download_inception", download)
    monkeypatch.setattr(features, "load_inception", lambda path, device: Small())
    options = ["--samples", samples, "--reference", images]
    assert "not on this machine" in mvar("evaluate", *options).error
    assert not fetched
    assert "not on this machine" in mvar("evaluate", *options, "--download", "--dry-run").error
    assert mvar("evaluate", *options, "--download").code == 0
    assert fetched
