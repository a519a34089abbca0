from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvar_core.data import parquet as parquet_module
from mvar_core.data.images import open_images, pixel_batches
from mvar_core.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def table(images: list[bytes | None], labels: list[Any] | None = None, names: list[str] | None = None) -> Any:
    columns: dict[str, Any] = {"image": [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)]}
    columns |= {"label": labels} if labels is not None else {}
    made = pyarrow.table(columns)
    if names is None:
        return made
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, content: Any, rows: int = 2) -> Path:
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(content, path, row_group_size=rows)
        return path
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=rows)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_images_labels_and_class_names(tmp_path, piece, kind):
    images = [png(piece(number)) for number in range(7)]
    write(tmp_path / f"data/train-0.{kind}", table(images[:5], [1, 0, 1, 2, 0], ["ant", "bee", "cat"]))
    write(tmp_path / f"data/train-1.{kind}", table(images[5:], [2, 2], ["ant", "bee", "cat"]))
    write(tmp_path / f"data/test-0.{kind}", table(images[:1], [2], ["ant", "bee", "cat"]))
    source = open_images(str(tmp_path))
    assert source.class_names == ("ant", "bee", "cat")
    assert source.labels.tolist() == [1, 0, 1, 2, 0, 2, 2]
    for index in (6, 0, 4, 5):
        assert np.array_equal(source.read(index, (40, 56)), piece(index))
    assert open_images(f"{tmp_path}:test").labels.tolist() == [2]
    labels = [labels.tolist() for _, labels in pixel_batches(source, (16, 16), batch_size=4)]
    assert labels == [[1, 0, 1, 2], [0, 2, 2]]
    assert source.fingerprint() != open_images(f"{tmp_path}:test").fingerprint()


def test_row_groups_are_decoded_once(tmp_path, piece, monkeypatch):
    write(tmp_path / "a.parquet", table([png(piece(number)) for number in range(9)], [0] * 9), rows=3)
    source = open_images(str(tmp_path / "a.parquet"))
    groups = []
    read = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, group, columns: (columns == ["image"] and groups.append(group)) or read(self, group, columns),
    )
    assert sum(len(labels) for _, labels in pixel_batches(source, (8, 8), batch_size=2)) == 9
    assert sorted(groups) == [0, 1, 2]


def test_few_row_groups_are_kept(tmp_path, piece, monkeypatch):
    monkeypatch.setattr(parquet_module, "KEPT_BYTES", 1)
    write(tmp_path / "a.parquet", table([png(piece(number)) for number in range(8)], [0] * 8))
    source = open_images(str(tmp_path / "a.parquet"))
    for index in range(8):
        source.read(index, (8, 8))
    assert list(source._kept) == [(0, 2), (0, 3)]


def test_text_labels_and_no_labels(tmp_path, piece):
    image = png(piece())
    path = write(tmp_path / "set/a.parquet", table([image] * 3, ["owl", "cat", "owl"]))
    source = open_images(str(path))
    assert (source.class_names, source.labels.tolist()) == (("cat", "owl"), [1, 0, 1])
    source = open_images(str(write(tmp_path / "set/a.parquet", table([image] * 2))))
    assert (source.class_names, source.labels.tolist()) == (("set",), [0, 0])


def test_what_cannot_be_used_is_refused(tmp_path, piece):
    image = png(piece())
    with pytest.raises(DataError, match="#1 has the class -1"):
        open_images(str(write(tmp_path / "a.parquet", table([image] * 2, [0, -1]))))
    with pytest.raises(DataError, match="1 of 2 images have none"):
        open_images(str(write(tmp_path / "a.parquet", table([image] * 2, [0, None]))))
    with pytest.raises(DataError, match="has no column of images; its columns are x"):
        open_images(str(write(tmp_path / "a.parquet", pyarrow.table({"x": [1]}))))
    content = pyarrow.table({"image": [{"bytes": each, "path": None} for each in (image, None, b"no image")]})
    source = open_images(str(write(tmp_path / "a.parquet", content)))
    with pytest.raises(DataError, match=r"a\.parquet, row 1 holds no image"):
        source.read(1, (8, 8))
    with pytest.raises(DataError, match=r"a\.parquet, row 2 is not an image"):
        source.read(2, (8, 8))
    for kind in ("parquet", "arrow"):
        (tmp_path / f"b.{kind}").write_bytes(b"damaged damaged damaged")
        with pytest.raises(DataError, match=rf"b\.{kind} cannot be read"):
            open_images(str(tmp_path / f"b.{kind}"))


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"is read with pyarrow, which is not installed.*pip install pyarrow"):
        open_images(str(tmp_path / "a.parquet"))


FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}


def saved(folder: Path, content: Any, split: str | None = "train", **state: Any) -> Path:
    """A data set as `datasets` saves it."""
    write(folder / "data-00000-of-00001.arrow", content)
    listed = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_split": split,
        "_format_type": None,
        **state,
    }
    (folder / "state.json").write_text(json.dumps(listed))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES, "splits": None}))
    return folder


def test_state_json_lists_the_files_of_a_saved_data_set(tmp_path, piece):
    images = [png(piece(number)) for number in range(4)]
    saved(tmp_path / "ds", table(images, [1, 0, 1, 1]), split="validation")
    for name in ("cache-0123456789abcdef.arrow", "cache-0123456789abcdef_00000_of_00002.arrow"):  # of map and filter
        write(tmp_path / "ds" / name, table(images, [0, 0, 0, 0]))
    write(tmp_path / "ds/cache-fedcba9876543210.arrow", pyarrow.table({"indices": [3, 1]}))
    source = open_images(str(tmp_path / "ds"))
    assert (source.class_names, source.labels.tolist()) == (("ant", "bee"), [1, 0, 1, 1])
    assert np.array_equal(source.read(3, (40, 56)), piece(3))
    (tmp_path / "ds/state.json").unlink()  # as in the cache of `datasets`
    assert open_images(str(tmp_path / "ds")).labels.tolist() == [1, 0, 1, 1]


def test_a_saved_data_set_that_is_not_whole_is_refused(tmp_path, piece):
    rows = table([png(piece())] * 2, [1, 0])
    with pytest.raises(DataError, match=r"ds/state\.json: rows .*flatten_indices"):
        open_images(str(saved(tmp_path / "ds", rows, _indices_data_files=[{"filename": "indices.arrow"}])))
    for files, problem in (
        ([{"filename": "data-00001.arrow"}], r"state\.json lists data-00001\.arrow, which does not exist"),
        ([{"filename": "../../other.arrow"}], r"state\.json does not list"),
        ([], r"state\.json does not list"),
    ):
        with pytest.raises(DataError, match=problem):
            open_images(str(saved(tmp_path / "ds", rows, _data_files=files)))


def test_the_splits_of_a_dataset_dict(tmp_path, piece):
    images = [png(piece(number)) for number in range(4)]
    for number, split in enumerate(("train", "validation", "test", "unsupervised")):
        saved(tmp_path / "dd" / split, table(images[: number + 1], [1, 0, 1, 0][: number + 1]), split)
    (tmp_path / "dd/dataset_dict.json").write_text('{"splits": ["train", "validation", "test", "unsupervised"]}')
    counts = {split: len(open_images(f"{tmp_path}/dd{split}")) for split in ("", ":val", ":validation", ":test")}
    assert counts == {"": 1, ":val": 2, ":validation": 2, ":test": 3}
    assert open_images(f"{tmp_path}/dd:val").class_names == ("ant", "bee")
    (tmp_path / "dd/dataset_dict.json").write_text('{"splits": ["../x"]}')
    with pytest.raises(DataError, match=r"dataset_dict\.json does not list splits"):
        open_images(str(tmp_path / "dd"))


