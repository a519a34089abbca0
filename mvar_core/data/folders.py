"""Folders of image files: their splits, their classes, their images."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import IO

import numpy as np

from mvar_core.data.decoding import EXTENSIONS
from mvar_core.data.sources import StoredSource
from mvar_core.errors import DataError, nearest
from mvar_core.untrusted import open_regular, read_text

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "validate", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}
"""How the name of a split may be spelled, in any case."""

JUNK = {"@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
"""What file servers and systems leave in folders, besides what is hidden and __MACOSX."""

FILES_OF_SAMPLES = ("classes.json", "tokens.npz")
"""What `mvar sample` writes next to its images."""
ANNOTATIONS = "val_annotations.txt"
"""In Tiny ImageNet's split val, which has no class folders: name and class of each image, and a box."""

logger = logging.getLogger("mvar")


def split_of(word: str) -> str | None:
    """The split that a word means, one of `SPLITS`; None for other words."""
    return next((split for split, words in SPLITS.items() if word.casefold() in words), None)


def split_name(source: str, split: str = "train") -> tuple[str, str]:
    """Name and split of `digits:test` or `folder:valid`; without a split at its end, the split is `split`."""
    name, colon, last = source.rpartition(":")
    if colon and name and split_of(last) and not Path(source).exists():
        return name, last.casefold()
    return source, split


class FolderSource(StoredSource):
    """Images in one sub-folder per class (classes in alphabetical order), or all in one folder, which is one class.

    Sub-folders of a class folder belong to the class. Hidden files, files of other kinds, folders without images, and
    images next to class folders are left out, and a warning counts them. Of a folder that is divided into splits (see
    `find_splits`), the images are those of one split, and the classes those of train.
    """

    def __init__(self, root: Path, split: str = "train", name: str | None = None):
        if split_of(split) is None:
            raise DataError(f"There is no split {split!r}. {nearest(split, SPLITS)}")
        if not root.is_dir():
            found = "is a file; expected a folder of images." if root.exists() else "does not exist."
            raise DataError(f"{root} {found}", "Specify a folder of images, or `digits` for the bundled data.")
        self.folder = reference = root
        splits = find_splits(root)
        if splits or split_of(split) != "train":
            self.folder, reference = (root / name for name in choose_split(str(root), splits, split))
        known = classes = find_classes(self.folder)
        if reference != self.folder:
            known = find_classes(reference, warn=False)
            if _is_flat(self.folder, classes) and _is_flat(reference, known):
                classes = known = dict(zip(known, classes.values(), strict=True))
            elif _is_flat(self.folder, classes):
                known = classes
                logger.warning("%s is not divided into classes: its images are one class, %s.", self.folder, *classes)
        for missing in classes.keys() - known.keys():
            raise DataError(
                f"{self.folder}: class {missing!r} is not among the {len(known)} classes of {reference}."
                f" {nearest(missing, known)}"
            )
        numbers = {class_name: number for number, class_name in enumerate(known)}
        labels = [numbers[class_name] for class_name, files in classes.items() for _ in files]
        items = [file for files in classes.values() for file in files]
        super().__init__(name or str(root), split, list(known), np.asarray(labels, np.int64), items)

    def item_bytes(self, index: int) -> int:
        """Size of the image's file; 0 where it cannot be told, which reading the image will explain."""
        try:
            return (self.folder / self.item_names[index]).stat().st_size
        except OSError:
            return 0

    def open(self, index: int) -> IO[bytes]:
        """The file of an image, open for reading."""
        return open_regular(self.folder / self.item_names[index])

    def where(self, index: int) -> str:
        """The file's path."""
        return str(self.folder / self.item_names[index])


def find_splits(root: Path) -> list[str]:
    """Names of the sub-folders that are splits; none where they are classes, or no sub-folder has such a name.

    They are splits where two of them have sub-folders of the same name, or where no other sub-folder holds images.
    """
    folders, files = _contents(root)
    if not any(map(split_of, folders)):
        return []
    with_images = [name for name in folders if any(map(_is_image, _walk(root, name)))]
    inside = {name: _contents(root / name)[0] if split_of(name) else [] for name in with_images}
    return are_splits(str(root), inside, list(filter(_is_image, files)))


def are_splits(where: str, inside: Mapping[str, Collection[str]], loose: Sequence[str] = ()) -> list[str]:
    """Which of several folders with images are splits, by the names of the folders within each, see `find_splits`.

    `loose` are images next to these folders.
    """
    named = [name for name in inside if split_of(name)]
    others = [name for name in inside if name not in named]
    if any(set(inside[one]) & set(inside[other]) for one, other in combinations(named, 2)):
        if others or loose:
            logger.warning("%s is divided into splits; left out: images in %s.", where, few([*others, *loose]))
        return named
    if others and len(named) > 1:
        logger.warning("%s: %s are counted as classes, since %s is one.", where, few(named), others[0])
    return named if not others and (len(named) > 1 or any(inside.values())) else []


