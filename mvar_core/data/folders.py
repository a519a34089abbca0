"""Folders of image files: their classes, their splits, their images."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import IO

import numpy as np

from mvar_core.data.decoding import EXTENSIONS
from mvar_core.data.sources import StoredSource
from mvar_core.errors import DataError, nearest
from mvar_core.untrusted import open_regular

SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation"), "val": ("val", "validation", "test")}
"""Names of the sub-folder that a split may have, best first."""

logger = logging.getLogger("mvar")


def split_name(source: str, split: str = "train") -> tuple[str, str]:
    """Name and split of `digits:test` or `folder:test`; without a split at its end, the split is `split`."""
    name, colon, last = source.rpartition(":")
    if colon and name and last in SPLIT_FOLDERS and not Path(source).exists():
        return name, last
    return source, split


class FolderSource(StoredSource):
    """Images in one sub-folder per class (classes in alphabetical order), or all in one folder, which is one class.

    Sub-folders of a class folder belong to the class. Hidden files and those without an image's extension are ignored.
    A folder whose sub-folders are train and test (or val) has these splits, with the classes of train; otherwise all of
    its images are the split train.

    Raises:
        DataError: No such folder or split, no images, images next to class folders, or a class that train lacks.
    """

    def __init__(self, root: Path, split: str = "train", name: str | None = None):
        self.folder, reference = split_folder(root, split)
        names, files, labels = find_images(self.folder)
        known = names if reference == self.folder else find_images(reference)[0]
        if not len(names) == len(known) == 1:
            for missing in sorted(set(names).difference(known)):
                raise DataError(
                    f"{self.folder}: class {missing!r} is not among the {len(known)} classes of {reference}."
                    f" {nearest(missing, known)}"
                )
            labels = [known.index(names[label]) for label in labels]
        super().__init__(name or str(root), split, known, np.asarray(labels, np.int64), files)

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


def find_images(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """The images of a folder: class names, paths relative to the folder (with forward slashes), and labels.

    Raises:
        DataError: No images, or images next to class folders.
    """
    entries = sorted(filter(_is_visible, os.listdir(folder)))
    flat = [entry for entry in entries if _is_image(entry) and (folder / entry).is_file()]
    found = {entry: _walk(folder, entry) for entry in entries if (folder / entry).is_dir()}
    classes = {name: files for name, files in found.items() if files}
    if flat and classes:
        raise DataError(
            f"{folder} holds images ({flat[0]}, …; {len(flat)} in all) next to folders of images"
            f" ({next(iter(classes))}, …; {len(classes)} in all), so its classes are not clear.",
            "Put every image into its class's folder, or all of them into one folder.",
        )
    if not flat and not classes:
        more = ", …" if len(entries) > 3 else ""
        shown = f"{', '.join(entries[:3])}{more} ({len(entries)} in all)" if entries else "nothing"
        raise DataError(f"{folder} holds no images ({' '.join(EXTENSIONS)}); found {shown}.")
    if flat:
        return [folder.resolve().name], flat, [0] * len(flat)
    if empty := [name for name in found if name not in classes]:
        logger.warning("%s: no images in %s; not counted as classes.", folder, ", ".join(empty[:5]))
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    return list(classes), [file for files in classes.values() for file in files], labels


def split_folder(root: Path, split: str) -> tuple[Path, Path]:
    """The folder of a split, and the folder whose classes count."""
    if split not in SPLIT_FOLDERS:
        raise DataError(f"There is no split {split!r}. {nearest(split, SPLIT_FOLDERS)}")
    if not root.is_dir():
        found = "is a file; expected a folder of images." if root.exists() else "does not exist."
        raise DataError(f"{root} {found}", "Specify a folder of images, or `digits` for the bundled data.")
    directories = {entry for entry in os.listdir(root) if _is_visible(entry) and (root / entry).is_dir()}
    known = {name for names in SPLIT_FOLDERS.values() for name in names}
    if directories <= known and "train" in directories and len(directories) > 1:
        folder = next(root / name for name in SPLIT_FOLDERS[split] if name in directories)
        return folder, root / "train"
    if split != "train":
        raise DataError(
            f"{root} has no split {split!r}: it is not divided into the folders train and {split}.",
            "Put its images into these two folders, or name the folder of the images you want.",
        )
    return root, root


def _walk(folder: Path, directory: str) -> list[str]:
    """Image files under a class folder, sorted; links are followed, but no folder is visited twice."""
    found: list[str] = []
    visited: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error  # left alone, `walk` would skip what it may not read

    for parent, directories, files in os.walk(folder / directory, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            directories.clear()
            continue
        visited.add(real)
        directories[:] = sorted(filter(_is_visible, directories))
        below = Path(parent).relative_to(folder).as_posix()
        found += [f"{below}/{file}" for file in files if _is_visible(file) and _is_image(file)]
    return sorted(found)


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)
