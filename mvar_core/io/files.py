"""Files that are either whole or absent: temporary names, renames, hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from mvar_core.errors import DataError, WriteError

LOCK_FILE = ".lock"
"""What a process holds while it writes in a directory; one that was killed leaves it there."""
SCARCE_BYTES = 1 << 24
_making, _live, _tidied = Lock(), set[Path](), set[Path]()  # temporary paths of this process; directories seen
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path next to `path` that is renamed to it when the block ends well, and removed when it does not.

    With `durable` the bytes are on the disk before they get their name: losing power leaves no empty file there. The
    temporary name says which process it belongs to; with its first in a directory, a process removes what those that
    were killed have left there.
    """
    directory, host = path.parent, hashlib.sha256(platform.node().encode()).hexdigest()[:6]
    with naming(path):
        directory.mkdir(parents=True, exist_ok=True)
        with _making:
            if directory not in _tidied:
                _tidied.add(directory)
                for left in directory.glob(f".*.{host}-*.tmp"):
                    number = int(found[1]) if (found := re.search(rf"\.{host}-(\d+)\.\w+\.tmp$", left.name)) else 0
                    if number and left not in _live and (number == os.getpid() or not _runs(number)):
                        remove(left)
            temporary = directory / f".{path.name}.{host}-{os.getpid()}.{secrets.token_hex(4)}.tmp"
            _live.add(temporary)
        try:
            temporary.touch()
            yield temporary
            if durable:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            remove(temporary)
            _live.discard(temporary)


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make errors of writing `path`, also torch's and safetensors' own, a WriteError; those of other files stay."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        wrong = path if error.filename is None else Path(os.fsdecode(error.filename))
        number = error.errno or (errno.ENOSPC if " requested and " in str(error) else None)  # numpy does not say why
        if number is None or not (wrong.name.removeprefix(".").startswith(path.name) or wrong in path.parents):
            raise
        raise WriteError(path, number) from error
    except Exception as error:
        if found := re.search(r"(?:os error|Errno) (\d+)", str(error)):  # safetensors, and torch's sharded writer
            raise WriteError(path, int(found[1])) from error
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_CANNOT_WRITE):
            full = shutil.disk_usage(path.parent).free < SCARCE_BYTES  # torch does not say why
            raise WriteError(path, errno.ENOSPC if full else errno.EIO) from error
        raise


def remove(path: Path) -> None:
    """Remove a file, or a directory with everything in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk, where the system can wait for that."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files and directories of writers that were killed; nobody may be writing there now."""
    for path in directory.glob(".*.tmp"):
        remove(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest is there from Python 3.11 on
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_new_directory(path: Path, overwrite: bool) -> None:
    """Refuse an output that is a file, or a directory with files in it that may not be overwritten (DataError)."""
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is a file; expected a directory to write to.", "Choose another --out.")
    leftovers = {path / LOCK_FILE, *path.glob(".*.tmp")}  # of writers that were killed
    if not overwrite and path.is_dir() and not leftovers.issuperset(path.iterdir()):
        raise DataError(f"{path} is not empty.", "Choose another --out, or add --overwrite to replace it.")


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of some files that takes no longer for gigabytes than for megabytes, in hexadecimal.

    It covers sizes and evenly spread blocks (all of a small file): enough to tell one set of weights from another, in
    which training changes every value, and not to prove that a file is undamaged. Names of files do not count, their
    order does.
    """
    digest, blocks, block_bytes = hashlib.sha256(), 32, 1 << 16
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size}/".encode())
        last = max(0, size - block_bytes)
        with path.open("rb") as file:
            if size <= blocks * block_bytes:
                digest.update(file.read())
                continue
            for block in range(blocks):
                file.seek(last * block // (blocks - 1))
                digest.update(file.read(block_bytes))
    return digest.hexdigest()
