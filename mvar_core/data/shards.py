"""Images within larger files: which files a name such as `train-{000..146}.tar` means, and what their labels mean."""

from __future__ import annotations

import glob
import itertools
import logging
import math
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvar_core.data.decoding import EXTENSIONS
from mvar_core.data.folders import are_splits, choose_split, is_visible, split_of
from mvar_core.data.sources import StoredSource, in_threads
from mvar_core.errors import DataError, nearest, shown
from mvar_core.untrusted import read_json

Label = int | str | None

MOST_SHARDS = 100_000
MOST_CLASSES = 1_000_000
"""A label of a billion would ask for as many names of classes."""

DATASET_DICT, STATE = "dataset_dict.json", "state.json"
"""Files by which `datasets` lists the splits of what it saves, and the files of each."""

IMAGE_KEY = ":image="
"""Separates the name of data from the suffix or column of the image to use, where samples have several."""

SUFFIXES = (".tar", ".parquet", ".arrow")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_CACHED = re.compile(r"cache-[0-9a-f]{16}.*\.arrow")
"""What `datasets` leaves next to its data: results of map, filter and shuffle."""

logger = logging.getLogger("mvar")


class Shards(NamedTuple):
    """The files of one split of a data set, all of one kind, in order.

    Attributes:
        name: What the user typed.
        reference: The files of the split train, whose classes count; None where the files are not divided into splits,
            so that folders within them may be.
    """

    files: list[Path]
    name: str
    split: str
    reference: list[Path] | None = None

    @property
    def suffix(self) -> str | None:
        """Which of `SUFFIXES` the files have."""
        return _suffix(self.files[0].name)


class Item(NamedTuple):
    """An image in a file: `path` is its name there in parts, `place` the position of the file and two numbers in it."""

    name: str
    label: Label
    place: tuple[int, int, int]
    path: tuple[str, ...] = ("",)
    caption: str | None = None


