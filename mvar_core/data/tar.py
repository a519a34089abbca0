"""Tar shards in webdataset's layout: members are indexed once, then read at their offsets in any order."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from mvar_core.data.decoding import EXTENSIONS
from mvar_core.data.shards import Label, Shards, number_classes
from mvar_core.data.sources import StoredSource, reading_threads
from mvar_core.errors import DataError

LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index")
NAME_KEYS = ("class_name", "label_name", "name")
CLASS_FILES = ("classes.json", "class_names.json", "classes.txt", "class_names.txt")
"""Files next to the shards that may name the classes: a list, {"0": name} or {name: 0}; or one name per line."""


@dataclass
class _Index:
    """What one shard holds, in the order of its members."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)


class TarSource(StoredSource):
    """Images in tar files: `KEY.jpg` with `KEY.cls` or `KEY.json` next to it, one after the other.

    A `.cls` holds the class's number or name as text; a `.json` holds it under label, cls, class, class_id or
    class_index, and the name under class_name. Without any, all images are one class. Numbers get their names
    from the json files, from a file classes.json or classes.txt next to the shards, or are their own names.

    Raises:
        DataError: A damaged file, no images, or images with and without classes.
    """

    def __init__(self, shards: Shards):
        indices = _index_all(shards.files)
        labels = [label for index in indices for label in index.labels]
        if not labels:
            raise DataError(f"{shards.name} holds no images ({' '.join(EXTENSIONS)}).", _nested_hint(shards.files[0]))
        names = [
            f"{path.name}/{name}" for path, index in zip(shards.files, indices, strict=True) for name in index.names
        ]
        reference = indices if shards.reference == shards.files else _index_all(shards.reference)
        class_names, numbers = number_classes(
            shards,
            labels,
            names,
            lambda: [label for index in reference for label in index.labels],
            _listed_names(shards.files[0].parent),
            {number: name for index in reference for number, name in index.class_names.items()},
        )
        super().__init__(shards.name, shards.split, class_names, numbers, names)
        self.files = shards.files
        self._shard = np.repeat(np.arange(len(indices)), [len(index.names) for index in indices])
        self._offsets = np.concatenate([np.asarray(index.offsets, np.int64) for index in indices])
        self._sizes = np.concatenate([np.asarray(index.sizes, np.int64) for index in indices])

    def open(self, index: int) -> IO[bytes]:
        """A member, read at its offset in its shard."""
        path = self.files[self._shard[index]]
        return io.BufferedReader(_Member(path, int(self._offsets[index]), int(self._sizes[index])), 1 << 16)

    def where(self, index: int) -> str:
        """Path of the shard, and the member's name."""
        path = self.files[self._shard[index]]
        return f"{path}: {self.item_names[index][len(path.name) + 1 :]}"

    def item_bytes(self, index: int) -> int:
        """Size of the member."""
        return int(self._sizes[index])


class _Member(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, path: Path, offset: int, size: int):
        self._file = path.open("rb", buffering=0)
        self._offset, self._size, self._place = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, self._size)[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._place))
        content = os.pread(self._file.fileno(), wanted, self._offset + self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _index_all(files: Sequence[Path]) -> list[_Index]:
    with ThreadPoolExecutor(min(reading_threads(), len(files))) as pool:
        return list(pool.map(_index, files))


def _index(path: Path) -> _Index:
    """Read the headers of a shard's members, and the labels; images are skipped."""
    index = _Index()
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for members in _samples(archive):
                image = next((members[ext] for ext in (e[1:] for e in EXTENSIONS) if ext in members), None)
                if image is None:
                    continue
                if image.offset_data + image.size > size:
                    raise tarfile.ReadError(f"it ends within {image.name}")
                index.names.append(image.name.removeprefix("./"))
                index.offsets.append(image.offset_data)
                index.sizes.append(image.size)
                index.labels.append(_label(path, archive, members, index.class_names))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a whole tar file: {error}.", "Write or download it again.") from None
    return index


def _samples(archive: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Members that follow each other and share a name up to the first dot, by what comes after it."""
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every member that it has seen
        folder, _, name = member.name.rpartition("/")
        if not member.isfile() or name.startswith((".", "__MACOSX")):
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
            return file.read().decode().strip()
        except UnicodeDecodeError:
            raise DataError(f"{path}: {member.name} is not text.") from None

    label: Label = None
    if "json" in members:
        try:
            values = json.loads(text(members["json"]))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: {members['json'].name} is not a JSON file: {error}.") from None
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
    return int(text) if text.removeprefix("-").isdecimal() else text


def _listed_names(folder: Path) -> list[str] | None:
    """Names of classes from a file in the shards' folder."""
    path = next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else text.split("\n")[: len(text.splitlines())]
        if isinstance(values, dict):
            if all(isinstance(value, int) for value in values.values()):
                values = {value: key for key, value in values.items()}
            values = [values[key] for key in sorted(values, key=int)]
        return [str(value).strip() for value in values]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} does not list class names: {error}.", "Write a JSON list of names.") from None


def _nested_hint(path: Path) -> str | None:
    with tarfile.open(path, "r:") as archive:
        first = archive.next()
    if first is not None and first.name.lower().endswith(".tar"):
        return f"It holds further tar files ({first.name}, …): unpack them, one folder for each."
    return None
