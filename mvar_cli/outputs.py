"""What `mvar sample` leaves: PNG files, one npz, or one grid, put together from shards and never half there."""

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvar_cli.parts import PUBLISHING, Parts, parts_directory, remove, strip
from mvar_core.errors import ConfigError, DataError
from mvar_core.io.files import read_json, require_new_directory, write_json

FORMATS = ("png", "npz", "grid")
TOKENS_FILE = "tokens.npz"


def choose_format(out: Path, asked: str | None, save_tokens: bool) -> str:
    """The format of an output: as asked for, or as its name ends.

    Raises:
        ConfigError: Tokens are to be saved where there is no place for them.
    """
    output_format = asked or {".npz": "npz", ".png": "grid"}.get(out.suffix.lower(), "png")
    if save_tokens and output_format == "grid":
        raise ConfigError(
            "--format grid has no place for tokens.", "Use --format png or npz, or leave out --save-tokens."
        )
    return output_format


def output_target(out: Path, output_format: str) -> Path:
    """The file or directory that will be written.

    Raises:
        DataError: Unknown format, or a path that contradicts it.
    """
    if output_format not in FORMATS:
        raise DataError(f"--format {output_format!r} is not known.", f"Use {', '.join(FORMATS)}.")
    if output_format == "png":
        if out.suffix.lower() in (".png", ".npz"):
            raise DataError(f"--out {out} names a file, but --format png writes a directory of them.",
                            "Give a directory, or use --format grid or npz.")  # fmt: skip
        if out.is_mount() or not out.name:
            raise DataError(f"--out {out} cannot take the place of that directory.", "Give a directory below it.")
        return out
    suffix = ".npz" if output_format == "npz" else ".png"
    if out.suffix.lower() not in ("", suffix):
        raise DataError(f"--out {out} does not end in {suffix}, which --format {output_format} writes.")
    target = out if out.suffix else out / ("samples.npz" if output_format == "npz" else "grid.png")
    if target.is_dir():
        raise DataError(f"{target} is a directory; expected a file to write.", "Choose another --out.")
    if not out.suffix and out.is_file():
        raise DataError(f"{out} is a file; expected a directory.", "Choose another --out.")
    return target


def require_free(target: Path, out: Path, output_format: str, overwrite: bool) -> None:
    """Refuse an output that is already there, unless it may be replaced; shards on their way to it do not count.

    Args:
        target: From `output_target`.
        out: What the user typed.
        output_format: png, npz or grid.
        overwrite: Whether it may be replaced.

    Raises:
        DataError: Names what is there.
    """
    if output_format == "png":
        require_new_directory(out, overwrite)
        require_new_directory(strips_directory(out), overwrite)
        return
    if overwrite:
        return
    if target.exists():
        raise DataError(f"{target} is already there.", "Choose another --out, or add --overwrite to replace it.")
    if target != out and out.is_dir() and any(path != parts_directory(target) for path in out.iterdir()):
        raise DataError(f"{out} is not empty.", "Choose another --out, or add --overwrite to replace it.")


def strips_directory(out: Path) -> Path:
    """Where the strips of PNG samples go: beside them, for a folder of samples is measured as it is."""
    return out.with_name(f"{out.name}-stages")


def outputs_of(parts: Parts) -> list[str]:
    """Every file of a finished output, in order."""
    request, target = parts.request, parts.target
    if request.output != "png":
        return [str(target)]
    names = [request.file_name(index) for index in range(request.total)]
    outputs = [str(target / name) for name in names]
    if request.save_tokens:
        outputs.append(str(target / TOKENS_FILE))
    if request.stages:
        outputs += [str(strips_directory(target) / name) for name in names]
    return outputs


def put_together(parts: Parts, replace: bool, progress: Callable[[int, int], None] | None = None) -> None:
    """Make the output out of its shards, a shard at a time, and give it its name.

    Args:
        parts: All of its shards are there.
        replace: Whether an output that is there may be replaced.
        progress: Called as progress(done, total), in samples.

    Raises:
        DataError: An output has come under that name meanwhile.
    """
    request = parts.request
    finals: dict[str, Path] = {}
    if request.output == "png":
        if request.save_tokens:
            merge_npz(parts, ("tokens", *request.known), parts.images / TOKENS_FILE, progress)
        finals[parts.images.name] = parts.target
        if request.stages:
            finals[parts.strips.name] = strips_directory(parts.target)
    elif request.output == "npz":
        names = (
            "arr_0",
            *request.known,
            *(["tokens"] if request.save_tokens else []),
            *(["stages"] if request.stages else []),
        )
        merge_npz(parts, names, parts.directory / "final.npz", progress)
        finals["final.npz"] = parts.target
    else:
        _write_grid(parts, parts.directory / "final.png")
        finals["final.png"] = parts.target
    for final in finals.values():
        if not replace and (final.is_file() or (final.is_dir() and any(final.iterdir()))):
            raise DataError(f"{final} has appeared while the samples were drawn.",
                            "Move it away and run the same command again.")  # fmt: skip
    # From here on a run that was stopped has only names left to give.
    write_json(parts.directory / PUBLISHING, {name: str(final.absolute()) for name, final in finals.items()})
    publish(parts)


