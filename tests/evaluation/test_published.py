from __future__ import annotations

from types import SimpleNamespace

from mvar_core.evaluation.published import IMAGENET_256, comparability
from mvar_core.evaluation.statistics import FeatureSet

INCEPTION = SimpleNamespace(name="inception", comparable_to_papers=True)
DEMO = SimpleNamespace(name="demo", comparable_to_papers=False)


def reference(source: str | None) -> FeatureSet:
    return FeatureSet("inception", None, None, None, source=source)


def test_figures_of_the_papers_protocol_are_comparable() -> None:
    assert comparability(INCEPTION, 50_000, reference("adm.npz")) == []


def test_every_reason_against_comparing_is_given() -> None:
    why_not = comparability(DEMO, 1000, reference(None), more_smooth=True)
    assert [reason.split(",")[0] for reason in why_not] == [
        "demo features are a small classifier's",
        "1",
        "the reference is a set of images",
        "more-smooth samples are made for looks and change the scores",
    ]
    assert why_not[1] == "1,000 samples, papers measure 50,000"
    assert len(comparability(INCEPTION, 49_999, reference("adm.npz"))) == 1


def test_other_inception_weights_are_not_comparable() -> None:
    other = SimpleNamespace(name="inception", comparable_to_papers=False)
    assert comparability(other, 50_000) == [
        "inception features are other weights', not those of the Inception network of 2015-12-05"
    ]


def test_published_rows_are_within_their_ranges() -> None:
    assert len({row.model for row in IMAGENET_256}) == len(IMAGENET_256) == 12
    for row in IMAGENET_256:
        assert 1 < row.fid < 10
        assert row.inception_score is None or 100 < row.inception_score < 400
        assert all(part is None or 0 < part < 1 for part in (row.precision, row.recall))
    best = min((row for row in IMAGENET_256 if row.model.startswith("MVAR")), key=lambda row: row.fid)
    assert (best.model, best.fid, best.inception_score) == ("MVAR-d24 (fine-tuned)", 2.23, 300.1)


def test_other_networks_are_not_comparable() -> None:
    other = SimpleNamespace(name="dinov2-vit-b-14", comparable_to_papers=False)
    (reason,) = comparability(other, 50_000)
    assert reason.startswith("dinov2-vit-b-14 features are another network's, not those of the Inception network")