def choose_split(where: str, splits: Sequence[str], split: str) -> tuple[str, str]:
    """The one of a data set's splits, as it spells them, that is asked for, and the one that is train.

    Where there is no train, the classes are those of the split itself. DataError for none, or several.
    """
    same = [name for name in splits if name.casefold() == split.casefold()]
    chosen = same or [name for name in splits if split_of(name) == split_of(split)]
    if len(chosen) != 1:
        problem = f"has {len(chosen)} splits {few(chosen)}" if chosen else f"has no split {split!r}"
        found = f"is divided into {few(splits)}" if splits else "is not divided into splits"
        raise DataError(f"{where} {problem}: it {found}.", f"Use {':'.join((where, *(chosen or splits)[:1]))}.")
    if split_of(split) == "train" and len(splits) > 1:
        others = few([f"{where}:{name}" for name in splits if name != chosen[0]])
        logger.info("%s is divided into splits; %s is used. The others: %s.", where, chosen[0], others)
    return chosen[0], next((name for name in splits if split_of(name) == "train"), chosen[0])


def find_classes(folder: Path, warn: bool = True) -> dict[str, list[str]]:
    """The images of each class, as paths relative to a folder; what is left out is logged.

    DataError for none, more of them next to class folders than in them, or one that Tiny ImageNet's list lacks.
    """
    others: Counter[str] = Counter()
    found = find_images(folder, others)
    loose = found.pop("")
    classes = {name: files for name, files in found.items() if files}
    if (folder / ANNOTATIONS).is_file() and classes.keys() <= {"images"}:
        return _annotated(folder, [*loose, *classes.get("images", ())])
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
    inside = sum(map(len, classes.values()))
    if not loose and not inside:
        raise DataError(f"{folder} holds no images; found {kinds or 'nothing'}.", f"Images are {' '.join(EXTENSIONS)}.")
    if len(loose) > inside > 0:
        raise DataError(
            f"{folder} holds {len(loose)} images ({few(loose)}) next to {inside} in folders ({few(list(classes))}),"
            " so its classes are not clear.",
            "Put every image into its class's folder, or all of them into one folder.",
        )
    if warn:
        empty = [name for name in found if not found[name]]
        beside = f"images next to the class folders: {len(loose)} ({few(loose)})" if loose and inside else ""
        left_out = [kinds, beside, f"folders without images ({few(empty)})" if empty else ""]
        if any(left_out):
            logger.warning("%s: left out: %s.", folder, "; ".join(filter(None, left_out)))
        only, files = next(iter(classes.items()), ("", []))
        if len(classes) == 1 and any(file.count("/") > 1 for file in files):
            logger.warning(
                "%s holds one class, %s; if the folders in it are classes, use %s.", folder, only, folder / only
            )
    return classes or {folder.resolve().name: loose}


def find_images(folder: Path, others: Counter[str] | None = None) -> dict[str, list[str]]:
    """Images by the sub-folder that they are in, at any depth; "" is the folder itself: sorted paths relative to it.

    Paths have forward slashes. Other files are counted in `others`, by suffix.
    """
    folders, loose = _contents(folder)
    found = {"": loose, **{name: list(_walk(folder, name)) for name in folders}}
    if others is not None:
        rest = [file for files in found.values() for file in files if not _is_image(file)]
        others.update(Path(file).suffix.lower() or "without suffix" for file in rest if file not in FILES_OF_SAMPLES)
    return {name: sorted(filter(_is_image, files)) for name, files in found.items()}


def _annotated(folder: Path, files: list[str]) -> dict[str, list[str]]:
    """Images by class, as the list of Tiny ImageNet says; one that is listed and absent is found when it is read."""
    rows = (line.split("\t") for line in read_text(folder / ANNOTATIONS).splitlines())
    class_of = {row[0]: row[1] for row in rows if len(row) > 1}
    paths = {name: f"images/{name}" for name in class_of} | {file.rpartition("/")[2]: file for file in files}
    classes: dict[str, list[str]] = {name: [] for name in sorted(set(class_of.values()))}
    for name, path in sorted(paths.items()):
        if name not in class_of:
            raise DataError(f"{folder / path} has no class in {folder / ANNOTATIONS}.", "Add its line, or remove it.")
        classes[class_of[name]].append(path)
    return classes


def _contents(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted; a link to nothing is a file."""
    _, folders, files = next(os.walk(folder, onerror=_refuse))
    return sorted(filter(is_visible, folders)), sorted(filter(is_visible, files))


def _walk(folder: Path, directory: str) -> Iterator[str]:
    """Files under a sub-folder; links are followed, but no folder is visited twice."""
    visited: set[str] = set()
    for parent, directories, files in os.walk(folder / directory, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            directories.clear()
            continue
        visited.add(real)
        directories[:] = filter(is_visible, directories)
        below = Path(parent).relative_to(folder).as_posix()
        yield from (f"{below}/{file}" for file in files if is_visible(file))


def _refuse(error: OSError) -> None:
    raise error  # left alone, `os.walk` would skip what it may not read


def _is_flat(folder: Path, classes: Collection[str]) -> bool:
    """Whether images are of one class only because they lie in one folder."""
    return len(classes) == 1 and set(classes) <= {folder.resolve().name, "images"}


def is_visible(name: str) -> bool:
    """Whether a file or folder is neither hidden nor left by a system or an archiver."""
    return not name.startswith((".", "__MACOSX", "PaxHeader")) and name.casefold() not in JUNK


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def few(names: Sequence[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
