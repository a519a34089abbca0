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
    source = open_images(str(write(tmp_path / "a.parquet", table([image, None, b"no image"], [0, 0, 0]))))
    with pytest.raises(DataError, match=r"a\.parquet, row 1 holds no image, only the path 1\.png"):
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