def is_published(parts: Parts) -> bool:
    """Whether a run that was stopped had only to give names to what it had made."""
    path = parts.directory / PUBLISHING
    if not path.is_file():
        return False
    return all((parts.directory / name).exists() or Path(final).exists() for name, final in read_json(path).items())


def publish(parts: Parts) -> None:
    """Give the finished output its name, what stood there moves away first, and remove the shards."""
    for name, text in read_json(parts.directory / PUBLISHING).items():
        made, final = parts.directory / name, Path(text)
        if not made.exists():
            continue  # it has its name already
        old = parts.directory / f"old-{name}"
        remove(old)
        if final.is_dir():
            final.rename(old)
        made.replace(final)
    parts.remove()


def merge_npz(
    parts: Parts, names: Iterable[str], path: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """One npz out of the shards' arrays, in global order, one shard in memory at a time."""
    names = list(names)
    total = parts.request.total * len(names)
    done = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in names:
            with ExitStack() as stack:
                member: Any = None
                for shard in parts.request.shards:
                    array = parts.read(shard, name)
                    if member is None:
                        shape = (parts.request.total, *array.shape[1:])
                        member = stack.enter_context(npz_member(archive, name, shape, array.dtype))
                    member.write(np.ascontiguousarray(array).data)
                    done += len(array)
                    if progress is not None:
                        progress(done // len(names), total // len(names))


@contextmanager
def npz_member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Any]:
    """A member of an npz, header written; without a date, so that equal arrays give equal files."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


def _write_grid(parts: Parts, path: Path) -> None:
    """One PNG of all samples; with stages, one row per sample that shows it after each scale."""
    from mvar_core.io.pictures import save_grid

    request = parts.request
    name = "stages" if request.stages else "arr_0"
    images = np.concatenate([parts.read(shard, name) for shard in request.shards])
    if request.stages:
        images = np.stack([strip(stages) for stages in images])
    save_grid(images, path, grid_columns(request.groups, request.num, request.stages))


def grid_columns(groups: int, num: int, stages: bool) -> int:
    """Images per row of a grid: a row per group, as a class is one, where that is legible."""
    if stages:
        return 1
    return num if 1 < num <= 24 and groups > 1 else math.ceil(math.sqrt(groups * num))


class NpzWriter:
    """One npz whose arrays grow batch by batch: `arr_0`, `labels` and, where asked for, `tokens`.

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
        self.first_member = ExitStack()
        self.waiting: dict[str, tuple[Any, tuple[int, ...], np.dtype]] = {}
        self.count = 0

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.first_member.close()
        self.open_files.close()

    def write(self, images: NDArray, labels: NDArray, tokens: NDArray) -> None:
        """Take one batch, in order: images (B,H,W,3) uint8, labels (B,), tokens (B,L)."""
        if self.images is None:
            shape = (self.total, *images.shape[1:])
            self.images = self.first_member.enter_context(npz_member(self.archive, "arr_0", shape, images.dtype))
        self.images.write(np.ascontiguousarray(images).tobytes())
        arrays: Mapping[str, NDArray | None] = {
            "labels": labels.astype(np.int64),
            "tokens": tokens.astype(np.int32) if self.save_tokens else None,
        }
        for name, array in arrays.items():
            if array is None:
                continue
            if name not in self.waiting:
                file = self.open_files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
                self.waiting[name] = (file, array.shape[1:], array.dtype)
            self.waiting[name][0].write(np.ascontiguousarray(array).tobytes())
        self.count += len(images)

    def close(self) -> None:
        """Put the waiting arrays behind the images."""
        assert self.count == self.total, (self.count, self.total)
        self.first_member.close()
        for name, (file, shape, dtype) in self.waiting.items():
            with npz_member(self.archive, name, (self.total, *shape), dtype) as member:
                file.seek(0)
                shutil.copyfileobj(file, member, 1 << 20)
        self.open_files.close()
