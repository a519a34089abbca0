"""Files that others wrote: opened without waiting for anybody; JSON and YAML bounded before anything is built."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import IO, Any

import yaml

from mvar_core.errors import ConfigError, DataError, MvarError, one_line

LARGEST_JSON = 64 * 2**20
"""Bytes; the manifest of the largest token cache, which has tens of thousands of shards, is smaller."""
LARGEST_YAML = 2**16
"""Bytes; YAML is written by hand, and reading it is slow."""
DEEPEST = 64
MOST_VALUES = 100_000
"""In a YAML document, aliases written out: a few lines can mean billions."""
LARGEST_INTEGER = 2**64

_TAG = "tag:yaml.org,2002:"
_YAML_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    # Numbers in YAML 1.1, text in 1.2: 1_2_4_8 would be 1248, 1:30 ninety, and 010 eight.
    "ambiguous": r"[-+]?([0-9][0-9.]*_[0-9_.]*|0[0-9]+|[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?)",
    "float": r"[-+]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
"""What values without quotes mean, by YAML 1.2: on, off, yes and no are text. The first that fits decides."""


def open_regular(path: Path, error: type[MvarError] = DataError) -> IO[bytes]:
    """A file, open for reading; `error` where it does not exist, may not be read, or is not a regular file.

    Opening a pipe would wait for its writer, and reading a device might never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be opened: {getattr(reason, 'strerror', None) or one_line(reason)}.") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise error(f"{path} is {kind}, not a regular file.", "Choose another file.")
    return os.fdopen(handle, "rb")


def read_text(path: Path, largest: int = LARGEST_JSON, error: type[MvarError] = DataError) -> str:
    """The text of a UTF-8 file; `error` as in `open_regular`, and where it is too large or not UTF-8."""
    try:
        with open_regular(path, error) as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise error(f"{path} is larger than {largest:,} bytes, the most that is read.")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text (byte {reason.start}).", "Save it as UTF-8.") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}.") from None


def read_json(path: Path, error: type[MvarError] = DataError, *, finite: bool = True) -> Any:
    """The value of a JSON file, see `parse_json`."""
    return parse_json(read_text(path, error=error), str(path), error, finite=finite)


def parse_json(text: str, where: str, error: type[MvarError] = DataError, *, finite: bool = True) -> Any:
    """The value of a JSON text, which messages call `where`.

    `error` where it is not JSON, names a key twice, is nested too deep, or holds a number that is too large or, if
    `finite`, is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"it has the key {max(keys, key=keys.count)!r:.80} twice")
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise error(f"{where} is nested deeper than {DEEPEST} levels.") from None
    except ValueError as reason:
        raise error(f"{where} is not a JSON file: {one_line(reason)[:300]}.") from None
    _check(value, where, error, finite, MOST_VALUES * 1000)
    return value


def read_yaml(path: Path, error: type[MvarError] = DataError) -> Any:
    """The value of a YAML file, see `parse_yaml`."""
    return parse_yaml(read_text(path, LARGEST_YAML, error), str(path), error)


class _Loader(yaml.SafeLoader):
    """Reads values as `_PLAIN` says, and stops at what is nested too deep before it is read to its end."""

    depth = 0
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that `_Loader`, or a reader of YAML 1.1, would not read as text."""


for _name, _pattern in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


def write_yaml(values: Any) -> str:
    """Values as YAML, which `parse_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None)


def parse_yaml(text: str, where: str, error: type[MvarError] = DataError) -> Any:
    """The value of a YAML text of plain texts, numbers, booleans, lists and mappings; aliases may be used sparingly.

    `error` where it is not YAML, uses tags, names a key twice, is nested too deep or means too many values, or holds a
    number that is not finite or too large.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, where, error)
        value = loader.construct_document(node)
    except RecursionError:
        raise error(f"{where} is nested deeper than {DEEPEST} levels.") from None
    except (yaml.YAMLError, ValueError) as reason:
        raise error(f"{where} is not YAML: {one_line(reason)[:300]}.") from None
    _check(value, where, error, True, MOST_VALUES)
    return value


def _bounded(
    root: Any, children: Callable[[Any], Iterable[Any]], where: str, error: type[MvarError], most: int
) -> Iterator[Any]:
    """Everything in a tree, aliases as often as they are used, up to a number and a depth."""
    waiting, count = [(root, 0)], 0
    while waiting:
        found, depth = waiting.pop()
        count += 1
        if depth > DEEPEST or count > most:
            raise error(f"{where} holds too much: more than {most:,} values, or {DEEPEST} levels of them.")
        yield found
        waiting += [(child, depth + 1) for child in children(found)]


def _check_nodes(root: yaml.Node, where: str, error: type[MvarError]) -> None:
    """Before values are made of them: a merge of merges would take longer than there is time."""

    def inside(node: yaml.Node) -> Iterable[yaml.Node]:
        if isinstance(node, yaml.ScalarNode):
            return ()
        return itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value

    for node in _bounded(root, inside, where, error, MOST_VALUES):
        if node.tag not in _YAML_TAGS:
            line, tag = node.start_mark.line + 1, node.tag.removeprefix(_TAG)
            if tag == "ambiguous":
                hint = "Write a number as in 1248 or 1e-4, a list as in [1, 2, 4, 8], and text in quotes."
                raise error(f"{where}, line {line}: {node.value:.80} could be a number or a text.", hint)
            raise error(f"{where}, line {line}: a value of the kind {tag!r:.80} is not read.", "Put text in quotes.")
        keys: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.value in keys:
                found = f"the key {key.value!r:.80} twice" if isinstance(key, yaml.ScalarNode) else "a list as key"
                raise error(f"{where}, line {key.start_mark.line + 1}: {found}.", "Write every key once, as text.")
            keys.add(key.value)


def _check(value: Any, where: str, error: type[MvarError], finite: bool, most: int) -> None:
    def inside(found: Any) -> Iterable[Any]:
        return found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()

    for found in _bounded(value, inside, where, error, most):
        if isinstance(found, int) and abs(found) > LARGEST_INTEGER:
            raise error(f"{where} holds an integer of {found.bit_length()} bits, which is too large.")
        if isinstance(found, float) and finite and not math.isfinite(found):
            raise error(f"{where} holds {found}, which is not a finite number.")


def check_whole(name: str, value: Any, least: int = 0, most: int = 2**63 - 1) -> int:
    """A whole number that a user gave, as an int; ConfigError where it is of another kind, or out of range."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ConfigError(f"{name} is {value!r:.80}; expected a whole number from {least} to {most}.")
    return int(value)
