"""The classes of a data set, a cache, a model or a file of samples: ordered names, and where they came from.

A class is a name; its number is where the name stands in one list, and another list may have another order. So classes
of two lists are the same where their names are: exactly, else without regard to case, underscores and Unicode form,
else by what ImageNet calls them (wnid, names).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvar_core.config import ModelConfig
from mvar_core.config.presets import presets_directory
from mvar_core.errors import ConfigError, DataError, nearest, shown
from mvar_core.untrusted import parse_json, read_text

BY_NUMBER = "by-number"
"""In place of names: that class N of one side is class N of the other."""


class Match(NamedTuple):
    """For each class of one list the position of the same class in another, None where that lacks it.

    `by` says how they were matched: by name; by number, where neither list has other names; or by order, where one list
    has names and the other none, which is a guess.
    """

    positions: tuple[int | None, ...]
    by: Literal["name", "number", "order"]


@dataclass(frozen=True)
class Classes:
    """Classes in order, `count` of them; `names` is None where they have none.

    `origin` is where they came from, as messages say it: a path, the name of a model.
    """

    names: tuple[str, ...] | None
    count: int
    origin: str

    @classmethod
    def of(cls, names: Sequence[str] | None, count: int | None = None, origin: str = "") -> Classes:
        """Classes with these names, or `count` classes without names."""
        return cls(None if names is None else tuple(names), len(names) if names is not None else count or 0, origin)

    @classmethod
    def of_model(cls, config: ModelConfig) -> Classes:
        """The classes of a model; none of a tokenizer alone."""
        count = config.transformer.num_classes if config.transformer is not None else 0
        return cls.of(config.class_names, count, config.name)

    @property
    def numbered(self) -> bool:
        """Whether the classes have no names, or only their numbers."""
        return self.names is None or all(name == str(index) for index, name in enumerate(self.names))

    def name(self, index: int) -> str:
        """What a class is called: its name, or its number."""
        return self.names[index] if self.names is not None and index < len(self.names) else str(index)

    def all_names(self) -> tuple[str, ...]:
        """What the classes are called."""
        return tuple(map(self.name, range(self.count)))

    @cached_property
    def _tables(self) -> tuple[dict[str, list[int]], ...]:
        """Positions by name, by folded name, and by synonym: parts between commas, and what ImageNet's table knows."""
        tables: tuple[dict[str, list[int]], ...] = ({}, {}, {})
        names = self.names or ()
        table = imagenet_table()
        known = {row[1]: row for row in table} if names == imagenet_names() else {}
        known |= {row[0]: row for row in table}
        for index, name in enumerate(names):
            synonyms = [*name.split(","), *known.get(name, ())]
            for keys, level in zip(([name], [fold(name)], map(fold, synonyms)), tables, strict=True):
                for key in dict.fromkeys(keys):
                    level.setdefault(key, []).append(index)
        return tables

    def find(self, name: str) -> list[int]:
        """Positions of the classes that a name means: none, one, or several of which it is a synonym."""
        keys = (name, fold(name), fold(name))
        return next((found for key, level in zip(keys, self._tables, strict=True) if (found := level.get(key))), [])

    def index(self, asked: str | int) -> int:
        """The position of one class that a user named, see `resolve`."""
        text = str(asked).strip()
        number = re.fullmatch(r"(#?)\s*(-?\d{1,18})", text)
        if isinstance(asked, str) and not (number and number[1]):
            if len(found := self.find(text)) == 1:
                return found[0]
            if found:
                raise DataError(
                    f"--class {shown(text)} is the name of {len(found)} classes: {', '.join(map(self.label, found))}.",
                    f"Choose one by its position, as in --class '#{found[0]}'.",
                )
            if number is None or any(name.strip().isdecimal() for name in self.names or ()):
                problem = nearest(text, self.names) if self.names else f"{self.origin or 'The model'} records no names."
                exists = number is not None and 0 <= int(number[2]) < self.count
                position = f"'#{text}' is a position" if exists else f"#0 … #{self.count - 1} are positions"
                raise DataError(f"There is no class {shown(text)}. {problem}", f"--class {position}.")
        if number is None or not 0 <= int(number[2]) < self.count:
            raise DataError(
                f"--class {text} is out of range.", f"There are classes #0 … #{self.count - 1}; or use all."
            )
        return int(number[2])

    def resolve(self, asked: Sequence[str | int] | str | int) -> list[int]:
        """Positions of the classes that a user named, in that order, each once.

        A text is a name, `#N` for position N, a comma list of them, or "all". A whole name is tried before commas are
        read as separators, for names may hold commas ("tench, Tinca tinca"). A number is a name where classes are
        called by numbers, else a position, as a whole number (not a text) always is. DataError for a number out of
        range, or a name that no class has, with the nearest names, or several have.
        """
        found: list[int] = []
        for each in [asked] if isinstance(asked, (str, int)) else asked:
            if isinstance(each, int) or self.find(each):
                found.append(self.index(each))
            elif fold(each) == "all":
                found += range(self.count)
            else:
                found += [self.index(part) for part in each.split(",") if part.strip()]
        if not found:
            raise DataError("--class names no class.", f"Use a name, #N for class N of {self.count}, or all.")
        return list(dict.fromkeys(found))

    def label(self, index: int) -> str:
        """A class as messages write it: name and position, where the name is another."""
        return name if (name := self.name(index)) == str(index) else f"{name} (#{index})"

    def match(self, other: Classes) -> Match:
        """Where each of these classes is in another list; a name that means several classes means none.

        Where a list has no names, a class called "10" is number 10 of it, if all names of the other are such numbers.
        """
        if self.names is not None and other.names is not None:
            back: dict[int, list[int]] = {}  # this list may know more names of a class than the other
            for there, name in enumerate(other.names):
                if len(found := self.find(name)) == 1:
                    back.setdefault(found[0], []).append(there)
            both = [
                (other.find(name) or back.get(index, [])) if len(self._tables[0][name]) == 1 else []
                for index, name in enumerate(self.names)
            ]
            return Match(tuple(found[0] if len(found) == 1 else None for found in both), "name")
        ours, theirs = self._numbers(other.count), other._numbers(self.count)
        if ours is None or theirs is None:
            return Match(self.by_position(other), "order")
        positions = {number: index for index, number in enumerate(theirs)}
        return Match(tuple(map(positions.get, ours)), "number")

    def by_position(self, other: Classes) -> tuple[int | None, ...]:
        """Class N of another list for class N of this one, None where that has fewer."""
        return tuple(index if index < other.count else None for index in range(self.count))

    def _numbers(self, count: int) -> Sequence[int] | None:
        """The numbers that classes are called by, if all are, and are less than `count`."""
        if self.names is None:
            return range(self.count)
        numbers = [int(name) for name in self.names if re.fullmatch(r"0*\d{1,9}", name)]
        return numbers if len(set(numbers)) == len(self.names) and max(numbers) < count else None


