"""Hugging Face style data sets: parquet or arrow files with a column of images and one of labels, read by pyarrow."""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np

from mvar_core.data.shards import Label, Shards, number_classes
from mvar_core.data.sources import Report, StoredSource
from mvar_core.errors import DataError, one_line

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label", "class_name")
KEPT_BYTES = 512 * 2**20
"""Row groups of parquet files that are kept decoded, while images next to each other are read."""


class ParquetSource(StoredSource):
    """Images in parquet or arrow files: a column image {bytes, path} (or of bytes alone), and label where there is one.

    The `datasets` package writes such files, but only pyarrow is needed, which it brings along. Class names come from
    the files' metadata (ClassLabel), or are the labels themselves. Arrow files are mapped into memory; of parquet files
    whole row groups are decoded and some kept, so that they suit reading in order better than in any order.

    Raises:
        DataError: pyarrow is missing, a damaged file, or no column that holds images.
    """

    def __init__(self, shards: Shards):
        self.files = shards.files
        self._tables = [_open(path, shards.name) for path in shards.files]
        sizes = [table.group_sizes() for table in self._tables]
        counts = [sum(groups) for groups in sizes]
        if not sum(counts):
            raise DataError(f"{shards.name} holds no rows.")
        # Row r of the data set is in group searchsorted(starts, r) of the list of all groups of all files.
        self._groups = [(number, group) for number, groups in enumerate(sizes) for group in range(len(groups))]
        self._starts = np.cumsum([0, *(size for groups in sizes for size in groups)])
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()
        names = [f"{path.name}#{row}" for path, count in zip(shards.files, counts, strict=True) for row in range(count)]

        def labels_of(tables: Sequence[_Table]) -> list[Label]:
            return [label for table in tables for label in table.labels()]

        labels = labels_of(self._tables)
        same = shards.reference == shards.files
        class_names, numbers = number_classes(
            shards,
            labels,
            names,
            lambda: labels if same else labels_of([_open(path, shards.name) for path in shards.reference]),
            self._tables[0].class_names(),
            {},
        )
        super().__init__(shards.name, shards.split, class_names, numbers, names)

    def open(self, index: int) -> IO[bytes]:
        """The bytes of an image."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        value = self._group(group)[index - int(self._starts[group])].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            path = f", only the path {value['path']}" if isinstance(value, dict) and value.get("path") else ""
            raise DataError(f"{self.where(index)} holds no image{path}.", "Write the data set with its images in it.")
        return io.BytesIO(content)

    def where(self, index: int) -> str:
        """Path of the file, and the row in it."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.files[self._groups[group][0]]}, row {self.item_names[index].rpartition('#')[2]}"

    def check(self, progress: Report | None = None, indices: Sequence[int] | None = None) -> None:
        """Nothing: looking at images in parquet files means reading all of them."""

    def fingerprint(self) -> str:
        """As of other sources, with the sizes of the files in place of those of the images."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for path in self.files:
            digest.update(f"\n{path.name}\t{path.stat().st_size}".encode())
        return digest.hexdigest()

    def _group(self, number: int) -> Any:
        with self._lock:  # one thread decodes; the others want the same group, or the next
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            file, group = self._groups[number]
            images = self._tables[file].images(group)
            self._kept[number] = images
            while len(self._kept) > 2 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
            return images


class _Table:
    """One file: its columns, and its images by groups of rows."""

    def __init__(self, path: Path, schema: Any):
        self.image = _image_column(path, schema)
        self.label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
        self._metadata = (schema.metadata or {}).get(b"huggingface")

    def group_sizes(self) -> list[int]:
        raise NotImplementedError

    def images(self, group: int) -> Any:
        raise NotImplementedError

    def column(self, name: str) -> list[Label]:
        raise NotImplementedError

    def labels(self) -> list[Label]:
        """One for each row; None where there is no column of labels."""
        return [None] * sum(self.group_sizes()) if self.label is None else self.column(self.label)

    def class_names(self) -> list[str] | None:
        """Names of the labels, from the data set's features."""
        if self._metadata is None:
            return None
        feature = json.loads(self._metadata).get("info", {}).get("features", {}).get(self.label) or {}
        names = feature.get("names") if isinstance(feature, dict) else None
        return [str(name) for name in names] if names else None


class _ParquetTable(_Table):
    def __init__(self, path: Path):
        import pyarrow.parquet as parquet

        self._file = parquet.ParquetFile(path)
        super().__init__(path, self._file.schema_arrow)

    def group_sizes(self) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def images(self, group: int) -> Any:
        return self._file.read_row_group(group, columns=[self.image]).column(0).combine_chunks()

    def column(self, name: str) -> list[Label]:
        values: list[Label] = self._file.read(columns=[name]).column(0).to_pylist()
        return values


class _ArrowTable(_Table):
    def __init__(self, path: Path):
        import pyarrow

        content = pyarrow.memory_map(str(path))
        try:
            reader = pyarrow.ipc.open_file(content)
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except pyarrow.ArrowInvalid:
            content.seek(0)
            reader = pyarrow.ipc.open_stream(content)
            self._batches = list(reader)
        super().__init__(path, reader.schema)

    def group_sizes(self) -> list[int]:
        return [batch.num_rows for batch in self._batches]

    def images(self, group: int) -> Any:
        return self._batches[group].column(self.image)

    def column(self, name: str) -> list[Label]:
        return [value for batch in self._batches for value in batch.column(name).to_pylist()]


def _open(path: Path, name: str) -> _Table:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{name} is read with pyarrow, which is not installed.",
            "Install it: pip install pyarrow (mvar[parquet]; the `datasets` package brings it along).",
        ) from None
    try:
        return _ParquetTable(path) if path.suffix.lower() == ".parquet" else _ArrowTable(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}.", "Write or download it again.") from None


def _image_column(path: Path, schema: Any) -> str:
    import pyarrow.types as types

    def holds_images(field: Any) -> bool:
        kind = field.type
        if types.is_struct(kind):
            return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
        return field.name in IMAGE_COLUMNS and (types.is_binary(kind) or types.is_large_binary(kind))

    found = [field.name for field in schema if holds_images(field)]
    if not found:
        raise DataError(
            f"{path} has no column of images; its columns are {', '.join(schema.names) or 'none'}.",
            "Expected a column image of {bytes, path}, as the `datasets` package writes it.",
        )
    return next((name for name in IMAGE_COLUMNS if name in found), found[0])