def test_files_that_number_the_same_classes_differently_agree_by_name(tmp_path, piece):
    image = png(piece())
    write(tmp_path / "a/0.parquet", table([image] * 2, [0, 1], ["ant", "bee"]))
    write(tmp_path / "a/1.parquet", table([image] * 2, [0, 1], ["bee", "ant"]))
    source = open_images(str(tmp_path / "a"))
    assert (source.class_names, source.labels.tolist()) == (("ant", "bee"), [0, 1, 1, 0])
    write(tmp_path / "b/train-0.parquet", table([image] * 2, [0, 1], ["ant", "bee"]))
    write(tmp_path / "b/test-0.parquet", table([image] * 2, [0, 0], ["bee", "ant"]))
    assert open_images(f"{tmp_path}/b:test").labels.tolist() == [1, 1]
    write(tmp_path / "b/test-0.parquet", table([image] * 2, ["bee", "ant"]))
    assert open_images(f"{tmp_path}/b:test").labels.tolist() == [1, 0]
    write(tmp_path / "a/1.parquet", table([image], [2], ["ant", "bee"]))
    with pytest.raises(DataError, match=r"1\.parquet, row 0 is of class 2"):
        open_images(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"label": [1, 0], "class_name": ["owl", "cat"]}, ["owl", "cat"]),
        ({"label": [1.0, 0.0]}, ["1", "0"]),
        ({"label": ["1", "0"]}, ["1", "0"]),
        ({"label": [b"owl", b"cat"]}, ["owl", "cat"]),
        ({"label": [True, False]}, ["1", "0"]),
        ({"class_name": ["owl", "cat"]}, ["owl", "cat"]),
        ({"species": [1, 0]}, ["bee", "ant"]),
    ],
)
def test_what_labels_are(tmp_path, piece, columns, expected):
    content = table([png(piece()), png(piece(1))])
    for name, values in columns.items():
        content = content.append_column(name, [values])
    features = {"info": {"features": {"species": {"_type": "ClassLabel", "names": ["ant", "bee"]}}}}
    content = content.replace_schema_metadata({"huggingface": json.dumps(features)})
    source = open_images(str(write(tmp_path / "a.parquet", content)))
    assert [source.class_names[label] for label in source.labels] == expected


@pytest.mark.parametrize("labels", [[[1, 2], [0, 1]], [0.5, 1.0], [float("nan"), 1.0]])
def test_what_no_label_can_be(tmp_path, piece, labels):
    path = write(tmp_path / "a.parquet", table([png(piece())] * 2, labels))
    with pytest.raises(DataError, match=r"a\.parquet(, row |#)0"):
        open_images(str(path))


def test_one_of_several_columns_of_images(tmp_path, piece):
    first, second = png(piece(0)), png(piece(1))
    columns = {"mask": [{"bytes": second, "path": None}], "photo": [first]}
    path = write(tmp_path / "a.parquet", pyarrow.table(columns))
    assert np.array_equal(open_images(str(path)).read(0, (40, 56)), piece(1))
    assert np.array_equal(open_images(f"{path}:image=photo").read(0, (40, 56)), piece(0))
    path = write(tmp_path / "a.parquet", pyarrow.table({**columns, "depth": columns["mask"]}))
    with pytest.raises(DataError, match=r"several columns of images: mask, depth.*a\.parquet:image=mask"):
        open_images(str(path))
    path = write(tmp_path / "a.parquet", pyarrow.table({**columns, "image": [first]}))
    assert np.array_equal(open_images(str(path)).read(0, (40, 56)), piece(0))
    with pytest.raises(DataError, match=r"no column of images called other; its columns are mask, photo, image"):
        open_images(f"{path}:image=other")


def test_paths_within_the_folder_are_followed_and_no_others(tmp_path, piece):
    (tmp_path / "set/images").mkdir(parents=True)
    for place in ("set/images/0.png", "secret.png"):
        (tmp_path / place).write_bytes(png(piece(3)))
    paths = [
        "images/0.png",
        str(tmp_path / "set/images/0.png"),
        "../secret.png",
        str(tmp_path / "secret.png"),
        "no.png",
    ]
    content = pyarrow.table({"image": [{"bytes": None, "path": path} for path in paths]})
    source = open_images(str(write(tmp_path / "set/a.parquet", content)))
    assert np.array_equal(source.read(0, (40, 56)), piece(3))
    assert np.array_equal(source.read(1, (40, 56)), piece(3))
    for row in (2, 3):
        with pytest.raises(DataError, match=rf"a\.parquet, row {row} holds only the path .*secret\.png"):
            source.read(row, (8, 8))
    with pytest.raises(DataError, match=r"no\.png does not exist"):
        source.read(4, (8, 8))


def test_captions(tmp_path, piece):
    content = table([png(piece())] * 2).append_column("text", [["an owl", "two cats"]])
    assert open_images(str(write(tmp_path / "a.parquet", content))).captions() == ["an owl", "two cats"]