@dataclass
class Contents:
    """What files hold: images, names of classes that are numbers, and how much of what kind is no image."""

    items: list[Item] = field(default_factory=list)
    class_names: dict[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


class ShardSource(StoredSource):
    """Images within larger files, which are indexed once.

    Labels are numbers or names. Numbers are named by a list of all classes, else by what the files say; what one file
    numbers otherwise than the first is found by its name. The classes are those of the split train. Folders within the
    files are splits as they would be if unpacked and, without labels, classes; so are files of one class each
    (`cat.tar`, `dog.tar`). Otherwise images without labels are one class.

    Raises:
        DataError: No images, images with and without labels, a number below 0 or without a name, no such split, or a
            class that train lacks.
    """

    def __init__(self, shards: Shards, image_key: str | None = None):
        self.files, self.image_key = shards.files, image_key and image_key.lower().removeprefix(".")
        every = self._contents(shards, shards.reference or shards.files, {})
        images = train = every.items
        if shards.reference is None:
            images, train = _inner_split(shards, images)
        elif shards.reference != shards.files:
            every = self._contents(shards, shards.files, every.class_names)
            images = every.items
        if all(item.label is None for item in images):
            within_train, train = images is train, _by_folder(shards, train)
            images = train if within_train else _by_folder(shards, images, {item.label for item in train})
        class_names, labels = self._classes(shards, images, train, every.class_names)
        self.places = np.asarray([item.place for item in images], np.int64)  # (N, 3)
        self._captions = [item.caption for item in images]
        super().__init__(shards.name, shards.split, class_names, labels, [item.name for item in images])

    @abstractmethod
    def index(self, path: Path, number: int) -> Contents:
        """Look through one file, which is at position `number`."""

    def listed_names(self) -> Sequence[str] | None:
        """Names of all classes, if they are listed somewhere."""
        return None

    def captions(self) -> Sequence[str] | None:
        """See `ImageSource.captions`."""
        missing = [name for name, caption in zip(self.item_names, self._captions, strict=True) if not caption]
        if missing and len(missing) < len(self):
            hint = "Give every image a caption, or none."
            raise DataError(f"{self.name}: {missing[0]} has no caption ({len(missing)} of {len(self)}).", hint)
        return None if missing else [str(caption) for caption in self._captions]

    def _contents(self, shards: Shards, files: Sequence[Path], known: Mapping[int, str]) -> Contents:
        """What some files hold, with classes numbered as in `known`, else as in the first file that names them."""
        every = Contents(class_names=dict(known))
        for number, found in enumerate(in_threads(lambda pair: self.index(pair[1], pair[0]), enumerate(files))):
            renumbered: dict[Label, int] = {}
            for label, name in found.class_names.items():
                if every.class_names.setdefault(label, name) != name:
                    same = [other for other, called in every.class_names.items() if called == name]
                    if len(same) != 1:
                        raise DataError(
                            f"{files[number]} calls class {label} {shown(name)}, which is"
                            f" {shown(every.class_names[label])} in the files before it.",
                            "Write all files with the same list of classes.",
                        )
                    renumbered[label] = same[0]
            if renumbered:
                found.items = [each._replace(label=renumbered.get(each.label, each.label)) for each in found.items]
            every.items += found.items
            every.left_out += found.left_out
        if every.left_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in every.left_out.most_common(8))
            logger.warning("%s: left out: %s.", shards.name, kinds)
        if not every.items:
            kind = f"called {self.image_key}" if self.image_key else f"({' '.join(EXTENSIONS)})"
            raise DataError(f"{shards.name} holds no images {kind}.")
        return every

    def _classes(
        self, shards: Shards, images: Sequence[Item], train: Sequence[Item], called: Mapping[int, str]
    ) -> tuple[Sequence[str], NDArray[np.int64]]:
        labels, others = [item.label for item in images], {item.label for item in train} - {None}

        def refused(label: Label, problem: str, hint: str | None = None) -> DataError:
            return DataError(f"{shards.name}: {images[labels.index(label)].name} {problem}.", hint)

        missing = labels.count(None)
        if missing == len(labels):
            if others:
                logger.warning("%s: the images of the split %s have no classes.", shards.name, shards.split)
            if any(item.caption for item in images):
                logger.info("%s has captions and no classes; `mvar tokenize --words` uses them.", shards.name)
            folder = self.files[0].resolve().parent
            name = _within(images if others else train)[0] or (folder.parent if folder.name == "data" else folder).name
            return [name], np.zeros(len(labels), np.int64)
        if missing:
            hint = "Give every image a label, or none of them."
            raise refused(None, f"has no class ({missing} of {len(labels)} images have none)", hint)
        numbers = [label for label in labels if isinstance(label, int)]
        if len(numbers) == len(labels) and not any(isinstance(label, str) for label in others):
            for number in (min(numbers), max(numbers)):
                if not 0 <= number < MOST_CLASSES:
                    problem = f"has the class {number}; expected 0 to {MOST_CLASSES - 1:,} (a negative one means none)"
                    raise refused(number, problem, "Label it, or choose another split.")
            names = self.listed_names()
            if names is None:
                last = max(label for label in (*numbers, *others, *called) if isinstance(label, int))
                names = [called.get(number, str(number)) for number in range(min(last + 1, MOST_CLASSES))]
            if max(numbers) >= len(names):
                raise refused(max(numbers), f"is of class {max(numbers)}; there are names for {len(names)} classes")
            return names, np.asarray(numbers, np.int64)

        def name_of(label: Label) -> str:
            return called.get(label, str(label)) if isinstance(label, int) else str(label)

        known = sorted(set(map(name_of, others)))
        positions = {name: position for position, name in enumerate(known)}
        for label in labels:
            if (name := name_of(label)) not in positions:
                problem = f"is of class {name!r}, which is not among the {len(known)} classes of the split train"
                raise refused(label, problem, nearest(name, known))
        return known, np.asarray([positions[name_of(label)] for label in labels], np.int64)


def call(names: dict[int, str], number: int, name: str, where: str) -> None:
    """Note what a class is called; DataError where it was called something else before."""
    if (known := names.setdefault(number, name)) != name:
        raise DataError(f"{where}: class {number} is called {shown(name)} here and {shown(known)} before.",
                        "Correct one of the names.")  # fmt: skip


