"""npz files: read without trusting them, and written piece by piece, without holding their arrays in memory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvar_core.errors import DataError, MvarError, one_line

LONGEST_HEADER = 10_000
LARGEST_EXPANSION = 8
"""How many times larger than its file an npz's arrays may be, beyond the first GiB."""


def read_npz_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype from the npy header at the file's position; ValueError where there is none."""
    try:
        first = np.lib.format.read_magic(file) == (1, 0)
        length = file.read(2 if first else 4)
        if int.from_bytes(length, "little") > LONGEST_HEADER:  # numpy would look at it when it has it in memory
            raise ValueError("its header is too long")
        file.seek(-len(length), 1)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except (RecursionError, MemoryError, SyntaxError, TypeError, OverflowError):
        raise ValueError("its header is not one that numpy writes") from None
    if dtype.hasobject or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"it is {dtype} {shape}, which is not read")
    return shape, fortran_order, dtype


def read_npz(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Those of the named arrays that an npz file has; DataError where it is no regular, whole npz file.

    Nothing in the file is executed, a header that promises more than the file holds is refused before memory is
    allocated, and arrays are bounded by the size of the file.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a regular file." if path.exists() else f"{path} does not exist.")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            found = {name: members[f"{name}.npy"] for name in names if f"{name}.npy" in members}
            total = sum(info.file_size for info in found.values())
            if total > (1 << 30) + LARGEST_EXPANSION * path.stat().st_size:
                raise DataError(f"{path} expands to {total:,} bytes.")
            arrays = {}
            for name, info in found.items():
                with archive.open(info) as file:
                    shape, _, dtype = read_npz_header(file)
                    if file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                        raise ValueError(f"{name} is said to be {dtype} {shape}, but has {info.file_size:,} bytes")
                with archive.open(info) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
            return arrays
    except MvarError:
        raise
    except Exception as error:  # whatever a damaged archive makes the readers raise
        raise DataError(
            f"{path} cannot be read as an npz file: {one_line(error)[:300]}.", "Write or download it again."
        ) from error


@contextmanager
def npz_member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Any]:
    """An array of an npz, header written; without a date, so that equal arrays give equal files."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member
