"""Images within larger files: which files a name such as `train-{000..146}.tar` means, and what their labels mean."""

from __future__ import annotations

import glob
import itertools
import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mvar_core.data.decoding import EXTENSIONS
from mvar_core.data.folders import SPLITS, split_of
from mvar_core.data.sources import StoredSource, in_threads
from mvar_core.errors import DataError, nearest

Label = int | str | None

MOST_SHARDS = 100_000
MOST_CLASSES = 1_000_000
"""A label of a billion would ask for as many names of classes."""
MOST_IMAGES = 100_000_000

SUFFIXES = (".tar", ".parquet", ".arrow")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Shards:
    """The files of one split of a data set, all of one kind.

    Attributes:
        files: In the order in which their images count.
        name: What the user typed.
        reference: The files of the split train, whose classes count; those of this split where there is no other.
    """

    files: tuple[Path, ...]
    name: str
    split: str
    reference: tuple[Path, ...]

    def __post_init__(self) -> None:
        kinds = {_suffix(path.name) for path in self.files}
        if None in kinds:
            raise DataError(f"{self.name} names files that are not shards ({' '.join(SUFFIXES)}).")
        if len(kinds) > 1:
            found = ", ".join(sorted(map(str, kinds)))
            raise DataError(f"{self.name} holds several kinds of shards: {found}.", "Use one kind.")

    @property
    def suffix(self) -> str | None:
        """Which of `SUFFIXES` the files have."""
        return _suffix(self.files[0].name)


@dataclass
class ShardIndex:
    """What one file holds: names and labels of its images, in order, and names of classes by number."""

    names: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)


class ShardSource(StoredSource):
    """Images within larger files, which are indexed once.

    Labels are numbers or names; without any, all images are one class, which is called as the files' folder. Numbers
    are named by a list of all classes, else by what the files say, else they are their own names. The classes are those
    of the split train.

    Raises:
        DataError: No images, images with and without labels, a number below 0 or without a name, or a class that train
            lacks.
    """

    def __init__(self, shards: Shards):
        self.files = shards.files
        indices = list(in_threads(self.index, shards.files))
        names = [name for index in indices for name in index.names]
        if not names:
            raise DataError(f"{shards.name} holds no images ({' '.join(EXTENSIONS)}).")
        self._starts = np.cumsum([0, *(len(index.names) for index in indices)])
        class_names, labels = self._classes(shards, indices, names)
        super().__init__(shards.name, shards.split, class_names, labels, names)

    @abstractmethod
    def index(self, path: Path) -> ShardIndex:
        """Look through one file."""

    @abstractmethod
    def open(self, index: int) -> IO[bytes]:
        """The file of an image, open for reading."""

    def listed_names(self) -> Sequence[str] | None:
        """Names of all classes, if they are listed somewhere."""
        return None

    def place(self, index: int) -> tuple[int, int]:
        """Which file an image is in, and which of the file's images it is."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _classes(
        self, shards: Shards, indices: Sequence[ShardIndex], items: Sequence[str]
    ) -> tuple[Sequence[str], NDArray[np.int64]]:
        labels = [label for index in indices for label in index.labels]
        missing = labels.count(None)
        if missing == len(labels):
            folder = self.files[0].resolve().parent
            return [folder.parent.name if folder.name == "data" else folder.name], np.zeros(len(labels), np.int64)
        if missing:
            item = items[labels.index(None)]
            raise DataError(
                f"{shards.name}: {item} has no class ({missing} of {len(labels)} images have none).",
                "Give every image a label, or none of them.",
            )
        numbers = [label for label in labels if isinstance(label, int)]
        if len(numbers) < len(labels):
            known = sorted({str(label) for index in self._reference(shards, indices) for label in index.labels})
            positions = {name: position for position, name in enumerate(known)}
            for label in map(str, labels):
                if label not in positions:
                    raise DataError(
                        f"{shards.name}: class {label!r} is not among the {len(known)} classes of the split train."
                        f" {nearest(label, known)}"
                    )
            return known, np.asarray([positions[str(label)] for label in labels], np.int64)
        if min(numbers) < 0:
            raise DataError(
                f"{shards.name}: {items[numbers.index(min(numbers))]} has the class {min(numbers)}, which means none.",
                "Choose a split with labels, for example :val.",
            )
        if max(numbers) >= MOST_CLASSES:
            raise DataError(
                f"{shards.name}: {items[numbers.index(max(numbers))]} has the class {max(numbers)}; at most"
                f" {MOST_CLASSES:,} classes are supported.",
                "Number classes from 0.",
            )
        names = self.listed_names()
        if names is None:
            reference = self._reference(shards, indices)
            found = {number: name for index in reference for number, name in index.class_names.items()}
            known_numbers = [label for index in reference for label in index.labels if isinstance(label, int)]
            count = min(max(numbers + known_numbers) + 1, MOST_CLASSES)
            names = [found.get(number, str(number)) for number in range(count)]
        if max(numbers) >= len(names):
            raise DataError(f"{shards.name} has images of class {max(numbers)}, and names for {len(names)} classes.")
        return names, np.asarray(numbers, np.int64)

    def _reference(self, shards: Shards, indices: Sequence[ShardIndex]) -> Sequence[ShardIndex]:
        return indices if shards.reference == shards.files else list(in_threads(self.index, shards.reference))


def find_shards(name: str, split: str = "train") -> Shards | None:
    """The shards that `--data` names: one file, a pattern with braces or `*`, or a folder that holds shards.

    A folder's splits are its sub-folders train and test (or val), or a word of its files' names, as in
    `train-00000-of-00040.parquet`; files in a sub-folder `data` count as the folder's own.

    None where the name means something else.

    Raises:
        DataError: No such files, compressed ones, several kinds of them, or no such split.
    """
    path = Path(name).expanduser()
    if name.lower().endswith(_COMPRESSED):
        raise _compressed(name)
    if path.is_dir():
        return _of_folder(path, name, split)
    if not _suffix(name):
        return None
    files = [path]
    if not path.is_file():
        if path.exists():
            return None
        if not _BRACES.search(name) and not glob.has_magic(name):
            raise DataError(f"{name} does not exist.")
        files = []
        for expanded in expand_braces(str(path)):
            matches = sorted(map(Path, glob.glob(expanded))) if glob.has_magic(expanded) else [Path(expanded)]
            if not matches or not matches[0].is_file():
                raise DataError(f"{name} names {expanded}, which does not exist.")
            files += matches
    if split != "train":
        raise DataError(
            f"{name} has no split {split!r}: the name says which files to read.",
            "Name the files of that split, or their folder.",
        )
    return Shards(tuple(files), name, split, tuple(files))


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern with braces means: `a-{08..10}` is a-08, a-09, a-10; `{x,y}` is x, y.

    Raises:
        DataError: Braces that hold neither a range nor a list, or too many names.
    """
    names = [""]
    for position, piece in enumerate(_BRACES.split(pattern)):
        choices: Iterable[str] = [piece]
        count = 1
        if position % 2:  # what is inside of braces
            span = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", piece)
            choices = piece.split(",") if "," in piece else []
            count = len(choices)
            if span:
                first, last = int(span[1]), int(span[2])
                width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
                count = max(0, last + 1 - first)
                choices = (f"{number:0{width}d}" for number in range(first, last + 1))
            if not count:
                raise DataError(f"{pattern[:1000]}: {{{piece[:100]}}} is not a range.", "Write shard-{000..146}.tar.")
        if count * len(names) > MOST_SHARDS:
            raise DataError(f"{pattern[:1000]} names more than {MOST_SHARDS:,} files.", "Name those that exist.")
        names = [name + choice for name, choice in itertools.product(names, choices)]
    return names


