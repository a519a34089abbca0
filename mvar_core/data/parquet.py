"""Hugging Face style data sets: parquet or arrow files with a column of images and one of labels, read by pyarrow."""

from __future__ import annotations

import hashlib
import io
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np

from mvar_core.data.shards import IMAGE_KEY, Contents, Item, Shards, ShardSource, as_label, call
from mvar_core.data.sources import Report
from mvar_core.errors import DataError, one_line
from mvar_core.untrusted import open_regular, parse_json, read_json

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
NAME_COLUMNS = ("class_name", "label_name")
CAPTION_COLUMNS = ("caption", "text", "prompt")
KEPT_BYTES = 512 * 2**20
"""Row groups of parquet files that are kept decoded, while images next to each other are read."""


logger = logging.getLogger("mvar")


@dataclass
class _Table:
    """One file: the rows of each of its groups, how a column of a group is read, and which holds the images."""

    schema: Any
    columns: list[str]
    groups: list[int]
    read: Callable[[int, str], Any]
    image: str = ""


class ParquetSource(ShardSource):
    """Images in parquet or arrow files: a column image {bytes, path} (or of bytes alone), and label where there is one.

    Only pyarrow is needed. Class names come from the data set's features (ClassLabel), from a column class_name, or are
    the labels themselves. Arrow files are mapped into memory; of parquet files whole row groups are decoded and some
    kept, so that they suit reading in order better than in any order.
    """

    def __init__(self, shards: Shards, image_key: str | None = None):
        self._tables: dict[Path, _Table] = {}
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = Lock()
        super().__init__(shards, image_key)
        self._groups = [np.cumsum([0, *self._tables[path].groups]) for path in self.files]

    def index(self, path: Path, number: int) -> Contents:
        """The labels and captions of a file's rows."""
        table = self._tables[path] = _open(path)
        rows, columns = sum(table.groups), table.columns
        if not 0 <= rows <= path.stat().st_size:  # labels alone may be packed tightly, images may not
            raise DataError(f"{path} claims to have {rows:,} rows of images.", "Write or download it again.")
        features = _features(path, table.schema)
        table.image = _image_column(path, table.schema, features, self.image_key)
        classes = {name: features[name]["names"] for name in columns if "names" in features.get(name, ())}
        label, called, caption = (
            next((name for name in names if name in columns), None)
            for names in (LABEL_COLUMNS, NAME_COLUMNS, CAPTION_COLUMNS)
        )
        if label is None and len(classes) > 1:
            logger.warning("%s: no column is called label, so %s are not used.", path, ", ".join(classes))
        label = label or (next(iter(classes)) if len(classes) == 1 else called)
        try:
            labels, names, captions = (
                [value for group in range(len(table.groups)) for value in table.read(group, column).to_pylist()]
                if column is not None
                else [None] * rows
                for column in (label, called, caption)
            )
        except Exception as error:  # of pyarrow, or of Python's types
            raise DataError(f"The columns of {path} cannot be read: {one_line(error)[:300]}.") from None
        if not len(labels) == len(names) == len(captions) == rows:
            raise DataError(f"{path} has {len(labels)} labels of {rows} rows.", "Write or download it again.")
        contents = Contents(class_names=dict(enumerate(map(str, classes.get(label or "", ())))))
        known = len(contents.class_names)
        for row, (value, name, described) in enumerate(zip(labels, names, captions, strict=True)):
            found = as_label(value, f"{path}, row {row}")
            if isinstance(found, int) and 0 < known <= found:
                raise DataError(f"{path}, row {row} is of class {found}; there are names for {known} classes.")
            if isinstance(found, int) and isinstance(name, str) and not known:
                call(contents.class_names, found, name, f"{path}, row {row}")
            text = described if isinstance(described, str) else None
            contents.items.append(Item(f"{path.name}#{row}", found, (number, row, 0), caption=text))
        return contents

    def open(self, index: int) -> IO[bytes]:
        """The bytes of an image."""
        file, row, _ = self.places[index].tolist()
        group = int(np.searchsorted(self._groups[file], row, side="right")) - 1
        value = self._images(file, group)[row - int(self._groups[file][group])].as_py()
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content:
            return io.BytesIO(content)
        if not path:
            raise DataError(f"{self.where(index)} holds no image.", "Remove the row, or use --skip-bad.")
        folder = self.files[file].parent.resolve()
        found = (folder / path).resolve()
        if not found.is_relative_to(folder):  # a stranger's table must not choose among all files of this machine
            raise DataError(
                f"{self.where(index)} holds only the path of an image, {path}, which is not in the folder {folder}.",
                "Save the data set with the images in it: `datasets.load_from_disk(A).save_to_disk(B)` does so.",
            )
        return open_regular(found)

    def where(self, index: int) -> str:
        """Path of the file, and the row in it."""
        file, row, _ = self.places[index].tolist()
        return f"{self.files[file]}, row {row}"

    def check(self, progress: Report | None = None, indices: Sequence[int] | None = None) -> None:
        """Nothing: looking at images in parquet files means reading all of them."""

    def fingerprint(self) -> str:
        """As of other sources, with the sizes of the files in place of those of the images."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for path in self.files:
            digest.update(f"\n{path.name}\t{path.stat().st_size}".encode())
        return digest.hexdigest()

    def _images(self, file: int, group: int) -> Any:
        with self._lock:  # one thread decodes; the others want the same group, or the next
            if (file, group) not in self._kept:
                table = self._tables[self.files[file]]
                self._kept[file, group] = table.read(group, table.image)
                while len(self._kept) > 2 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((file, group))
            return self._kept[file, group]


def _open(path: Path) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{path} is read with pyarrow, which is not installed.",
            "Install it: pip install pyarrow (mvar[parquet]; the `datasets` package brings it along).",
        ) from None
    open_regular(path).close()
    try:
        if path.suffix.lower() == ".parquet":
            file = parquet.ParquetFile(path)
            rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            return _Table(
                file.schema_arrow,
                file.schema_arrow.names,
                rows,
                lambda group, name: file.read_row_group(group, columns=[name]).column(0).combine_chunks(),
            )
        content = pyarrow.memory_map(str(path))
        try:
            reader = pyarrow.ipc.open_file(content)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except pyarrow.ArrowInvalid:
            content.seek(0)
            reader = pyarrow.ipc.open_stream(content)
            batches = list(reader)
        for batch in batches:  # what lies about its offsets would be read beyond its end
            batch.validate(full=True)
        return _Table(
            reader.schema,
            reader.schema.names,
            [batch.num_rows for batch in batches],
            lambda group, name: batches[group].column(name),
        )
    except Exception as error:  # of pyarrow, or of Python's types
        raise DataError(f"{path} cannot be read: {one_line(error)[:300]}.", "Write or download it again.") from None


def _features(path: Path, schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` knows of each column: from dataset_info.json next to a file, else from the file's metadata."""
    info = path.parent / "dataset_info.json"
    found = [read_json(info, finite=False)] if info.is_file() else []
    try:
        metadata = (schema.metadata or {}).get(b"huggingface", b"{}").decode()
        found.append(parse_json(metadata, "the metadata", finite=False)["info"])
    except (DataError, UnicodeDecodeError) as error:
        logger.warning("%s: %s Classes have no other names than their labels.", path, one_line(error)[:300])
    except (KeyError, TypeError):
        pass  # others may call anything so
    features = (each.get("features") for each in found if isinstance(each, dict))
    columns = next((each for each in features if isinstance(each, dict)), {})
    listed = {name: feature for name, feature in columns.items() if isinstance(feature, dict)}
    return {name: feature for name, feature in listed.items() if isinstance(feature.get("names", []), list)}


def _image_column(path: Path, schema: Any, features: Mapping[str, Mapping[str, Any]], key: str | None) -> str:
    import pyarrow.types as types

    def holds_images(field: Any) -> bool:
        kind = field.type
        if types.is_struct(kind):
            inside = {kind.field(number).name for number in range(kind.num_fields)}
            return "bytes" in inside and features.get(field.name, {}).get("_type") in (None, "Image")
        return field.name.lower() in (*IMAGE_COLUMNS, key) and (types.is_binary(kind) or types.is_large_binary(kind))

    found = [field.name for field in schema if holds_images(field)]
    named = [name for name in found if name.lower() == key] if key else found
    usual = [name for name in named if name in IMAGE_COLUMNS]
    if not named:
        raise DataError(
            f"{path} has no column of images{f' called {key}' if key else ''}; its columns are"
            f" {', '.join(schema.names) or 'none'}.",
            "Expected a column image of {bytes, path}, as the `datasets` package writes it.",
        )
    if len(usual if usual else named) > 1:
        raise DataError(
            f"{path} has several columns of images: {', '.join(named)}.",
            f"Choose one, as in {path}{IMAGE_KEY}{named[0]}.",
        )
    return (usual or named)[0]
