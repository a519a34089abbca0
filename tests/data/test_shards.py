from __future__ import annotations

from pathlib import Path

import pytest

from mvar_core.data.shards import expand_braces, find_shards
from mvar_core.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def found(name: object, split: str = "train") -> list[str]:
    shards = find_shards(str(name), split)
    assert shards is not None
    return [path.name for path in shards.files]


def test_braces_are_ranges_and_lists():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    with pytest.raises(DataError, match=r"\{3\.\.1\} is not a range"):
        expand_braces("a-{3..1}.tar")
    with pytest.raises(DataError, match=r"\{one\} is not a range"):
        expand_braces("a-{one}.tar")


def test_a_file_a_pattern_and_a_folder_name_shards(tmp_path):
    touch(tmp_path, "s-000.tar", "s-001.tar", "s-002.tar", "notes.txt")
    assert found(tmp_path / "s-001.tar") == ["s-001.tar"]
    assert found(tmp_path / "s-{001..002}.tar") == ["s-001.tar", "s-002.tar"]
    assert found(tmp_path / "s-*.tar") == found(tmp_path) == ["s-000.tar", "s-001.tar", "s-002.tar"]
    with pytest.raises(DataError, match=r"s-003\.tar does not exist"):
        find_shards(f"{tmp_path}/s-{{002..003}}.tar")
    with pytest.raises(DataError, match=r"s-9\.tar does not exist"):
        find_shards(f"{tmp_path}/s-9.tar")


def test_other_names_are_not_shards(tmp_path, class_folders):
    assert find_shards(str(class_folders)) is None
    assert find_shards(str(tmp_path / "nowhere")) is None
    touch(class_folders, "stray.tar", "photo.png")
    assert find_shards(str(class_folders)) is None  # images are next to it


def test_splits_are_words_of_file_names(tmp_path, caplog):
    touch(tmp_path, *(f"data/{name}.parquet" for name in ("train-00000-of-00002", "train-00001-of-00002", "Test-0")))
    assert found(tmp_path) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert found(tmp_path, "test") == ["Test-0.parquet"]
    shards = find_shards(str(tmp_path), "test")
    assert shards is not None
    assert [path.name for path in shards.reference or ()] == found(tmp_path)
    with pytest.raises(DataError, match="has no split 'val'.* test, train"):
        find_shards(str(tmp_path), "val")
    touch(tmp_path, "data/validation-0.parquet", "data/more.parquet")
    assert found(tmp_path, "val") == found(tmp_path, "validation") == ["validation-0.parquet"]
    assert "1 files of no split (more.parquet" in caplog.text
    touch(tmp_path, "data/valid-0.parquet")
    assert found(tmp_path, "valid") == ["valid-0.parquet"]
    with pytest.raises(DataError, match="has 2 splits valid, validation"):
        find_shards(str(tmp_path), "val")


def test_splits_are_folders_too(tmp_path):
    touch(tmp_path / "a", "train/a.tar", "val/b.tar")
    assert (found(tmp_path / "a"), found(tmp_path / "a", "validation")) == (["a.tar"], ["b.tar"])
    touch(tmp_path / "b", "default/Training/0000.parquet", "default/testing/0001.parquet")
    assert (found(tmp_path / "b"), found(tmp_path / "b", "test")) == (["0000.parquet"], ["0001.parquet"])


def test_a_split_that_is_not_there_is_refused(tmp_path):
    touch(tmp_path, "train-0.tar")
    with pytest.raises(DataError, match="has no split 'test'.* train"):
        find_shards(str(tmp_path), "test")


def test_compressed_and_mixed_shards_are_refused(tmp_path):
    for name in ("a.tar.gz", "b.tgz"):
        with pytest.raises(DataError, match="is compressed.*gunzip"):
            find_shards(f"{tmp_path}/{name}")
    touch(tmp_path / "packed", "a.tar.gz")
    with pytest.raises(DataError, match=r"a\.tar\.gz is compressed"):
        find_shards(str(tmp_path / "packed"))
    touch(tmp_path / "mixed", "a.tar", "b.parquet")
    with pytest.raises(DataError, match=r"kinds \.parquet, \.tar"):
        find_shards(str(tmp_path / "mixed"))