def as_label(value: Any, where: str, numbers: bool = False) -> Label:
    """A class's number or name as a file holds it; with `numbers` a text of figures is a number.

    Raises:
        DataError: Several values, or none that can be a class.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    text = value.strip() if isinstance(value, str) else ""
    if "\n" in text or not isinstance(value, str):
        raise DataError(f"{where}: the label is {shown(value)}; expected one number or one name.")
    return int(text) if numbers and len(text) < 20 and text.removeprefix("-").isdecimal() else text or None


def _within(images: Sequence[Item], classes: Collection[Label] = ()) -> tuple[str | None, list[tuple[str, ...]]]:
    """The last of the folders that all images are in and that is no class, and the paths of the images within it."""
    low, high = min(item.path[:-1] for item in images), max(item.path[:-1] for item in images)
    levels = enumerate(zip(low, high, strict=False))  # what these two share, all do
    depth = next((depth for depth, (one, other) in levels if one != other or one in classes), min(len(low), len(high)))
    return low[depth - 1] if depth else None, [item.path[depth:] for item in images]


def _inner_split(shards: Shards, images: list[Item]) -> tuple[list[Item], list[Item]]:
    """The images of a split and those of train, where folders within the files are splits; else all of them, twice."""
    paths = _within(images)[1]
    inside: dict[str, set[str]] = {}
    for path in paths:
        if len(path) > 1:
            inside.setdefault(path[0], set()).update(path[1:-1][:1])
    splits = are_splits(shards.name, inside)
    if not splits and split_of(shards.split) == "train":
        return images, images
    split, reference = choose_split(shards.name, splits, shards.split)
    chosen = _in_folder(images, paths, split)
    return chosen, chosen if split == reference else _in_folder(images, paths, reference)


def _in_folder(images: list[Item], paths: Sequence[tuple[str, ...]], folder: str) -> list[Item]:
    """The images in a folder, with their paths within it if it has sub-folders."""
    inside = [(item, path[1:]) for item, path in zip(images, paths, strict=True) if len(path) > 1 and path[0] == folder]
    divided = any(len(path) > 1 for _, path in inside)
    return [item._replace(path=path) if divided else item for item, path in inside]


def _by_folder(shards: Shards, images: list[Item], classes: Collection[Label] = ()) -> list[Item]:
    """Images without labels, labelled with the folder or the file that each is in; unchanged where all are in one.

    Files that differ in more than a number, or are called by WordNet ids, hold a class each.
    """
    paths = _within(images, classes)[1]
    inside = [item._replace(label=path[0]) for item, path in zip(images, paths, strict=True) if len(path) > 1]
    if not inside:
        files = [item.name.partition("/")[0].partition(".")[0] for item in images]
        kinds = {file if re.fullmatch(r"n\d{8}", file) else re.sub(r"\d", "", file) for file in files}
        if not len(kinds) == len(set(files)) > 1:
            return images
        return [item._replace(label=file) for item, file in zip(images, files, strict=True)]
    loose = [item.name for item, path in zip(images, paths, strict=True) if len(path) == 1]
    if len(loose) > len(inside):
        raise DataError(
            f"{shards.name} holds {len(loose)} images ({loose[0]}, …) next to {len(inside)} in folders"
            f" ({inside[0].name}, …), so its classes are not clear.",
            "Put every image into its class's folder, or all of them into one.",
        )
    if loose:
        logger.warning("%s: left out: %d images next to folders (%s, …).", shards.name, len(loose), loose[0])
    return inside


def find_shards(name: str, split: str = "train") -> Shards | None:
    """The shards that `--data` names: one file, a pattern with braces or `*`, or a folder that holds shards.

    A folder's splits are what `datasets` lists when it saves a data set, sub-folders called as splits, or a word of the
    files' names, as in `train-00000-of-00040.parquet`. Shards in its only sub-folder count as the folder's own.

    None where the name means something else.

    Raises:
        DataError: No such files, compressed ones, several kinds of them, or no such split.
    """
    path = Path(name).expanduser()
    if name.lower().endswith(_COMPRESSED):
        raise _compressed(name)
    if path.is_dir():
        groups = _by_split(path)
        if not groups:
            return None
        if set(groups) == {""}:
            return _of_one_kind(Shards(groups[""], name, split))
        other = groups.pop("", [])
        chosen, train = choose_split(name, list(groups), split)
        if other:
            logger.warning("%s: left out: %d files of no split (%s, …).", name, len(other), other[0].name)
        return _of_one_kind(Shards(groups[chosen], name, split, groups[train]))
    if not _suffix(name):
        return None
    if path.exists() and not path.is_file():
        return None
    files = [path] if path.is_file() else []
    for expanded in () if files else expand_braces(str(path)):
        matches = sorted(map(Path, glob.glob(expanded))) if glob.has_magic(expanded) else [Path(expanded)]
        if not matches or not matches[0].is_file():
            raise DataError(f"{name}: {expanded} does not exist.", "Name files that exist.")
        files += matches
    return _of_one_kind(Shards(files, name, split))


def _of_one_kind(shards: Shards) -> Shards:
    kinds = {_suffix(path.name) or path.suffix for path in shards.files}
    if len(kinds) > 1 or not kinds <= {*SUFFIXES}:
        problem = f"{shards.name} names files of the kinds {', '.join(sorted(kinds))}."
        raise DataError(problem, f"Use files of one kind: {' '.join(SUFFIXES)}.")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern with braces means: `a-{08..10}` is a-08, a-09, a-10; `{x,y}` is x, y.

    Raises:
        DataError: Braces that hold neither a range nor a list, or too many names.
    """
    names = [""]
    for position, piece in enumerate(_BRACES.split(pattern)):
        choices: Sequence[str] | range = [piece]
        width = 0
        if position % 2:  # what is inside of braces
            choices = piece.split(",") if "," in piece else []
            if span := re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", piece):
                choices = range(int(span[1]), int(span[2]) + 1)
                width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
            if not choices:
                raise DataError(f"{pattern[:1000]}: {{{piece[:100]}}} is not a range.", "Write shard-{000..146}.tar.")
        if len(choices) * len(names) > MOST_SHARDS:
            raise DataError(f"{pattern[:1000]} names more than {MOST_SHARDS:,} files.", "Name those that exist.")
        texts = [f"{choice:0{width}d}" if isinstance(choice, int) else choice for choice in choices]
        names = [name + text for name, text in itertools.product(names, texts)]
    return names


