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
from mvar_core.data.shards import Shards
from mvar_core.data.sources import StoredSource, reading_threads
from mvar_core.errors import DataError, nearest

LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index")
NAME_KEYS = ("class_name", "label_name", "name")
CLASS_FILES = ("classes.json", "class_names.json", "classes.txt", "class_names.txt")
"""Files beside the shards that may name the classes: a list, {"0": name} or {name: 0}; or one name per line."""

Label = int | str | None


@dataclass
class _Index:
    """What one shard holds, in the order of its members."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)


class TarSource(StoredSource):
    """Images in tar files: `KEY.jpg` with `KEY.cls` or `KEY.json` beside it, one after the other.

    A `.cls` holds the class's number or name as text; a `.json` holds it under label, cls, class, class_id or
    class_index, and may give the name under class_name. Without any, all images are one class. Numbers get their names
    from the json files, from a file classes.json or classes.txt beside the shards, or are their own names.

    Args:
        shards: The files.

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
        class_names, numbers = _classes(shards, labels, names, reference)
        super().__init__(shards.name, shards.split, class_names, np.asarray(numbers, np.int64), names)
        self.files = shards.files
        self._shard = np.repeat(np.arange(len(indices)), [len(index.names) for index in indices])
        self._offsets = np.concatenate([np.asarray(index.offsets, np.int64) for index in indices])
        self._sizes = np.concatenate([np.asarray(index.sizes, np.int64) for index in indices])

    def open(self, index: int) -> IO[bytes]:
        """A member, read from where it stands in its shard."""
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
    """A part of a file, as a file."""

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
            for key, members in _samples(archive):
                image = next((members[ext] for ext in (e[1:] for e in EXTENSIONS) if ext in members), None)
                if image is None:
                    continue
                if image.offset_data + image.size > size:
                    raise tarfile.ReadError(f"it ends within {image.name}")
                index.names.append(image.name.removeprefix("./"))
                index.offsets.append(image.offset_data)
                index.sizes.append(image.size)
                index.labels.append(_label(archive, key, members, index.class_names, path))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a whole tar file: {error}.", "Write or download it again.") from None
    return index


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
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
            yield str(current), members
            members = {}
        current = key
        members[extension.lower()] = member
    if members:
        yield str(current), members


def _label(
    archive: tarfile.TarFile,
    key: str,
    members: Mapping[str, tarfile.TarInfo],
    class_names: dict[int, str],
    path: Path,
) -> Label:
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


def _classes(
    shards: Shards, labels: Sequence[Label], names: Sequence[str], reference: Sequence[_Index]
) -> tuple[list[str], list[int]]:
    """Names of the classes, and each image's class."""
    kinds = {type(label) for label in labels}
    if kinds == {type(None)}:
        return [shards.files[0].resolve().parent.name], [0] * len(labels)
    if type(None) in kinds:
        odd = names[labels.index(None)]
        raise DataError(
            f"{shards.name}: {odd} has no class ({labels.count(None)} of {len(labels)} images have none).",
            "Give every image a .cls or a .json with a label, or none of them.",
        )
    if kinds == {int}:
        numbers = [label for label in labels if isinstance(label, int)]
        if min(numbers) < 0:
            raise DataError(f"{shards.name}: {names[int(np.argmin(numbers))]} has the class {min(numbers)}.")
        known = [label for index in reference for label in index.labels if isinstance(label, int)]
        count = max(numbers + known) + 1
        found = _class_file(shards, count)
        if found is None:
            merged = {number: name for index in reference for number, name in index.class_names.items()}
            found = [merged.get(number, str(number)) for number in range(count)]
        return found, numbers
    class_names = sorted({str(label) for index in reference for label in index.labels})
    positions = {name: position for position, name in enumerate(class_names)}
    unknown = next((str(label) for label in labels if str(label) not in positions), None)
    if unknown is not None:
        raise DataError(
            f"{shards.name}: class {unknown!r} is not among the {len(class_names)} classes of the split train."
            f" {nearest(unknown, class_names)}"
        )
    return class_names, [positions[str(label)] for label in labels]


def _class_file(shards: Shards, count: int) -> list[str] | None:
    folder = shards.files[0].parent
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
        names = [str(value).strip() for value in values]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} does not list class names: {error}.", "Write a JSON list of names.") from None
    if len(names) < count:
        raise DataError(f"{path} names {len(names)} classes; {shards.name} has images of class {count - 1}.")
    return names


def _nested_hint(path: Path) -> str | None:
    with tarfile.open(path, "r:") as archive:
        first = archive.next()
    if first is not None and first.name.lower().endswith(".tar"):
        return f"It holds further tar files ({first.name}, …): unpack them, one folder for each."
    return None