def align(
    ours: Classes,
    theirs: Classes,
    class_names: Sequence[str] | str | None = None,
    used: Iterable[int] = (),
    hint: str | None = None,
) -> tuple[NDArray[np.int64], Classes]:
    """Where each of these classes is in another list, -1 where that lacks it; and the other list, with names if known.

    `class_names` is what `--class-names` accepts: names for a list that has none, or that numbers are to decide. The
    other list must have the classes that are `used`. `hint` says what to do where there is no such option. DataError
    where only one list has names and nothing says that the order is the same, or a class is lacking.
    """
    names = read_class_names(class_names) if class_names is not None else None
    if class_names is not None and names is None:
        positions, theirs = ours.by_position(theirs), replace(theirs, names=theirs.names or ours.names)
    else:
        if names is not None:
            if not (ours.numbered or theirs.numbered):
                raise ConfigError("--class-names: all classes have names.", f"Leave it out, or use {BY_NUMBER}.")
            for side in (ours, theirs):
                if side.numbered and side.count > len(names):
                    raise ConfigError(
                        f"--class-names holds {len(names)} names; {side.origin} has {side.count} classes."
                    )
            ours, theirs = (replace(side, names=names) if side.numbered else side for side in (ours, theirs))
        positions, by = ours.match(theirs)
        if by == "order" or (ours.numbered != theirs.numbered and set(positions) == {None}):
            named, other = (theirs, ours) if ours.numbered else (ours, theirs)
            raise DataError(
                f"{named.origin} names its classes ({', '.join((named.names or ())[:3])}, …) and {other.origin} only"
                " numbers them, so which is which is not certain.",
                hint
                or "Name them: --class-names FILE, NAME,NAME,… or imagenet; or --class-names by-number, where the order"
                " is the same.",
            )
    for index in used:
        if positions[index] is None:
            similar = nearest(ours.name(index), theirs.all_names())
            raise DataError(
                f"{ours.origin} has images of class {ours.label(index)}, which {theirs.origin} lacks. {similar}",
                hint or "Rename it, or use --class-names by-number where class N of one is class N of the other.",
            )
    return np.array([-1 if there is None else there for there in positions], np.int64), theirs


