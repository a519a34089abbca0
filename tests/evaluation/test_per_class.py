from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation import scores as module
from mvar_core.evaluation.scores import kernel_distance, unbiased_kernel_distance
from mvar_core.evaluation.scores import per_class_scores as per_class
from mvar_core.evaluation.statistics import FeatureSet


def of(features: Tensor) -> FeatureSet:
    return FeatureSet("tiny", "abc", len(features), None, features=features)


def normal(count: int, seed: int, dim: int = 6) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_kid_of_zeros_and_ones() -> None:
    assert unbiased_kernel_distance(torch.zeros(20, 4), torch.ones(30, 4)) == pytest.approx(7)
    with pytest.raises(DataError, match="at least 2"):
        unbiased_kernel_distance(torch.zeros(1, 4), torch.ones(30, 4))


def test_kid_of_whole_sets_is_that_of_one_subset() -> None:
    samples, reference = normal(40, 0), normal(40, 1) + 0.5
    assert unbiased_kernel_distance(samples, reference) == pytest.approx(kernel_distance(samples, reference)[0])


def sets(per: int, shifts: list[float]) -> tuple[FeatureSet, np.ndarray, FeatureSet, np.ndarray]:
    labels = np.repeat(np.arange(len(shifts)), per)
    reference = normal(len(labels), 0)
    samples = normal(len(labels), 1) + torch.tensor(shifts)[labels][:, None]
    return of(samples), labels, of(reference), labels


@pytest.mark.parametrize(("per", "measure"), [(25, "kid"), (19, "mean_distance")])
def test_the_worst_class_comes_first(per: int, measure: str) -> None:
    table = per_class(*sets(per, [0, 3, 1.5]), ["cat", "dog", "owl"])
    assert [(row.label, row.name) for row in table] == [(1, "dog"), (2, "owl"), (0, "cat")]
    assert {row.measure for row in table} == {measure}
    assert {(row.num_samples, row.num_reference) for row in table} == {(per, per)}
    scores = [row.score for row in table if row.score is not None]
    assert len(scores) == 3
    assert scores[0] > 1.5 * scores[1] > 2 * abs(scores[2])


def test_scores_are_those_of_the_class_alone_whatever_the_order() -> None:
    samples, labels, reference, _ = sets(25, [0, 3])
    assert samples.features is not None
    assert reference.features is not None
    expected = {
        label: unbiased_kernel_distance(samples.features[labels == label], reference.features[labels == label])
        for label in (0, 1)
    }
    order = np.random.default_rng(0).permutation(len(labels))
    table = per_class(of(samples.features[order]), labels[order], reference, labels)
    assert {row.label: row.score for row in table} == pytest.approx(expected, rel=1e-9)


def test_means_are_compared_for_all_where_one_class_is_small() -> None:
    samples, reference = of(torch.tensor([[3.0, 4.0], [1.0, 1.0]])), of(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    table = per_class(samples, np.array([0, 1]), reference, np.array([0, 1]))
    assert [(row.name, row.score, row.measure) for row in table] == [
        ("0", pytest.approx(5), "mean_distance"),
        ("1", 0, "mean_distance"),
    ]


def test_classes_that_a_set_lacks_come_last_without_a_score() -> None:
    samples, reference = of(normal(60, 0)), of(normal(60, 1))
    table = per_class(samples, np.repeat([0, 1, 5], 20), reference, np.repeat([1, 2, 5], 20), ["cat", "dog"])
    assert {row.label for row in table[:2]} == {1, 5}
    assert {row.measure for row in table} == {"kid"}
    assert [(row.name, row.num_samples, row.num_reference, row.score) for row in table[2:]] == [
        ("cat", 20, 0, None),
        ("2", 0, 20, None),
    ]


def test_the_seed_chooses_images_of_large_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KID_CLASS_MAXIMUM", 30)
    arguments = sets(50, [0.5, 1])
    first = per_class(*arguments, seed=0)
    assert first == per_class(*arguments, seed=0)
    assert [row.score for row in first] != [row.score for row in per_class(*arguments, seed=1)]
    assert first[0].num_samples == 50


def test_refuses_labels_and_features_that_do_not_fit() -> None:
    samples, labels, reference, _ = sets(3, [0, 1])
    with pytest.raises(DataError, match=r"6 images and int64 labels of shape \(5,\)"):
        per_class(samples, labels[:-1], reference, labels)
    with pytest.raises(DataError, match="the reference set's images, which are not known"):
        per_class(samples, labels, FeatureSet("tiny", None, None, None), labels)
    with pytest.raises(DataError, match="6 and 2 features"):
        per_class(samples, labels, of(torch.zeros(6, 2)), labels)
    with pytest.raises(DataError, match="must not be negative"):
        per_class(samples, labels - 1, reference, labels)


def test_labels_may_be_a_list() -> None:
    samples, labels, reference, reference_labels = sets(3, [0, 1])
    expected = per_class(samples, labels, reference, reference_labels)
    assert per_class(samples, labels.tolist(), reference, reference_labels.tolist()) == expected
