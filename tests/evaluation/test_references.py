from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mvar_core.errors import DataError
from mvar_core.evaluation.references import (
    ReferenceRecord,
    check_reference,
    load_reference,
    read_statistics,
    save_reference,
    write_features,
)
from mvar_core.evaluation.statistics import FeatureSet, StreamingStatistics


def measured(count: int = 9, dim: int = 5) -> FeatureSet:
    features = torch.randn(count, dim, generator=torch.Generator().manual_seed(count))
    pool, spatial = StreamingStatistics(), StreamingStatistics()
    pool.update(features)
    spatial.update(features[:, :2])
    return FeatureSet(
        "tiny", "abc", count, pool.result(), spatial.result(), features, features[:, :3], np.arange(count) % 3
    )


RECORD = ReferenceRecord("tiny", "abc", 9, (32, 48), True, "photos/", "0.1", ("cat", "dog", "owl"))


def same(first: FeatureSet, second: FeatureSet) -> bool:
    pairs = [
        (first.features, second.features),
        (first.logits, second.logits),
        (first.labels, second.labels),
        *(
            (None if a is None else a[key], None if b is None else b[key])
            for a, b in ((first.statistics, second.statistics), (first.spatial, second.spatial))
            for key in ("mu", "sigma")
        ),
    ]
    return all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(np.asarray(a), np.asarray(b)))
        for a, b in pairs
    )


def test_a_reference_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    save_reference(path, measured(), RECORD)
    loaded = load_reference(path)
    assert loaded is not None
    features, record = loaded
    assert record == RECORD
    assert same(features, measured())
    assert (features.extractor, features.weights_hash, features.count) == ("tiny", "abc", 9)
    with np.load(path) as archive:
        assert archive["features"].dtype == np.float32
        assert archive["mu_s"].dtype == np.float64

    # Its statistics are laid out as in the files that everyone reads.
    statistics = read_statistics(path)
    assert statistics is not None
    assert same(
        replace(statistics, features=features.features, logits=features.logits, labels=features.labels), features
    )


def test_a_reference_of_statistics_alone(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    alone = replace(measured(), spatial=None, features=None, logits=None, labels=None)
    save_reference(path, alone, replace(RECORD, class_names=None))
    loaded = load_reference(path)
    assert loaded is not None
    assert same(loaded[0], alone)
    assert loaded[1].class_names is None


def test_refuses_to_write_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not end in \.npz"):
        save_reference(tmp_path / "ref", measured(), RECORD)
    with pytest.raises(DataError, match="at least 2 images"):
        save_reference(tmp_path / "ref.npz", replace(measured(), statistics=None), RECORD)
    with pytest.raises(DataError, match="The record says 10 images"):
        save_reference(tmp_path / "ref.npz", measured(), replace(RECORD, count=10))
    assert list(tmp_path.iterdir()) == []


def test_other_npz_files_are_not_references(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    for content in (
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
        {"mu": np.zeros(3), "sigma": np.eye(3)},
        {"record": np.arange(3)},
        {"record": np.array("not json")},
        {"record": np.array(json.dumps({"format": "someone's"}))},
    ):
        np.savez(path, **content)
        assert load_reference(path) is None
    write_features(path, measured(), {"key": "a cached set"})
    assert load_reference(path) is None


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    save_reference(path, measured(), RECORD)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"ref\.npz cannot be read as an npz file"):
        load_reference(path)
    with pytest.raises(DataError, match="does not exist"):
        load_reference(tmp_path / "absent.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(DataError, match="not a zip archive"):
        load_reference(tmp_path / "array.npz")

    save_reference(path, measured(), RECORD)
    with np.load(path) as archive:
        arrays = dict(archive)
    for changed, message in (
        ({"features": np.zeros((4, 5), np.float32)}, "features has 4 rows, expected 9"),
        ({"sigma": np.eye(4)}, r"mu has shape \(5,\) and sigma \(4, 4\)"),
        ({"mu": np.full(5, np.nan)}, "not finite"),
    ):
        np.savez(path, **{**arrays, **changed})
        with pytest.raises(DataError, match=message):
            load_reference(path)


def test_a_reference_of_another_network_is_refused() -> None:
    tiny = SimpleNamespace(name="tiny", weights_hash="abc", dim=5, comparable_to_papers=False)
    check_reference(RECORD, tiny, Path("ref.npz"), measured())
    for other in ({"name": "inception"}, {"weights_hash": "def"}):
        extractor = SimpleNamespace(**{**vars(tiny), **other})
        with pytest.raises(DataError) as caught:
            check_reference(RECORD, extractor, Path("ref.npz"))
        for part in ("ref.npz", "tiny", "abc", extractor.name, extractor.weights_hash):
            assert part in str(caught.value)
    with pytest.raises(DataError, match="5 features per image, but tiny features are 6"):
        check_reference(RECORD, SimpleNamespace(**{**vars(tiny), "dim": 6}), Path("ref.npz"), measured())
