"""The C library's allocator, set to keep what it has: large tensors come and go with every operation.

The GNU C library maps large blocks again each time, so that every page of an activation is fetched and cleared for
every operation. Other C libraries are left as they are, and every function here then does nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # names of malloc.h
KEPT_BYTES = 256 << 20
DEFAULT_MMAP_MAX = 65536


def keep_freed_memory() -> bool:
    """From now on, let freed blocks of up to 256 MiB be used again instead of going back to the system.

    For sampling: some 60,000 fewer page faults for an image of a d16 model, about a twentieth of its time on two cores.

    Returns:
        Whether the allocator accepted it.
    """
    library = c_library()
    return library is not None and _keep_up_to_the_threshold(library)


@contextmanager
def keeping_all_freed_memory() -> Iterator[None]:
    """Within it, blocks of any size stay with the process; afterwards as after `keep_freed_memory`.

    For training, whose steps allocate the same again and again: a tenth of a step's time on two cores.
    """
    library = c_library()
    if library is None:
        yield
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(MMAP_MAX, DEFAULT_MMAP_MAX)
        _keep_up_to_the_threshold(library)
        library.malloc_trim(0)


@lru_cache(maxsize=1)
def c_library() -> ctypes.CDLL | None:
    """The GNU C library, or None where another one is at work."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _keep_up_to_the_threshold(library: ctypes.CDLL) -> bool:
    return bool(library.mallopt(MMAP_THRESHOLD, KEPT_BYTES)) and bool(library.mallopt(TRIM_THRESHOLD, KEPT_BYTES))
