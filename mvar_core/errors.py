"""The errors that users can fix: each says what was wrong, what was found and what to do next."""

from __future__ import annotations

import errno
import os
import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 1200
"""Letters of a message: a value or a name from a file can have any length."""


class MvarError(Exception):
    """A problem that the user can fix; the command line prints it as one line and exits with 1.

    The message says what was wrong and what was found, naming the file or value; the hint, what to type or change next.
    """

    def __init__(self, message: str, hint: str | None = None):
        # Names of files can hold anything, and a message is one line on a terminal.
        message = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 4 :]}"
        super().__init__(message if hint is None else f"{message} {hint}")
        self.message = message
        self.hint = hint


class ConfigError(MvarError):
    """A configuration key or value that cannot be used."""


class DataError(MvarError):
    """Images, tokens or labels that cannot be used."""


class CheckpointError(MvarError):
    """A file of weights that cannot be read, or that does not fit the model."""


class BackendError(MvarError):
    """An attention backend or device that cannot run what was asked of it."""


class WriteError(MvarError, OSError):
    """A file that cannot be written, with the system's number of the error (errno)."""

    def __init__(self, path: object, number: int):
        super().__init__(f"{path} cannot be written: {os.strerror(number)}.", write_hint(number))
        self.errno = number


def write_hint(number: int | None) -> str | None:
    """What to do about an error of the system while reading or writing a file; None where the error says enough."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room, then run the same command again: what was finished is kept."
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Allow writing there, or choose another --out."
    if number in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO):
        return "Check the disk or the network drive, then run the same command again: what was finished is kept."
    return None


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its kind where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of torch or of Python, says that the machine or its GPU has no memory left."""
    signs = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def shown(value: object) -> str:
    """A value as a message shows it: what is long is cut."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    try:
        return short.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a number of {type(value).__name__} with thousands of digits"


def nearest(name: str, choices: Iterable[str]) -> str:
    """A phrase that offers the choices most like what the user typed, or lists the choices when none is near."""
    names = sorted(choices)
    if matches := get_close_matches(name, names, cutoff=0.5):
        return f"Did you mean {' or '.join(matches)}?"
    return f"Known: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}."
