"""Tar shards as webdataset defines them: members are indexed once, then read at their offsets in any order."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mvar_core.classes import names_in
from mvar_core.data.decoding import EXTENSIONS, LARGEST_FILE
from mvar_core.data.folders import is_visible
from mvar_core.data.shards import IMAGE_KEY, Contents, Item, Label, ShardSource, as_label, call
from mvar_core.errors import DataError, one_line
from mvar_core.untrusted import open_regular, parse_json

LARGEST_TEXT = 2**24
"""Bytes of a label or caption, or of a header."""
LABEL_KEYS = ("label", "cls", "class", "class_index", "class_id")
NAME_KEYS = ("class_name", "label_name", "class")
CLASS_FILES = ("classes.json", "class_names.json", "classes.txt", "class_names.txt")
"""Files next to the shards that may name the classes."""

logger = logging.getLogger("mvar")


@dataclass
class _Sample:
    """What the members of a key hold: the image's name, parts of it and place; the .cls; what the .json says."""

    __slots__ = ("caption", "cls", "image", "label", "name", "other")
    image: tuple[str, tuple[str, ...], tuple[int, int, int]] | None
    cls: Label
    label: Label
    name: str | None
    caption: str | None
    other: str


class TarSource(ShardSource):
    """Images in tar files: `KEY.jpg`, and `KEY.cls`, `KEY.json` or `KEY.txt` anywhere in the same file.

    A key is a member's path up to the first dot of its file name. A `.cls` holds the class's number or name; a `.json`
    holds it under label, cls, class, class_index or class_id, and its name under class_name. Where both are there the
    `.cls` decides, and a `.json` that contradicts it is refused. A file classes.json or classes.txt next to the shards
    lists names. A `.txt` is a caption, as is "caption" in a `.json`.
    """

    def index(self, path: Path, number: int) -> Contents:
        """Read the headers of a shard's members, and the texts; images are skipped."""
        samples: dict[str, _Sample] = {}
        contents = Contents()
        nested = None
        try:
            with open_regular(path) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as archive:
                for member in _members(archive, file, path):
                    parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
                    if member.isdir() or not parts or not all(map(is_visible, parts)):
                        continue
                    if not member.isfile() or member.issparse():
                        contents.left_out["links"] += 1
                        continue
                    stem, _, suffix = parts[-1].partition(".")
                    suffix, key = suffix.lower(), "/".join((*parts[:-1], stem))
                    sample = samples.setdefault(key, _Sample(None, None, None, None, None, ""))
                    kind = suffix.rpartition(".")[2]
                    if suffix == self.image_key or (self.image_key is None and f".{kind}" in EXTENSIONS):
                        if sample.image is not None:
                            raise DataError(
                                f"{path} holds {sample.image[0]} and {member.name}, two images of one sample: its key"
                                " ends at the first dot of the file name.",
                                f"Choose one, as in {path}{IMAGE_KEY}{suffix}; or rename them: a key holds no dot.",
                            )
                        sample.image = (member.name, tuple(parts), (number, member.offset_data, member.size))
                    elif kind in ("cls", "json", "txt"):
                        _read_text(sample, kind, archive, member, f"{path}: {member.name}")
                    else:
                        sample.other = suffix or "(no suffix)"
                        nested = nested or (member.name if suffix == "tar" else None)
        except DataError:
            raise
        except Exception as error:  # whatever a damaged header makes of the reader
            problem = f"{path} is not a whole tar file: {one_line(error)[:300]}."
            raise DataError(problem, "Write or download it again.") from None
        for sample in samples.values():
            if sample.image is None:
                contents.left_out[f".{sample.other}" if sample.other else "labels or captions without an image"] += 1
                continue
            member_name, within, place = sample.image
            item_name = f"{path.name}/{member_name.removeprefix('./')}"
            name = sample.name or (sample.label if isinstance(sample.label, str) else None)
            label = next((each for each in (sample.cls, sample.label, name) if each is not None), None)
            if isinstance(label, int) and name:
                call(contents.class_names, label, name, f"{path}: {member_name}")
            contents.items.append(Item(item_name, label, place, within, sample.caption))
        if nested and not contents.items:
            hint = f"It holds further tar files ({nested}, …): unpack it, and name the folder of those."
            raise DataError(f"{path} holds no images.", hint)
        return contents

    def open(self, index: int) -> IO[bytes]:
        """A member, read at its offset in its shard."""
        file, offset, size = self.places[index].tolist()
        if size > LARGEST_FILE:
            raise DataError(f"{self.where(index)} has {size:,} bytes; at most {LARGEST_FILE:,} are read.")
        with self.files[file].open("rb") as content:
            content.seek(offset)
            return io.BytesIO(content.read(size))

    def where(self, index: int) -> str:
        """Path of the shard, and the member's name."""
        path = self.files[self.places[index, 0]]
        return f"{path}: {self.item_names[index][len(path.name) + 1 :]}"

    def item_bytes(self, index: int) -> int:
        """Size of the member."""
        return int(self.places[index, 2])

    def listed_names(self) -> Sequence[str] | None:
        """Names of classes from a file next to the shards."""
        paths = (self.files[0].parent / name for name in CLASS_FILES)
        path = next(filter(Path.is_file, paths), None)
        return None if path is None else names_in(path)


