"""`mvar.evaluate` with Inception features: references of published statistics, comparability, the weights."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvar_core import evaluate, make_reference
from mvar_core.errors import DataError
from mvar_core.evaluation.features import Features


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (48, 4, 4, 3), np.uint8).repeat(4, 1).repeat(4, 2)


@pytest.fixture
def samples(tmp_path: Path, pixels: np.ndarray) -> Path:
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    return tmp_path / "samples.npz"


class Small:
    """Replaces the Inception network, whose weights are not available in tests."""

    name, dim, comparable_to_papers, weights_hash = "inception", 12, True, "hash"

    def __call__(self, batch: torch.Tensor) -> Any:
        pool = batch.float().mean(dim=3)[:, :, :4].flatten(1) / 255
        return Features(pool, pool, pool)


def scored(samples: Path, reference: Path, **options: Any) -> dict[str, Any]:
    return evaluate(samples=samples, reference=reference, features=Small(), **options).to_dict()


def test_an_adm_reference_of_statistics_alone_says_what_is_missing(samples, tmp_path):
    statistics = {"mu": np.zeros(12), "sigma": np.eye(12), "mu_s": np.zeros(12), "sigma_s": np.eye(12)}
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", **statistics)
    found = scored(samples, tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    assert found["fid"] > 0
    assert found["sfid"] > 0
    for name in ("precision", "recall", "kid"):
        assert found[name] is None
        assert "mean and covariance only" in found["reasons"][name]
    assert found["num_reference"] is None
    assert any("48 samples, papers measure 50,000" in reason for reason in found["why_not"])
    assert any("16×16" in reason and "is for 256" in reason for reason in found["why_not"])
    assert any("larger than that of 50,000" in warning for warning in found["warnings"])


def test_statistics_of_another_width_are_refused(samples, tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(DataError, match="5 features.* are 12"):
        scored(samples, tmp_path / "other.npz")
    with pytest.raises(DataError, match="no images"):
        evaluate(samples=samples, reference=tmp_path / "other.npz", features="demo")


def test_an_adm_reference_with_images_has_everything(samples, pixels, tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.full(12, 0.4), sigma=np.eye(12), arr_0=pixels[::4])
    found = scored(samples, tmp_path / "adm.npz")
    assert found["precision"] is not None
    assert found["kid"] is not None
    assert "mu_s" in found["reasons"]["sfid"]
    assert found["num_reference"] == 12


def test_inputs_that_move_figures_are_named(samples, pixels, tmp_path):
    for number, image in enumerate(pixels[:16]):
        (tmp_path / "jpeg").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "jpeg" / f"{number}.jpg")
    large = pixels.repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "large.npz", arr_0=large)
    jpeg = scored(tmp_path / "jpeg", samples)
    assert any("16 samples" in reason and "lossy" in reason for reason in jpeg["why_not"])
    resized = scored(samples, tmp_path / "large.npz")
    assert any("resized from 32×32 to 16×16" in reason for reason in resized["why_not"])
    made = tmp_path / "made.npz"
    make_reference(made, data=tmp_path / "large.npz", features=Small())
    found = scored(samples, made)
    assert any("measured at 32×32, the samples at 16×16" in reason for reason in found["why_not"])


def test_published_rows_stand_only_next_to_the_same_data_at_the_same_size(samples, tmp_path):
    shutil.copy(samples, tmp_path / "imagenet.npz")
    assert scored(samples, tmp_path / "imagenet.npz")["published"] == []
    np.savez(tmp_path / "faces.npz", arr_0=np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), np.uint8))
    assert scored(tmp_path / "faces.npz", tmp_path / "faces.npz", metrics="fid")["published"] == []
    shutil.copy(tmp_path / "faces.npz", tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    rows = scored(tmp_path / "faces.npz", tmp_path / "VIRTUAL_imagenet256_labeled.npz", metrics="fid")["published"]
    assert "MVAR-d16" in [row["model"] for row in rows]


def test_weights_are_fetched_only_where_that_is_asked_for(mvar, samples, images, monkeypatch, tmp_path):
    from mvar_core.evaluation import extractors
    from mvar_core.io.weights import WeightsFile

    fetched: list[Path] = []

    def find(file: WeightsFile, path: Path | None) -> Path:
        if not fetched:
            raise DataError("The Inception weights are not on this machine.")
        return fetched[0]

    def download(file: WeightsFile, progress: Any) -> Path:
        progress(5, 10)
        fetched.append(tmp_path / "weights.pth")
        return fetched[0]

    monkeypatch.setattr(WeightsFile, "find", find)
    monkeypatch.setattr(WeightsFile, "download", download)
    monkeypatch.setattr(extractors, "load_inception", lambda path, device: Small())
    options = ["--samples", samples, "--reference", images]
    assert "not on this machine" in mvar("evaluate", *options).error
    assert not fetched
    assert "not on this machine" in mvar("evaluate", *options, "--download", "--dry-run").error
    assert mvar("evaluate", *options, "--download").code == 0
    assert fetched