def fold(name: str) -> str:
    """A name without regard to case, underscores, spaces, Unicode form (macOS decomposes letters) and leading zeros."""
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
    return re.sub(r"^0+(?=\d+$)", "", text)


@cache
def imagenet_table() -> tuple[tuple[str, ...], ...]:
    """ImageNet's 1000 classes in order, each wnid, name and further names."""
    lines = (presets_directory() / "imagenet-classes.txt").read_text(encoding="utf-8").splitlines()
    rows = ((line + "\t").split("\t")[:3] for line in lines)
    return tuple((wnid, name, *more.split(", "), more, f"{name}, {more}") for wnid, name, more in rows)


def imagenet_names() -> tuple[str, ...]:
    """Names of ImageNet's classes in order."""
    return tuple(row[1] for row in imagenet_table())


def read_class_names(given: Sequence[str] | str) -> tuple[str, ...] | None:
    """Names of classes in the order of their numbers, as `--class-names` accepts them; None for "by-number".

    A list or comma list, "imagenet", a text file with a name on each line, or a JSON list.
    """
    if given == BY_NUMBER:
        return None
    if given == "imagenet":
        return imagenet_names()
    names = given
    if isinstance(given, str):
        path = Path(given).expanduser()
        names = names_in(path) if path.is_file() else [name.strip() for name in given.split(",")]
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"--class-names {shown(given)} is not a list of names.",
            f"Use a file with one name per line, names with commas between them, imagenet, or {BY_NUMBER}.",
        )
    return tuple(names)


def names_in(path: Path) -> tuple[str, ...]:
    """Names of classes that a file lists: one on each line or, in JSON, a list, {"0": name} or {name: 0}.

    DataError for none, one without a name, or numbers that are not 0, 1, 2 …
    """
    text = read_text(path)
    names = parse_json(text, str(path)) if path.suffix.lower() == ".json" else text.strip().splitlines()
    if isinstance(names, dict):
        pairs = [(name, key) if isinstance(name, int) else (key, name) for key, name in names.items()]
        numbered = {str(number): name for number, name in pairs}
        names = [numbered.get(str(number)) for number in range(len(pairs))]
    found = (
        [str(name).strip() for name in names or () if isinstance(name, (str, int))] if isinstance(names, list) else []
    )
    if not found or not all(found) or len(found) < len(names):
        raise DataError(f"{path} does not list class names.", "Write one name on each line, or a JSON list of names.")
    return tuple(found)
