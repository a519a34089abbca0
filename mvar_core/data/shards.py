"""Which files a name such as `train-{000..146}.tar` stands for, which a split has, and what their labels mean."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mvar_core.data.decoding import EXTENSIONS
from mvar_core.data.folders import SPLIT_FOLDERS, split_folder
from mvar_core.errors import DataError, nearest

Kind = Literal["tar", "parquet", "arrow"]
Label = int | str | None

_KINDS: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "val": "val", "valid": "val", "dev": "val"}
_SPLIT_WORDS |= {"validation": "validation"}


@dataclass(frozen=True)
class Shards:
    """The files of one split of a data set.

    Attributes:
        files: In the order in which their images count.
        name: What the user typed.
        reference: The files of the split train, whose classes count; those of this split where there is no other.
    """

    kind: Kind
    files: tuple[Path, ...]
    name: str
    split: str
    reference: tuple[Path, ...]


def find_shards(name: str, split: str = "train") -> Shards | None:
    """The shards that `--data` names: one file, a pattern with braces or `*`, or a folder that holds shards.

    A folder's splits are its sub-folders train and test (or val), or a word of its files' names, as in
    `train-00000-of-00040.parquet`; files in a sub-folder `data` count as the folder's own.

    None where the name stands for something else.

    Raises:
        DataError: No such files, compressed ones, several kinds of them, or no such split.
    """
    path = Path(name).expanduser()
    if name.lower().endswith(_COMPRESSED):
        raise _compressed(name)
    if path.is_dir():
        return _of_folder(path, name, split)
    is_pattern = bool(_BRACES.search(name)) or glob.has_magic(name)
    if not path.exists() and is_pattern and _suffix(name):
        files = _matching(str(path), name)
    elif _suffix(name) and (path.is_file() or not path.exists()):
        if not path.exists():
            raise DataError(f"{name} does not exist.")
        files = [path]
    else:
        return None
    if split != "train":
        raise DataError(
            f"{name} has no split {split!r}: the name says which files to read.",
            "Name the files of that split, or their folder.",
        )
    return Shards(_kind(files, name), tuple(files), name, split, tuple(files))


def number_classes(
    shards: Shards,
    labels: Sequence[Label],
    items: Sequence[str],
    reference: Callable[[], Sequence[Label]],
    names: Sequence[str] | None,
    some_names: Mapping[int, str],
) -> tuple[Sequence[str], NDArray[np.int64]]:
    """Names of the classes, and each image's class as their position.

    Labels are numbers or names; None for all images makes one class. `items` are the images' names in messages, and
    `reference` finds the labels of the split train, whose classes count. Numbers are named by `names`, where something
    lists all of them, or by `some_names`; others are their own names.

    Raises:
        DataError: Images with and without labels, a number below 0 or without a name, or a class that train lacks.
    """
    missing = sum(label is None for label in labels)
    if missing == len(labels):
        folder = shards.files[0].resolve().parent
        return [folder.parent.name if folder.name == "data" else folder.name], np.zeros(len(labels), np.int64)
    if missing:
        item = items[list(labels).index(None)]
        raise DataError(
            f"{shards.name}: {item} has no class ({missing} of {len(labels)} images have none).",
            "Give every image a label, or none of them.",
        )
    if all(isinstance(label, int) for label in labels):
        numbers = np.asarray(labels, np.int64)
        if numbers.min() < 0:
            raise DataError(
                f"{shards.name}: {items[int(numbers.argmin())]} has the class {numbers.min()}, which stands for none.",
                "Choose a split with labels, for example :val.",
            )
        if names is None:
            count = max(int(numbers.max()), *(label for label in reference() if isinstance(label, int))) + 1
            names = [some_names.get(number, str(number)) for number in range(count)]
        if numbers.max() >= len(names):
            raise DataError(f"{shards.name} has images of class {numbers.max()}, and names for {len(names)} classes.")
        return names, numbers
    names = sorted(set(map(str, reference())))
    positions = {name: position for position, name in enumerate(names)}
    unknown = next((str(label) for label in labels if str(label) not in positions), None)
    if unknown is not None:
        raise DataError(
            f"{shards.name}: class {unknown!r} is not among the {len(names)} classes of the split train."
            f" {nearest(unknown, names)}"
        )
    return names, np.asarray([positions[str(label)] for label in labels], np.int64)


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern with braces means: `a-{08..10}` is a-08, a-09, a-10; `{x,y}` is x, y.

    Raises:
        DataError: Braces that hold neither a range nor a list.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    inside = found[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        first, last = int(span[1]), int(span[2])
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in inside:
        choices = inside.split(",")
    else:
        choices = []
    if not choices:
        raise DataError(f"{pattern}: {{{inside}}} is no range.", "Write for example shard-{000..146}.tar.")
    tails = expand_braces(pattern[found.end() :])
    return [pattern[: found.start()] + choice + tail for choice, tail in itertools.product(choices, tails)]


def _matching(pattern: str, name: str) -> list[Path]:
    files: list[Path] = []
    for expanded in expand_braces(pattern):
        if glob.has_magic(expanded):
            matches = sorted(map(Path, glob.glob(expanded)))
        else:
            matches = [Path(expanded)] if Path(expanded).is_file() else []
        if not matches:
            raise DataError(f"{name} names {expanded}, which does not exist.")
        files += matches
    return files


def _of_folder(root: Path, name: str, split: str) -> Shards | None:
    folders: Sequence[Path] = (root, root)
    if any((root / sub).is_dir() for sub in SPLIT_FOLDERS["train"]):
        try:
            folders = split_folder(root, split)
        except DataError:
            folders = (root, root)
    elif not _listed(root) and _listed(root / "data"):
        folders = (root / "data", root / "data")
    files, reference = (_listed(folder) for folder in folders)
    if not files:
        return None
    if folders[0] == folders[1]:
        by_split = {word: [path for path in files if _split_of(path) == word] for word in set(map(_split_of, files))}
        if set(by_split) == {None}:
            by_split = {"train": files}
        found = next((word for word in SPLIT_FOLDERS.get(split, ()) if by_split.get(word)), None)
        if found is None:
            known = ", ".join(sorted(word for word in by_split if word))
            raise DataError(f"{name} has no split {split!r}; found {known}. {nearest(split, SPLIT_FOLDERS)}")
        files, reference = by_split[found], by_split.get("train") or by_split[found]
    return Shards(_kind(files, name), tuple(files), name, split, tuple(reference))


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
    words = [_SPLIT_WORDS[word] for word in re.split(r"[-_.]", path.name.lower()) if word in _SPLIT_WORDS]
    return words[-1] if words else None


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in _KINDS if name.lower().endswith(suffix)), None)


def _kind(files: Sequence[Path], name: str) -> Kind:
    kinds = {_suffix(path.name) for path in files}
    if len(kinds) > 1:
        raise DataError(f"{name} holds several kinds of shards: {', '.join(sorted(map(str, kinds)))}.", "Use one kind.")
    suffix = kinds.pop()
    if suffix is None:
        raise DataError(f"{name} names files that are not shards ({' '.join(_KINDS)}).")
    return _KINDS[suffix]


def _compressed(name: str) -> DataError:
    return DataError(
        f"{name} is compressed, so its images cannot be read one by one.",
        "Decompress it (for example `gunzip`); the images within are compressed already.",
    )