def _by_split(folder: Path, depth: int = 3) -> dict[str, list[Path]]:
    """The shards in a folder by the word that names their split, "" where none does; none next to images."""
    if (folder / DATASET_DICT).is_file():
        return {word: _listed(folder / word) for word in _names_in(folder / DATASET_DICT, "splits")}
    names = sorted(entry.name for entry in folder.iterdir() if is_visible(entry.name))
    if any(name.lower().endswith(EXTENSIONS) for name in names):
        return {}
    folders = {name: folder / name for name in names if (folder / name).is_dir()}
    here = _listed(folder)
    if inside := {name: files for name, path in folders.items() if split_of(name) and (files := _listed(path))}:
        return inside | ({"": here} if here else {})
    groups: dict[str, list[Path]] = {}
    for path in here:  # the last word that names a split
        words = [word for word in re.split(r"[-_.]", path.name.lower()) if split_of(word)]
        groups.setdefault(words[-1] if words and not (folder / STATE).is_file() else "", []).append(path)
    return groups if here or len(folders) != 1 or not depth else _by_split(next(iter(folders.values())), depth - 1)


def _listed(folder: Path) -> list[Path]:
    """The shards in a folder, sorted, or those that `datasets` says are its own; none where images are next to them."""
    if (folder / STATE).is_file():
        return [folder / name for name in _names_in(folder / STATE, "_data_files")]
    names = sorted(entry.name for entry in folder.iterdir() if is_visible(entry.name)) if folder.is_dir() else []
    if any(name.lower().endswith(EXTENSIONS) for name in names):
        return []
    files = [folder / name for name in names if _suffix(name) and not _CACHED.fullmatch(name)]
    compressed = [name for name in names if name.lower().endswith(_COMPRESSED)]
    if compressed and not files:
        raise _compressed(str(folder / compressed[0]))
    return files


def _names_in(path: Path, key: str) -> list[str]:
    """What a file of `datasets` lists: names of files or folders next to it."""
    values = read_json(path, finite=False)
    listed = values.get(key) if isinstance(values, dict) else None
    found = [
        each.get("filename") if isinstance(each, dict) else each
        for each in (listed if isinstance(listed, list) else ())
    ]
    names = [name for name in found if isinstance(name, str) and Path(name).name == name]
    if not names or len(names) < len(found):
        raise DataError(f"{path} does not list {key} in its folder.", "Write or download the data set again.")
    if any(values[each] for each in values if each.startswith("_indices")):
        raise DataError(
            f"{path}: rows of the data set are chosen or ordered by further files, which is not supported.",
            "Save it as a whole: `datasets.load_from_disk(A).flatten_indices().save_to_disk(B)`, in the version of"
            " `datasets` that wrote it.",
        )
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise DataError(f"{path} lists {missing[0]}, which does not exist.", "Write or download the data set again.")
    return names


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def _compressed(name: str) -> DataError:
    return DataError(
        f"{name} is compressed, so its images cannot be read one by one.",
        "Decompress it (for example `gunzip`); the images within are compressed already.",
    )
