from __future__ import annotations

import errno
import io
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mvar_core import __version__
from mvar_core.errors import DataError, MvarError
from mvar_core.evaluation.measure import (
    Measurer,
    Reference,
    ReferenceRecord,
    load_reference,
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


IMAGES: Any = SimpleNamespace(
    name="photos/",
    count=9,
    image_shape=(32, 48),
    stored_shape=(64, 48),
    class_names=("cat", "dog", "owl"),
    fingerprint=lambda: "content",
)
RECORD = ReferenceRecord("tiny", "abc", 9, (32, 48), True, "photos/", __version__, ("cat", "dog", "owl"), "content")


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
    save_reference(path, measured(), IMAGES)
    features, record = load_reference(path)
    assert features is not None
    assert record == RECORD
    assert same(features, measured())
    assert (features.extractor, features.weights_hash, features.count) == ("tiny", "abc", 9)
    with np.load(path) as archive:
        assert archive["features"].dtype == np.float32
        # Its statistics are laid out as in the files that everyone reads.
        for name, expected in zip(("mu", "sigma"), measured().statistics.values(), strict=True):  # type: ignore[union-attr]
            assert archive[name].dtype == archive[f"{name}_s"].dtype == np.float64
            assert np.array_equal(archive[name], expected)


def test_a_reference_of_statistics_alone(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    alone = replace(measured(), spatial=None, features=None, logits=None, labels=None)
    save_reference(path, alone, SimpleNamespace(**{**vars(IMAGES), "class_names": None}))
    features, record = load_reference(path)
    assert features is not None
    assert record is not None
    assert same(features, alone)
    assert record.class_names is None


def test_one_image_is_no_reference(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2 images"):
        save_reference(tmp_path / "ref.npz", replace(measured(), statistics=None), IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_reads_a_file_of_the_adm_evaluators_layout(tmp_path: Path) -> None:
    (mu, sigma), (mu_s, sigma_s) = ((np.arange(dim, dtype=np.float32), np.eye(dim, dtype=np.float32)) for dim in (6, 4))
    path = tmp_path / "reference.npz"
    np.savez(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    alone, record = load_reference(path)
    assert record is None
    assert alone is not None
    assert alone.statistics is not None
    assert alone.spatial is not None
    assert (alone.extractor, alone.source) == ("inception", str(path))
    assert (alone.features, alone.count, alone.num_images, alone.weights_hash) == (None, None, None, None)
    assert alone.statistics["sigma"].dtype == np.float64
    assert np.array_equal(alone.spatial["mu"], mu_s)


@pytest.mark.parametrize(
    "content",
    [
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
        {"record": np.arange(3)},
        {"record": np.array("not json")},
        {"record": np.array(json.dumps({"format": "someone's"}))},
        {"record": np.array("[" * 100_000)},
        {"record": np.array("9" * 100_000)},
    ],
)
def test_other_npz_files_are_neither(tmp_path: Path, content: dict[str, Any]) -> None:
    np.savez(tmp_path / "other.npz", **content)
    assert load_reference(tmp_path / "other.npz") == (None, None)


def test_a_cached_set_is_no_reference(tmp_path: Path) -> None:
    write_features(tmp_path / "a.npz", measured(), {"key": "a cached set"})
    with pytest.raises(DataError, match=r"a\.npz"):
        load_reference(tmp_path / "a.npz")


def spoiled(path: Path) -> dict[str, bytes]:
    """Contents that are not those of an npz file, by what is wrong with them."""
    content = path.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    lying = io.BytesIO()
    with zipfile.ZipFile(lying, "w") as archive, archive.open("mu.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000)
    objects = io.BytesIO()
    np.savez(objects, mu=np.array([{}], dtype=object), sigma=np.eye(1))
    return {
        "empty": b"",
        "text": b"hello",
        "half": content[: len(content) // 2],
        "a changed byte": content[:300] + bytes([content[300] ^ 1]) + content[301:],
        "an array without an archive": array.getvalue(),
        "a length that is not there": lying.getvalue(),
        "a header without end": nested.getvalue(),
        "objects": objects.getvalue(),
    }


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    save_reference(path, measured(), IMAGES)
    with np.load(path) as archive:
        arrays = dict(archive)
    for content in spoiled(path).values():
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"ref\.npz"):
            load_reference(path)
    with pytest.raises(DataError, match="does not exist"):
        load_reference(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="regular file"):
        load_reference(tmp_path)
    record = json.loads(str(arrays["record"]))
    incomplete = {**record, "description": {"kind": record["description"]["kind"]}}
    other = {**record, "description": {**record["description"], "weights_hash": "other"}}
    shaped = {**record, "description": {**record["description"], "image_shape": ["a", -1, 2]}}
    for changed, message in (
        ({"features": np.zeros((4, 5), np.float32)}, r"\(4, 5\), expected 9 rows"),
        ({"sigma": np.eye(4)}, r"mu is float64 \(5,\) and sigma float64 \(4, 4\)"),
        ({"mu": np.full(5, np.nan)}, "not finite"),
        ({"mu": np.zeros(5, complex)}, "complex128"),
        ({"mu": np.array(["a"] * 5)}, "mu is <U1"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu is float64 \(0,\)"),
        ({"sigma": -np.eye(5)}, "no covariance"),
        ({"sigma": np.eye(5) + np.eye(5, k=1)}, "no covariance"),
        ({"sigma": np.eye(5) + 2 * (np.eye(5, k=1) + np.eye(5, k=-1))}, "no covariance"),
        ({"features": np.full((9, 5), np.nan, np.float32)}, "finite float32"),
        ({"features": np.zeros((9, 4), np.float32)}, "5 each"),
        ({"features": np.zeros((9, 5), complex)}, "features is complex128"),
        ({"logits": np.zeros(9, np.float32)}, "logits is float32"),
        ({"labels": np.zeros(9)}, "labels is float64"),
        ({"labels": np.full(9, -1)}, "label -1"),
        ({"labels": np.full(9, 3)}, "without a class name"),
        ({"content_keys": np.zeros((9, 1), np.int64)}, "content_keys is int64"),
        ({"record": np.array(json.dumps({**record, "set": {**record["set"], "count": 10}}))}, "10 rows"),
        ({"record": np.array(json.dumps({**record, "set": {**record["set"], "count": True}}))}, "incomplete"),
        ({"record": np.array(json.dumps({**record, "description": []}))}, "incomplete"),
        ({"record": np.array(json.dumps(shaped))}, "image_shape"),
        ({"record": np.array(json.dumps(incomplete))}, "ref.npz"),
        ({"record": np.array(json.dumps(other))}, "not those of its record"),
        ({"record": np.array(json.dumps({**record, "set": 3}))}, "damaged"),
    ):
        np.savez(path, **{**arrays, **changed})
        with pytest.raises(DataError, match=message):
            load_reference(path)
    del arrays["sigma"]
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="lacks sigma"):
        load_reference(path)


def test_a_reference_of_another_network_is_refused() -> None:
    tiny = SimpleNamespace(name="tiny", weights_hash="abc", dim=5, comparable_to_papers=False)
    made = Reference("ref.npz", known=measured(), record=RECORD)
    made.check(tiny)
    for other in ({"name": "inception"}, {"weights_hash": "def"}):
        extractor = SimpleNamespace(**{**vars(tiny), **other})
        with pytest.raises(DataError) as caught:
            made.check(extractor)
        for part in ("ref.npz", "tiny", "abc", extractor.name, extractor.weights_hash):
            assert part in str(caught.value)
    for reference in (made, Reference("ref.npz", known=measured())):
        with pytest.raises(DataError, match="5 features, but tiny features are 6"):
            reference.check(SimpleNamespace(**{**vars(tiny), "dim": 6}))
    assert made.measure(Measurer(tiny)) is made.known


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **_: Any) -> None:
        file.write(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(MvarError, match=r"ref\.npz.*No space left"):
        save_reference(tmp_path / "ref.npz", measured(), IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MvarError, match=r"ref\.npz"):
        save_reference(tmp_path / "file" / "ref.npz", measured(), IMAGES)