def _of_folder(root: Path, name: str, split: str) -> Shards | None:
    folder = reference = root
    splits = {split_of(path.name): path for path in sorted(root.iterdir()) if path.is_dir() and _listed(path)}
    if splits.get("train") and not _listed(root):
        if split_of(split) not in splits:
            found = ", ".join(path.name for kind, path in splits.items() if kind)
            raise DataError(f"{name} has no split {split!r}; found {found}. {nearest(split, SPLITS)}")
        folder, reference = splits[split_of(split)], splits["train"]
    elif not _listed(root) and _listed(root / "data"):
        folder = reference = root / "data"
    files, known = _listed(folder), _listed(reference)
    if not files:
        return None
    if folder == reference:
        by_split: dict[str | None, list[Path]] = {}
        for path in files:
            by_split.setdefault(_split_of(path), []).append(path)
        if set(by_split) == {None}:
            by_split = {"train": files}
        kind = split_of(split)
        if kind not in by_split:
            words = ", ".join(sorted(word for word in by_split if word))
            raise DataError(f"{name} has no split {split!r}; found {words}. {nearest(split, SPLITS)}")
        files, known = by_split[kind], by_split.get("train", by_split[kind])
    return Shards(tuple(files), name, split, tuple(known))


def _listed(folder: Path) -> list[Path]:
    """The shards in a folder, sorted; none where images are next to them."""
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if any(name.lower().endswith(EXTENSIONS) for name in names):
        return []
    files = [folder / name for name in names if _suffix(name)]
    compressed = [name for name in names if name.lower().endswith(_COMPRESSED)]
    if compressed and not files:
        raise _compressed(str(folder / compressed[0]))
    return files


def _split_of(path: Path) -> str | None:
    """The split that a file's name speaks of: its last word that names one."""
    words = list(filter(None, map(split_of, re.split(r"[-_.]", path.name))))
    return words[-1] if words else None


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def _compressed(name: str) -> DataError:
    return DataError(
        f"{name} is compressed, so its images cannot be read one by one.",
        "Decompress it (for example `gunzip`); the images within are compressed already.",
    )
