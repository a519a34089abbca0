"""Writers of sampled images that never hold more than a batch: PNG files, one npz, or one grid."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from mvar_core.errors import DataError
from mvar_core.files import require_new_directory

FORMATS = ("png", "npz", "grid")


class SampleWriter(Protocol):
    """Takes samples batch by batch, in global order."""

    def __enter__(self) -> SampleWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, images: np.ndarray, labels: np.ndarray, tokens: np.ndarray, stages: np.ndarray | None) -> None:
        """Take one batch: images (B,H,W,3) uint8, labels (B,), tokens (B,L), stages (B,S,H,W,3) uint8."""

    def close(self) -> list[str]:
        """Finish; returns the names of what was written, below the output."""


def output_target(out: Path, output_format: str, overwrite: bool) -> Path:
    """The file or directory that will be written, after checking that it may be.

    Raises:
        DataError: Unknown format, a suffix that contradicts it, or an output that is already there.
    """
    if output_format not in FORMATS:
        raise DataError(f"--format {output_format!r} is not known.", f"Use {', '.join(FORMATS)}.")
    if output_format == "png":
        if out.suffix.lower() in (".png", ".npz"):
            raise DataError(f"--out {out} names a file, but --format png writes a directory of them.",
                            "Give a directory, or use --format grid or npz.")  # fmt: skip
        require_new_directory(out, overwrite)
        require_new_directory(strips_directory(out), overwrite)
        return out
    suffix = ".npz" if output_format == "npz" else ".png"
    if out.suffix.lower() not in ("", suffix):
        raise DataError(f"--out {out} does not end in {suffix}, which --format {output_format} writes.")
    target = out if out.suffix else out / ("samples.npz" if output_format == "npz" else "grid.png")
    if target.is_dir():
        raise DataError(f"{target} is a directory; expected a file to write.", "Choose another --out.")
    if not out.suffix and out.is_file():
        raise DataError(f"{out} is a file; expected a directory.", "Choose another --out.")
    if not overwrite:
        if target.exists():
            raise DataError(f"{target} is already there.", "Choose another --out, or add --overwrite to replace it.")
        if not out.suffix:
            require_new_directory(out, overwrite)
    return target


def strips_directory(out: Path) -> Path:
    """Where the strips of PNG samples go: beside them, for a folder of samples is measured as it is."""
    return out.with_name(f"{out.name}-stages")


def strip(stages: np.ndarray) -> np.ndarray:
    """One sample's stages (S,H,W,3) side by side as one image (H, S·W, 3)."""
    return np.concatenate(list(stages), axis=1)


class _PlainWriter:
    """Nothing to release when the block ends."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PngWriter(_PlainWriter):
    """`<index>_<class>.png` for each sample; strips have the same names in a directory of their own.

    Args:
        directory: Where to write; made by the caller.
        strips: Where to write strips; made by the caller, None for no strips.
        total: How many samples will come, for the width of the index.
        save_tokens: Also write the tokens.
    """

    def __init__(self, directory: Path, strips: Path | None, total: int, save_tokens: bool):
        self.directory = directory
        self.strips = strips
        self.digits = max(5, len(str(total - 1)))
        self.tokens: list[np.ndarray] | None = [] if save_tokens else None
        self.labels: list[np.ndarray] = []
        self.images: list[str] = []

    def write(self, images: np.ndarray, labels: np.ndarray, tokens: np.ndarray, stages: np.ndarray | None) -> None:
        """Take one batch."""
        from PIL import Image

        for position, image in enumerate(images):
            name = f"{len(self.images):0{self.digits}d}_{labels[position]}.png"
            Image.fromarray(image).save(self.directory / name)
            self.images.append(name)
            if stages is not None and self.strips is not None:
                Image.fromarray(strip(stages[position])).save(self.strips / name)
        self.labels.append(labels)
        if self.tokens is not None:
            self.tokens.append(tokens.astype(np.int32))

    def close(self) -> list[str]:
        """Write the tokens."""
        names = list(self.images)
        if self.tokens is not None:
            labels = np.concatenate(self.labels).astype(np.int64)
            np.savez(self.directory / "tokens.npz", tokens=np.concatenate(self.tokens), labels=labels)
            names.append("tokens.npz")
        return names


class NpzWriter:
    """One npz whose arrays grow batch by batch: `arr_0`, `labels` and, where asked for, `tokens` and `stages`.

    `arr_0` streams into the archive; the smaller arrays wait in temporary files, for a zip takes one member at a time.

    Args:
        path: The file to write.
        total: How many samples will come: an npy header tells the length first.
        save_tokens: Also write the tokens.
    """

    def __init__(self, path: Path, total: int, save_tokens: bool):
        self.total = total
        self.save_tokens = save_tokens
        self.open_files = ExitStack()
        self.archive = self.open_files.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True))
        self.images: Any = None
        self.waiting: dict[str, tuple[Any, tuple[int, ...], np.dtype]] = {}
        self.count = 0

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open_files.close()

    def write(self, images: np.ndarray, labels: np.ndarray, tokens: np.ndarray, stages: np.ndarray | None) -> None:
        """Take one batch."""
        if self.images is None:
            self.images = self._open_member("arr_0", images)
        self.images.write(np.ascontiguousarray(images).tobytes())
        arrays: Mapping[str, np.ndarray | None] = {
            "labels": labels.astype(np.int64),
            "tokens": tokens.astype(np.int32) if self.save_tokens else None,
            "stages": stages,
        }
        for name, array in arrays.items():
            if array is None:
                continue
            if name not in self.waiting:
                file = self.open_files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
                self.waiting[name] = (file, array.shape[1:], array.dtype)
            self.waiting[name][0].write(np.ascontiguousarray(array).tobytes())
        self.count += len(images)

    def close(self) -> list[str]:
        """Put the waiting arrays behind the images."""
        assert self.count == self.total, (self.count, self.total)
        self.images.close()
        for name, (file, shape, dtype) in self.waiting.items():
            with self._open_member(name, np.empty((0, *shape), dtype)) as member:
                file.seek(0)
                shutil.copyfileobj(file, member, 1 << 20)
        self.open_files.close()
        return [""]

    def _open_member(self, name: str, like: np.ndarray) -> Any:
        """A member of the archive, npy header written; without a date, so that equal arrays give equal files."""
        member = self.open_files.enter_context(self.archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True))
        dtype = np.lib.format.dtype_to_descr(like.dtype)
        header = {"descr": dtype, "fortran_order": False, "shape": (self.total, *like.shape[1:])}
        np.lib.format.write_array_header_1_0(member, header)
        return member


class GridWriter(_PlainWriter):
    """One PNG of all samples; with stages, one row per sample that shows it after each scale.

    Args:
        path: The file to write.
        columns: Images per row.
    """

    def __init__(self, path: Path, columns: int):
        self.path = path
        self.columns = columns
        self.images: list[np.ndarray] = []

    def write(self, images: np.ndarray, labels: np.ndarray, tokens: np.ndarray, stages: np.ndarray | None) -> None:
        """Take one batch."""
        self.images.extend(images if stages is None else [strip(one) for one in stages])

    def close(self) -> list[str]:
        """Lay the grid out and write it."""
        from mvar_core.data.pictures import save_grid

        save_grid(np.stack(self.images), self.path, self.columns)
        return [""]
