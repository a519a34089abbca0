"""Work that survives interruptions: a record of what is made, and numbered pieces that are each whole or absent.

A job lives in a directory. Its record says everything that the result depends on; a directory whose record differs
belongs to other work. Pieces are files, written whole or not at all, whose presence says that they are done; the same
command after a stop makes what is missing. One process (or one job of several) works in the directory at a time.

Token caches, samples, ablations and training checkpoints all resume by this protocol.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mvar_core.errors import DataError
from mvar_core.io.files import LOCK_FILE, remove, remove_leftovers, write_json
from mvar_core.untrusted import read_json

LONGEST_VALUE = 60
MOST_DIFFERENCES = 8


class DirectoryLock:
    """The sole right to write in a directory, which is made if need be; nothing of the lock stays behind.

    Where the file system has no locks, or nothing can be written, nothing is locked.
    """

    def __init__(self, directory: Path):
        self.path = directory / LOCK_FILE
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Take the right; DataError where another process has it, and which. Nothing where this one has it already."""
        if self._lock is not None:
            return
        lock = FileLock(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            self._lock = lock
            self.path.write_text(f"Process {os.getpid()} on {platform.node()}, since {time.ctime()},", encoding="utf-8")
        except Timeout:
            try:
                holder = self.path.read_text(encoding="utf-8")[:200] or "Another process"
            except (OSError, ValueError):
                holder = "Another process"
            raise DataError(
                f"{holder} is at work in {self.path.parent}.",
                "Wait for it, or choose another --out; several processes share the work under --nproc or torchrun.",
            ) from None
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # what needs the lock could not write either, and would say so less clearly

    def release(self) -> None:
        """Give the right back; a directory that holds nothing else is removed."""
        if self._lock is None:
            return
        with suppress(OSError):  # the name goes first: who has opened the file meanwhile sees that it is gone
            self.path.unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        with suppress(OSError):
            self.path.parent.rmdir()

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Resumable:
    """A directory of numbered pieces, each in a file that is called `piece_name` with its number.

    The record, JSON values in `record_file`, is everything that the result depends on; the keys `ignore` may differ.
    """

    def __init__(
        self,
        directory: Path,
        record: Mapping[str, Any],
        pieces: int,
        *,
        record_file: str = "manifest.json",
        piece_name: str = "piece-{:06d}.json",
        ignore: Collection[str] = (),
    ):
        self.directory = directory
        self.record = as_json(record)
        self.pieces = range(pieces)
        self.record_path = directory / record_file
        self.piece_name = piece_name
        self.ignore = frozenset(ignore)
        lock = DirectoryLock(directory)
        self.acquire, self.release = lock.acquire, lock.release

    def piece(self, number: int) -> Path:
        """The file whose presence says that a piece is done."""
        return self.directory / self.piece_name.format(number)

    def is_whole(self, number: int) -> bool:
        """Whether a piece that is there can be used; a machine that lost its power may leave others."""
        return True

    def present(self) -> set[int]:
        """Pieces whose file is there."""
        return {number for number in self.pieces if self.piece(number).is_file()}

    def done(self) -> set[int]:
        """Pieces that are there and whole, if the directory holds this work; otherwise none."""
        if not self.begun or self.difference():
            return set()
        return {number for number in self.present() if self.is_whole(number)}

    @property
    def begun(self) -> bool:
        """Whether the directory has a record, of this or of other work."""
        return self.record_path.is_file()

    def difference(self) -> str:
        """How the work that was begun here differs from this, in words; empty where it does not, or nothing was."""
        if not self.begun:
            return ""
        found = read_json(self.record_path)
        if not isinstance(found, dict):
            return f"{self.record_path} is not a record of it"
        return differences(found, self.record, self.ignore)

    def require_same(self, hint: str = "Use those settings to resume it, or add --overwrite to start over.") -> None:
        """Refuse to continue other work; the DataError names what differs, with both values."""
        if difference := self.difference():
            raise DataError(f"{self.directory} holds unfinished work with other settings: {difference}.", hint)

    def begin(self) -> set[int]:
        """Lock the directory and prepare it; returns the pieces that are done. DataError where others work here.

        What belongs to other work, is not whole, or was left by killed writers is removed.
        """
        self.acquire()
        if self.difference() or not self.begun:
            self.clear()
            write_json(self.record_path, self.record)
        remove_leftovers(self.directory)
        done = self.done()
        for number in self.present() - done:
            self.piece(number).unlink(missing_ok=True)
        return done

    def clear(self) -> None:
        """Remove everything in the directory but its lock."""
        for path in self.directory.iterdir():
            if path.name != LOCK_FILE:
                remove(path)

    def discard(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.release()


def differences(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    ignore: Collection[str] = (),
    *,
    describe: Callable[[str, str, str], str] = "{} is {} there, {} asked".format,
) -> str:
    """How two records differ, by dotted names, in phrases that `describe` makes; empty where they are equal.

    The top-level keys `ignore` do not count.
    """

    def short(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False).strip('"')
        return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"

    before, now = (
        dict(_flattened({key: value for key, value in as_json(values).items() if key not in ignore}))
        for values in (found, wanted)
    )
    pairs = {key: (before.get(key, "absent"), now.get(key, "absent")) for key in [*now, *before]}
    phrases = [describe(key, short(old), short(new)) for key, (old, new) in pairs.items() if old != new]
    more = len(phrases) - MOST_DIFFERENCES
    return "; ".join(phrases[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are when they have been written as JSON and read again."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as one, by dotted keys as `--set` writes them."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
