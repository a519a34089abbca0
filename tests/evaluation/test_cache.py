from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvar_core.evaluation.references import FeatureCache, feature_key
from mvar_core.evaluation.statistics import FeatureSet, StreamingStatistics

TINY = SimpleNamespace(name="tiny", weights_hash="abc", dim=4, comparable_to_papers=False)


def measured(count: int = 6) -> FeatureSet:
    features = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    statistics = StreamingStatistics()
    statistics.update(features)
    return FeatureSet("tiny", "abc", count, statistics.result(), features=features)


def test_the_key_depends_on_all_that_features_depend_on() -> None:
    key = feature_key(TINY, "images", 6)
    others = [
        feature_key(SimpleNamespace(**{**vars(TINY), "name": "other"}), "images", 6),
        feature_key(SimpleNamespace(**{**vars(TINY), "weights_hash": "def"}), "images", 6),
        feature_key(TINY, "other", 6),
        feature_key(TINY, "images", 7),
    ]
    assert len({key, *others}) == 5
    assert feature_key(TINY, "images", 6) == key


def test_features_come_back_under_their_key_alone(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    assert cache.load("a") is None
    cache.save("a", measured())
    loaded = cache.load("a")
    assert loaded is not None
    assert loaded.features is not None
    assert loaded.statistics is not None
    assert torch.equal(loaded.features, measured().features)  # type: ignore[arg-type]
    assert (loaded.statistics["sigma"] == measured().statistics["sigma"]).all()  # type: ignore[index]
    assert cache.load("b") is None
    assert [path.name for path in cache.directory.iterdir()] == ["a.npz"]


def test_statistics_do_not_serve_where_features_are_needed(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.save("a", replace(measured(), features=None))
    assert cache.load("a") is not None
    assert cache.load("a", features=True) is None
    cache.save("a", measured())
    assert cache.load("a", features=True) is not None


def test_a_single_image_can_be_cached(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.save("a", FeatureSet("tiny", "abc", 1, None, features=torch.ones(1, 4)))
    loaded = cache.load("a")
    assert loaded is not None
    assert loaded.statistics is None


def test_a_damaged_file_is_a_miss_that_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path)
    cache.save("a", measured())
    content = cache.path("a").read_bytes()
    with caplog.at_level(logging.WARNING, logger="mvar"):
        for damaged in (b"", b"text", content[:-40], content[:200] + bytes(64) + content[264:]):
            cache.path("a").write_bytes(damaged)
            caplog.clear()
            assert cache.load("a") is None
            assert "a.npz is measured again" in caplog.text
        cache.path("b").write_bytes(content)
        assert cache.load("b") is None, "a file that was renamed holds other images' features"
    cache.save("a", measured())
    assert cache.load("a") is not None
