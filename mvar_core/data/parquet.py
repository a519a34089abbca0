"""Hugging Face style data sets: parquet or arrow files with a column of images and one of labels, read by pyarrow."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np

from mvar_core.data.shards import Label, ShardIndex, Shards, ShardSource
from mvar_core.data.sources import Report
from mvar_core.errors import DataError, one_line
from mvar_core.untrusted import open_regular, parse_json

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label", "class_name")
KEPT_BYTES = 512 * 2**20
"""Row groups of parquet files that are kept decoded, while images next to each other are read."""


@dataclass(frozen=True)
class _Table:
    """One file: the rows of each of its groups, and how a column of a group is read."""

    schema: Any
    groups: list[int]
    read: Callable[[int, str], Any]


class ParquetSource(ShardSource):
    """Images in parquet or arrow files: a column image {bytes, path} (or of bytes alone), and label where there is one.

    The `datasets` package writes such files, but only pyarrow is needed, which it brings along. Class names come from
    the files' metadata (ClassLabel), or are the labels themselves. Arrow files are mapped into memory; of parquet files
    whole row groups are decoded and some kept, so that they suit reading in order better than in any order.

    Raises:
        DataError: pyarrow is missing, a damaged file, no column that holds images, or what `ShardSource` refuses.
    """

    def __init__(self, shards: Shards):
        self._tables: dict[Path, _Table] = {}
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = Lock()
        super().__init__(shards)
        self._columns = [_image_column(path, self._tables[path].schema) for path in self.files]
        self._groups = [np.cumsum([0, *self._tables[path].groups]) for path in self.files]

    def index(self, path: Path) -> ShardIndex:
        """The labels of a file's rows."""
        table = self._tables[path] = _open(path)
        rows = sum(table.groups)
        if not 0 <= rows <= path.stat().st_size:  # labels alone may be packed tightly, images may not
            raise DataError(f"{path} claims to have {rows:,} rows of images.", "Write or download it again.")
        labels: list[Label] = [None] * rows
        try:
            _image_column(path, table.schema)
            column = next((name for name in LABEL_COLUMNS if name in table.schema.names), None)
            if column is not None:
                found = [label for group in range(len(table.groups)) for label in table.read(group, column).to_pylist()]
                if len(found) != rows:
                    raise ValueError(f"{len(found)} labels of {rows} rows")
                labels = [label if label is None or isinstance(label, int) else str(label) for label in found]
        except DataError:
            raise
        except Exception as error:  # of pyarrow, or of Python's types
            raise DataError(f"The columns of {path} cannot be read: {one_line(error)[:300]}.") from None
        return ShardIndex([f"{path.name}#{row}" for row in range(rows)], labels)

    def listed_names(self) -> list[str] | None:
        """Names of the labels, from the data set's features."""
        schema = self._tables[self.files[0]].schema
        column = next((name for name in LABEL_COLUMNS if name in schema.names), None)
        metadata = (schema.metadata or {}).get(b"huggingface")
        if metadata is None:
            return None
        try:
            feature = parse_json(metadata.decode(), str(self.files[0]))
            for key in ("info", "features", column, "names"):
                feature = feature.get(key) if isinstance(feature, dict) else None
        except (DataError, UnicodeDecodeError):
            return None
        return [str(name) for name in feature] if isinstance(feature, list) and feature else None

    def open(self, index: int) -> IO[bytes]:
        """The bytes of an image."""
        file, row = self.place(index)
        group = int(np.searchsorted(self._groups[file], row, side="right")) - 1
        value = self._images(file, group)[row - int(self._groups[file][group])].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            path = f", only the path {value['path']}" if isinstance(value, dict) and value.get("path") else ""
            raise DataError(f"{self.where(index)} holds no image{path}.", "Write the data set with its images in it.")
        return io.BytesIO(content)

    def where(self, index: int) -> str:
        """Path of the file, and the row in it."""
        file, row = self.place(index)
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
                self._kept[file, group] = self._tables[self.files[file]].read(group, self._columns[file])
            self._kept.move_to_end((file, group))
            found = self._kept[file, group]
            while len(self._kept) > 2 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
            return found


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
            reader.schema, [batch.num_rows for batch in batches], lambda group, name: batches[group].column(name)
        )
    except Exception as error:  # of pyarrow, or of Python's types
        raise DataError(f"{path} cannot be read: {one_line(error)[:300]}.", "Write or download it again.") from None


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
