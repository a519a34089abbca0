from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.evaluation.scores import (
    METRICS,
    check_metrics,
    evaluate_features,
    frechet_distance,
    inception_score,
    kernel_distance,
    kid_subsets,
    precision_recall,
    unbiased_kernel_distance,
)
from mvar_core.evaluation.statistics import FeatureSet, Statistics, StreamingStatistics


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(mu: Any, sigma: Any) -> Statistics:
    return Statistics(mu=np.asarray(mu, np.float64), sigma=np.asarray(sigma, np.float64))


def statistics(features: Tensor) -> Statistics:
    streaming = StreamingStatistics()
    streaming.update(features)
    return streaming.result()


def covariance(dim: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(dim, dim))
    return root @ root.T / dim + 0.1 * np.eye(dim)


def feature_set(measured: Tensor, **changes: Any) -> FeatureSet:
    values: dict[str, Any] = {
        "extractor": "pixels",
        "weights_hash": "none",
        "count": len(measured),
        "statistics": statistics(measured),
        "spatial": statistics(measured[:, :4]),
        "features": measured,
        "logits": measured[:, :5],
    }
    return FeatureSet(**{**values, **changes})


def test_fid_of_known_gaussians() -> None:
    assert frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([3, 4], np.eye(2))) == pytest.approx(25)
    first, second = np.diag([1.0, 4.0, 9.0]), np.diag([16.0, 25.0, 36.0])
    assert frechet_distance(gaussian(np.zeros(3), first), gaussian(np.zeros(3), second)) == pytest.approx(9 + 9 + 9)


def test_fid_of_gaussians_that_do_not_commute() -> None:
    # Of Σ₂ = M Σ₁ M with symmetric positive M, the trace term is tr(Σ₁ M).
    sigma, factor = covariance(16, 0), covariance(16, 1)
    image = factor @ sigma @ factor
    assert not np.allclose(sigma @ image, image @ sigma)
    expected = np.trace(sigma) + np.trace(image) - 2 * np.trace(sigma @ factor)
    found = frechet_distance(gaussian(np.zeros(16), sigma), gaussian(np.zeros(16), image))
    assert found == pytest.approx(expected, rel=1e-10)


def test_fid_equals_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    dim = 256
    first = gaussian(np.random.default_rng(2).normal(size=dim), covariance(dim, 3))
    second = gaussian(np.random.default_rng(4).normal(size=dim), covariance(dim, 5))
    root = sqrtm(first["sigma"] @ second["sigma"])
    difference = first["mu"] - second["mu"]
    expected = difference @ difference + np.trace(first["sigma"] + second["sigma"]) - 2 * np.trace(root).real
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_fid_of_two_samples_of_one_gaussian_has_the_expected_bias() -> None:
    dim, count, other = 8, 1000, 1500
    pairs = torch.randn(40, count + other, dim, generator=generator(0), dtype=torch.float64)
    found = np.mean([frechet_distance(statistics(pair[:count]), statistics(pair[count:])) for pair in pairs])
    expected = (dim + dim * (dim + 1) / 4) * (1 / count + 1 / other)
    assert found == pytest.approx(expected, rel=0.12)


