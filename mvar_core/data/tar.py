"""Tar shards in webdataset's layout: members are indexed once, then read at their offsets in any order."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from mvar_core.data.decoding import EXTENSIONS
from mvar_core.data.shards import Label, ShardIndex, Shards, ShardSource
from mvar_core.errors import DataError, one_line
from mvar_core.untrusted import open_regular, parse_json, read_text

LARGEST_TEXT = 2**24
"""Bytes of a label or caption, or of a header."""
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index")
NAME_KEYS = ("class_name", "label_name", "name")
CLASS_FILES = ("classes.json", "class_names.json", "classes.txt", "class_names.txt")
"""Files next to the shards that may name the classes: a list, {"0": name} or {name: 0}; or one name per line."""


class TarSource(ShardSource):
    """Images in tar files: `KEY.jpg` with `KEY.cls` or `KEY.json` next to it, one after the other.

    A `.cls` holds the class's number or name as text; a `.json` holds it under label, cls, class, class_id or
    class_index, and the name under class_name. A file classes.json or classes.txt next to the shards lists names.

    Raises:
        DataError: A damaged file, or what `ShardSource` refuses.
    """

    def __init__(self, shards: Shards):
        # Offset and size of each image in its file, by file. Threads fill it in.
        self._spans: dict[Path, list[tuple[int, int]]] = {}
        super().__init__(shards)
        spans = [span for path in self.files for span in self._spans.pop(path)]
        self._offsets, self._sizes = np.asarray(spans, np.int64).T

    def index(self, path: Path) -> ShardIndex:
        """Read the headers of a shard's members, and the labels; images are skipped."""
        index = ShardIndex()
        spans: list[tuple[int, int]] = []
        nested = None
        try:
            with open_regular(path) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as archive:
                size = file.seek(0, 2)
                file.seek(0)
                for members in _samples(archive):
                    image = next((members[ext] for ext in (e[1:] for e in EXTENSIONS) if ext in members), None)
                    if image is None:
                        nested = nested or (members["tar"].name if "tar" in members else None)
                        continue
                    if image.offset_data + image.size > size:
                        raise tarfile.ReadError(f"it ends within {image.name}")
                    index.names.append(f"{path.name}/{image.name.removeprefix('./')}")
                    index.labels.append(_label(path, archive, members, index.class_names))
                    spans.append((image.offset_data, image.size))
        except DataError:
            raise
        except Exception as error:  # whatever a damaged header makes of the reader
            problem = f"{path} is not a whole tar file: {one_line(error)[:300]}."
            raise DataError(problem, "Write or download it again.") from None
        if not spans and nested:
            raise DataError(
                f"{path} holds no images ({' '.join(EXTENSIONS)}).",
                f"It holds further tar files ({nested}, …): unpack them, one folder for each.",
            )
        self._spans[path] = spans
        return index

    def open(self, index: int) -> IO[bytes]:
        """A member, read at its offset in its shard."""
        path = self.files[self.place(index)[0]]
        return io.BufferedReader(_Member(path, int(self._offsets[index]), int(self._sizes[index])), 1 << 16)

    def where(self, index: int) -> str:
        """Path of the shard, and the member's name."""
        path = self.files[self.place(index)[0]]
        return f"{path}: {self.item_names[index][len(path.name) + 1 :]}"

    def item_bytes(self, index: int) -> int:
        """Size of the member."""
        return int(self._sizes[index])

    def listed_names(self) -> list[str] | None:
        """Names of classes from a file next to the shards."""
        folder = self.files[0].parent
        path = next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
        if path is None:
            return None
        try:
            text = read_text(path)
            values = parse_json(text, str(path)) if path.suffix == ".json" else text.splitlines()
            if isinstance(values, dict):
                if all(isinstance(value, int) for value in values.values()):
                    values = {value: key for key, value in values.items()}
                values = [values[key] for key in sorted(values, key=int)]
            if not isinstance(values, list) or not all(isinstance(value, (str, int)) for value in values):
                raise ValueError("expected names")
            return [str(value).strip() for value in values]
        except (ValueError, TypeError) as error:
            problem = f"{path} does not list class names: {one_line(error)[:300]}."
            raise DataError(problem, "Write a JSON list of names.") from None


class _Headers(io.RawIOBase):
    """A tar file for indexing: what a header claims to be long is not read into memory."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.seek, self.tell = file.seek, file.tell  # type: ignore[method-assign]

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_TEXT:
            raise tarfile.ReadError(f"a header or label of {size:,} bytes")
        return self._file.read(size)


class _Member(io.FileIO):
    """A range of a file, as a file."""

    # By way of `readinto`, which knows the end.
    read, readall = io.RawIOBase.read, io.RawIOBase.readall  # type: ignore[assignment]

    def __init__(self, path: Path, offset: int, size: int):
        super().__init__(path)
        self._start, self._stop = offset, offset + size
        super().seek(offset)

    def tell(self) -> int:
        return super().tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (self._start, super().tell(), self._stop)[whence]
        return super().seek(max(self._start, base + offset)) - self._start

    def readinto(self, buffer: Any) -> int | None:
        return super().readinto(memoryview(buffer)[: max(0, self._stop - super().tell())])


def _samples(archive: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Members that follow each other and share a name up to the first dot, by what comes after it."""
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    place = -1
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every member that it has seen
        if member.size < 0 or member.offset <= place:  # it would lead back, for ever
            raise tarfile.ReadError(f"{member.name!r:.100} has {member.size} bytes")
        place = member.offset
        folder, _, name = member.name.rpartition("/")
        if not member.isfile() or member.issparse() or name.startswith((".", "__MACOSX")):
            continue
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}"
        if key != current and members:
            yield members
            members = {}
        current = key
        members[extension.lower()] = member
    if members:
        yield members


def _label(
    path: Path, archive: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], class_names: dict[int, str]
) -> Label:
    """The label of an image, from the members that share its name; names of numbers are added to `class_names`."""

    def text(member: tarfile.TarInfo) -> str:
        file = archive.extractfile(member)
        assert file is not None
        try:
            if member.size > LARGEST_TEXT:
                raise ValueError
            return file.read(member.size).decode().strip()
        except ValueError:
            raise DataError(f"{path}: {member.name} is not a label or a caption ({member.size:,} bytes).") from None

    label: Label = None
    if "json" in members:
        values = parse_json(text(members["json"]), f"{path}: {members['json'].name}")
        if isinstance(values, dict):
            label = next((_number(values[key]) for key in LABEL_KEYS if key in values), None)
            name = next((values[key] for key in NAME_KEYS if isinstance(values.get(key), str)), None)
            if isinstance(label, int) and name is not None:
                class_names.setdefault(label, name)
            label = name if label is None and "class_name" in values else label
    return _number(text(members["cls"])) if "cls" in members else label


def _number(value: Any) -> Label:
    if isinstance(value, bool) or value is None:
        return None
    text = str(value)
    return int(text) if len(text) < 20 and text.removeprefix("-").isdecimal() else text