class _Headers(io.RawIOBase):
    """A tar file for indexing: what a header claims to be long is not read into memory."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.seek, self.tell = file.seek, file.tell  # type: ignore[method-assign]

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_TEXT:
            raise tarfile.ReadError(f"a header or label of {size:,} bytes")
        return self._file.read(size)


def _members(archive: tarfile.TarFile, file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a file that is whole, up to the end that it marks."""
    size, place = file.seek(0, 2), -1
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every member that it has seen
        if member.size < 0 or member.offset <= place:  # it would lead back, for ever
            raise tarfile.ReadError(f"{member.name!r:.100} has {member.size} bytes")
        if member.isreg() and member.offset_data + member.size > size:
            raise tarfile.ReadError(f"it ends within {member.name}")
        place = member.offset
        yield member
    file.seek(archive.offset)  # where tarfile found no further member
    if not (block := file.read(tarfile.BLOCKSIZE)):
        logger.warning("%s has no mark at its end: should it be cut short, images are missing.", path)
    while block:
        if block.strip(b"\0"):
            raise DataError(
                f"{path} holds something else than a member at byte {archive.offset:,}, so what follows would be lost.",
                "Write or download it again; `tar --ignore-zeros -xf` unpacks files that were joined into one.",
            )
        block = file.read(1 << 20)


def _read_text(sample: _Sample, kind: str, archive: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> None:
    """Note what a .cls, .json or .txt says about its sample."""
    file = archive.extractfile(member)
    assert file is not None
    try:
        if member.size > LARGEST_TEXT:
            raise ValueError
        text = file.read(member.size).decode("utf-8-sig").strip()
    except ValueError:
        raise DataError(f"{where} is not a label or a caption ({member.size:,} bytes).") from None
    if kind == "txt":
        sample.caption = text
    elif kind == "cls":
        sample.cls = _agreed(as_label(text, where, numbers=True), sample.cls, where)
    elif isinstance(values := parse_json(text, where, finite=False), dict):
        for key in LABEL_KEYS if set(LABEL_KEYS[:3]).isdisjoint(values) else LABEL_KEYS[:3]:
            label = as_label(values.get(key), where, numbers=True)
            sample.label = label if sample.label is None else _agreed(sample.label, label, where)
        sample.name = next((values[key] for key in NAME_KEYS if isinstance(values.get(key), str)), sample.name)
        if sample.caption is None and isinstance(values.get("caption"), str):
            sample.caption = values["caption"]
    _agreed(sample.cls, sample.label, where)


def _agreed(first: Label, second: Label, where: str) -> Label:
    """The first of two labels of a sample that does not contradict the other; a number and a name never do."""
    if None not in (first, second) and first != second and isinstance(first, str) == isinstance(second, str):
        raise DataError(f"{where} contradicts another label of its sample: {first!r:.200} and {second!r:.200}.",
                        "Correct or remove one of them.")  # fmt: skip
    return second if first is None else first