def test_fid_accepts_single_precision_statistics_and_refuses_other_sizes() -> None:
    single = Statistics(mu=np.zeros(2, np.float32), sigma=np.eye(2, dtype=np.float32))
    assert frechet_distance(single, gaussian([1, 0], np.eye(2))) == pytest.approx(1)
    with pytest.raises(DataError, match="2 and 3 features"):
        frechet_distance(single, gaussian(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("classes", [2, 10])
def test_inception_score_of_certain_and_of_uniform_predictions(classes: int) -> None:
    certain = 1000 * torch.eye(classes).repeat(20, 1)
    assert inception_score(certain, splits=1)[0] == pytest.approx(classes)
    assert inception_score(torch.zeros(50, classes), splits=1) == pytest.approx((1, 0))


def test_inception_score_shuffles_images_that_come_class_by_class() -> None:
    certain = 1000 * torch.eye(10).repeat_interleave(200, dim=0)
    mean, deviation = inception_score(certain, splits=10, seed=0)
    assert mean > 9.7
    assert deviation > 0
    assert inception_score(certain, splits=10, seed=0) == (mean, deviation)
    assert inception_score(certain, splits=10, seed=1) != (mean, deviation)


def test_kid_of_zeros_and_ones() -> None:
    # The kernel is (xᵀy/4 + 1)³: 1 among zeros, 1 between, 8 among ones; 1 + 8 - 2 = 7.
    assert kernel_distance(torch.zeros(20, 4), torch.ones(30, 4)) == pytest.approx((7, 0))


def test_kid_subsets_never_exceed_the_sets() -> None:
    assert kid_subsets(50_000, 10_000) == (100, 1000)
    assert kid_subsets(360, 1437) == (100, 360)
    assert kid_subsets(64, 64) == (1, 64)
    assert kid_subsets(1000, 1000) == (1, 1000)


def test_precision_and_recall_of_known_sets() -> None:
    points = torch.randn(200, 8, generator=generator(0))
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 1000) == (0, 0)
    line = torch.arange(100.0)[:, None]
    assert precision_recall(line, line + 50) == pytest.approx((0.53, 0.53), abs=1e-6)


def test_a_neighbourhood_needs_more_images_than_neighbours() -> None:
    points = torch.randn(20, 4, generator=generator(0))
    precision_recall(points[:4], points, neighbourhood=3)
    with pytest.raises(DataError, match="at least 4 images"):
        precision_recall(points[:3], points, neighbourhood=3)


def test_precision_is_of_the_samples_and_recall_of_the_reference() -> None:
    reference = torch.cat(
        [torch.randn(200, 4, generator=generator(0)), torch.randn(200, 4, generator=generator(1)) + 50]
    )
    samples = torch.randn(300, 4, generator=generator(2))
    precision, recall = precision_recall(samples, reference)
    assert precision > 0.8
    assert recall < 0.5


def test_precision_and_recall_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = torch.randn(150, 8, generator=generator(0)), torch.randn(170, 8, generator=generator(1)) * 1.2
    expected = precision_recall(samples, reference)
    monkeypatch.setattr("mvar_core.evaluation.scores.NEIGHBOURHOOD_BLOCK", 37)
    assert precision_recall(samples, reference) == expected
    order = torch.randperm(150, generator=generator(2))
    assert precision_recall(samples[order], reference) == pytest.approx(expected)


@pytest.mark.parametrize("size", [8, 16])
def test_resizes_as_tensorflow_1_does(size: int) -> None:
    resize = fidelity_module("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    row = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 1, 1, 4)
    result = resize(row, size=(1, size), align_corners=False).flatten()
    assert torch.equal(result, (torch.arange(size) * 4 / size).clamp(max=3))


def random_sets() -> tuple[FeatureSet, FeatureSet]:
    samples = feature_set(torch.randn(120, 8, generator=generator(0)))
    reference = feature_set(torch.randn(200, 8, generator=generator(1)) * 1.3)
    return samples, reference


def test_evaluates_all_metrics_and_records_its_settings(capfd: pytest.CaptureFixture[str]) -> None:
    samples, reference = random_sets()
    scores = evaluate_features(samples, reference, seed=3, splits=4)
    assert scores["reasons"] == {}
    assert scores["settings"] == {
        "seed": 3,
        "splits": 4,
        "neighbourhood": 3,
        "kid_subsets": 100,
        "kid_subset_size": 120,
    }
    assert samples.features is not None
    assert samples.logits is not None
    assert reference.features is not None
    assert samples.statistics is not None
    assert reference.statistics is not None
    assert scores["fid"] == frechet_distance(samples.statistics, reference.statistics)
    assert scores["sfid"] < scores["fid"]
    assert (scores["precision"], scores["recall"]) == precision_recall(samples.features, reference.features)
    assert scores["kid"] == kernel_distance(samples.features, reference.features, seed=3)[0]
    assert scores["inception_score"] == inception_score(samples.logits, seed=3, splits=4)[0]
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_computed_is_none_with_a_reason() -> None:
    samples, reference = random_sets()
    only_statistics = feature_set(
        torch.randn(9, 8, generator=generator(2)), features=None, logits=None, spatial=None, source="adm.npz"
    )
    scores = evaluate_features(samples, only_statistics)
    assert scores["fid"] > 0
    assert scores["inception_score"] > 1
    known_by_statistics = "The reference set is known by its mean and covariance only, not by its images."
    assert scores["reasons"] == {
        "sfid": "adm.npz has no mu_s and sigma_s.",
        **dict.fromkeys(("precision", "recall", "kid"), known_by_statistics),
    }
    assert all(scores[metric] is None for metric in scores["reasons"])
    assert "kid_subsets" not in scores["settings"]

    few = feature_set(torch.randn(2, 8, generator=generator(2)), logits=None, spatial=None)
    scores = evaluate_features(few, reference)
    assert scores["reasons"]["sfid"] == "pixels features have no spatial map."
    assert scores["reasons"]["inception_score"] == "pixels features have no classes."
    assert "at least 4 images" in scores["reasons"]["precision"]
    assert scores["kid"] is not None


def test_computes_only_what_is_asked_for() -> None:
    samples, reference = random_sets()
    scores = evaluate_features(samples, reference, ["recall", "fid"])
    assert {metric for metric in METRICS if scores[metric] is not None} == {"recall", "fid"}
    assert scores["reasons"] == dict.fromkeys(("sfid", "inception_score", "precision", "kid"), "not asked for")
    with pytest.raises(ConfigError, match=r"no metric 'precison'\. Did you mean precision"):
        evaluate_features(samples, reference, ["precison"])


def test_refuses_sets_that_were_measured_differently() -> None:
    samples, _ = random_sets()
    for other in ({"extractor": "inception"}, {"weights_hash": "other"}):
        with pytest.raises(DataError, match="measured with"):
            evaluate_features(samples, feature_set(torch.ones(4, 8), **other))
    assert evaluate_features(samples, feature_set(torch.randn(9, 8), weights_hash=None), ["fid"])["fid"] > 0


CALCULATE = """
import json
import sys

import torch
from mvar_core.evaluation.features import Features
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.evaluation.scores import evaluate_features
from mvar_core.evaluation.statistics import collect, content_keys

fidelity = fidelity_module()


class Tiny(fidelity.FeatureExtractorBase):
    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)
        self.weights = torch.randn(3 * 8 * 8, 16, generator=torch.Generator().manual_seed(7)) / 10

    def forward(self, images):
        pool = torch.relu((images.flatten(1).float() / 127.5 - 1) @ self.weights)
        outputs = {"pool": pool, "logits": pool[:, :10]}
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "pool", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pool"


class Extractor:
    name, dim, comparable_to_papers, weights_hash = "tiny", 16, False, "none"
    network = Tiny("tiny", ["pool", "logits"])

    def __call__(self, images):
        return Features(*self.network(images))


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count, seed, low):
        source = torch.Generator().manual_seed(seed)
        pictures = torch.randint(low, 256, (count, 3, 8, 8), generator=source, dtype=torch.uint8)
        self.pictures = pictures[content_keys(pictures).argsort()]  # the order in which ours chooses splits and subsets

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index]


fidelity.register_feature_extractor("tiny", Tiny)
samples, reference = Pictures(120, 0, 20), Pictures(150, 1, 0)
theirs = fidelity.calculate_metrics(
    input1=samples, input2=reference, cuda=False, feature_extractor="tiny", isc=True, fid=True, kid=True, prc=True,
    kid_subset_size=120, rng_seed=5, save_cpu_ram=True, cache=False, verbose=False,
)
gather = lambda pictures: collect(Extractor(), pictures.pictures.split(32), len(pictures))
ours = evaluate_features(gather(samples), gather(reference), seed=5)
print(json.dumps([theirs, ours]))
"""


def test_equals_torch_fidelity_from_images_to_scores() -> None:
    import json

    # In a process of its own: torch-fidelity keeps registered extractors for good.
    result = subprocess.run([sys.executable, "-c", CALCULATE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    theirs, ours = json.loads(result.stdout)
    assert theirs["frechet_inception_distance"] > 0.05
    pairs = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    for name, published in pairs.items():
        assert ours[name] == pytest.approx(theirs[published], rel=1e-5), name


@pytest.mark.parametrize(
    ("samples", "reference"),
    [
        (torch.rand(9, 4), torch.rand(9, 5)),
        (torch.rand(9), torch.rand(9)),
        (torch.rand(9, 4), torch.rand(0, 4)),
        (torch.full((9, 4), torch.nan), torch.rand(9, 4)),
        (torch.rand(9, 4), torch.rand(9, 4) / 0),
        (torch.ones(9, 4, dtype=torch.int64), torch.rand(9, 4)),
        (np.ones((9, 4)), torch.rand(9, 4)),
    ],
)
def test_features_that_cannot_be_compared_are_refused(samples: Any, reference: Any) -> None:
    for measure in (precision_recall, kernel_distance, unbiased_kernel_distance):
        with pytest.raises(DataError):
            measure(samples, reference)


def test_values_that_mean_nothing_are_refused() -> None:
    for names in ([], "", "fid,,", [3], None, 3, {"fid": 1}):
        with pytest.raises(ConfigError):
            check_metrics(names)  # type: ignore[arg-type]
    for splits in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="splits"):
            inception_score(torch.rand(9, 4), splits=splits)  # type: ignore[arg-type]
    nan = gaussian([0, float("nan")], np.eye(2))
    with pytest.raises(DataError, match="not finite"):
        frechet_distance(nan, gaussian([0, 0], np.eye(2)))
    rows = torch.rand(20, 4)
    assert inception_score(rows, seed=2**40 + 3) == inception_score(rows, seed=2**40 + 3)
    assert kernel_distance(rows, rows + 1, seed=2**63)[0] > 0
