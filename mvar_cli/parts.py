"""Samples on their way: shards of consecutive images in a directory beside the output, so that a run can go on.

Samples are numbered globally and cut into shards, whose size depends on the number of samples alone. A shard is done
once its file stands under its name, and is the same whoever draws it: a run that was stopped draws what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mvar_core.errors import DataError
from mvar_core.io.files import atomic_path, read_json, write_json

MANIFEST = "manifest.json"
PUBLISHING = "publishing.json"
LOCK = "lock"
LARGEST_SHARD = 64
SHARDS_WANTED = 64
"""An interruption costs what is in unfinished shards: small runs have small ones."""


@dataclass(frozen=True)
class Request:
    """Everything that the bytes of the output depend on.

    Attributes:
        model: Name of the model.
        weights: Fingerprint of its files.
        classes: Labels in the order asked for.
        num: Images of each.
        settings: How to draw: guidance, filters, seed.
        output: The format: png, npz or grid.
        save_tokens: Also the tokens.
        stages: Also each sample after every scale.
        image_shape: Height and width in pixels.
        scales: Number of scales, S.
        tokens: Tokens of an image, L.
        device: Kind of device: others round otherwise.
        dtype: Of the activations.
        attention: The backend, as asked for.
        version: The mvar that draws.
        names: What files are called by, one name for each of `classes`; None for their labels.
        vectors: float32 (classes, X) of a model that is conditioned on vectors, one for each of `classes`.
    """

    model: str
    weights: str
    classes: tuple[int, ...]
    num: int
    settings: dict[str, Any]
    output: str
    save_tokens: bool
    stages: bool
    image_shape: tuple[int, int]
    scales: int
    tokens: int
    device: str
    dtype: str
    attention: str
    version: str
    names: tuple[str, ...] | None = field(default=None, kw_only=True)
    vectors: NDArray[np.float32] | None = field(default=None, kw_only=True)

    @property
    def groups(self) -> int:
        """How many times `num` samples there are."""
        return len(self.classes)

    @property
    def total(self) -> int:
        """Number of samples, N."""
        return self.groups * self.num

    @property
    def shard_size(self) -> int:
        """Samples in every shard but the last."""
        return min(LARGEST_SHARD, max(1, self.total // SHARDS_WANTED))

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(math.ceil(self.total / self.shard_size))

    def span(self, shard: int) -> range:
        """Global numbers of a shard's samples."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.total))

    @cached_property
    def entries(self) -> NDArray[np.int64]:
        """Which of `classes` each sample is of (N,)."""
        return np.repeat(np.arange(len(self.classes)), self.num)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class label of each sample (N,); -1 where a text or vector is no class."""
        return np.asarray(self.classes, np.int64)[self.entries]

    def conditions_of(self, indices: Sequence[int]) -> NDArray[np.float32] | None:
        """The vectors of some samples; None where their labels say what they are."""
        return None if self.vectors is None else self.vectors[self.entries[np.asarray(indices, np.int64)]]

    @property
    def known(self) -> dict[str, NDArray]:
        """Arrays of the output that are known before anything is drawn, N rows each."""
        return {"labels": self.labels}

    def file_name(self, index: int) -> str:
        """Name of one sample's PNG."""
        return f"{self.number(index)}_{self.condition_name(index)}.png"

    def condition_name(self, index: int) -> str:
        """What one sample's file is called by: its class, or its text."""
        return str(self.labels[index]) if self.names is None else self.names[self.entries[index]]

    def number(self, index: int) -> str:
        """A sample's global number, with zeros before it."""
        return f"{index:0{max(5, len(str(self.total - 1)))}d}"

    def raw_bytes(self) -> int:
        """Bytes of one sample's arrays."""
        pixels = self.image_shape[0] * self.image_shape[1] * 3
        return pixels * (1 + (self.scales if self.stages else 0)) + 8 + (4 * self.tokens if self.save_tokens else 0)

    def manifest(self) -> dict[str, Any]:
        """As JSON writes it."""
        values = {"format": "mvar-samples", **asdict(self), "shard_size": self.shard_size}
        if self.vectors is not None:
            values["vectors"] = hashlib.sha256(np.ascontiguousarray(self.vectors).tobytes()).hexdigest()
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


class Parts:
    """The directory of a run's shards.

    Args:
        target: The output: a file, or a directory for png.
        request: What is drawn.
    """

    def __init__(self, target: Path, request: Request):
        self.target = target
        self.request = request
        self.directory = parts_directory(target)
        self.images = self.directory / "images"
        self.strips = self.directory / "strips"
        self._lock: IO[str] | None = None

    def difference(self) -> str:
        """How the run that was started here differs from what is asked, in words; empty where it does not."""
        path = self.directory / MANIFEST
        if not path.is_file():
            return ""
        there, here = read_json(path), self.request.manifest()
        if not isinstance(there, dict):
            return f"{path} is no manifest"
        return "; ".join(_differences(there, here))

    def require_same(self, overwrite: bool) -> None:
        """Refuse to go on with a run that draws something else.

        Raises:
            DataError: Names what differs.
        """
        difference = self.difference()
        if difference and not overwrite:
            raise DataError(
                f"{self.directory} holds an unfinished run with other settings: {difference}.",
                "Give those settings to go on with it, or add --overwrite to begin anew.",
            )

    def require_space(self, finished: int) -> None:
        """Refuse to start what the disk has no room for.

        Args:
            finished: Samples that are there already.

        Raises:
            DataError: Names what is free and what is needed.
        """
        from mvar_cli.old_console import format_bytes

        total, each = self.request.total, self.request.raw_bytes()
        # PNG files of photographs take half of their pixels or more; an npz is put together while its shards lie there.
        needed = (total - finished) * each // 2 if self.request.output == "png" else (2 * total - finished) * each
        below = next(path for path in (self.directory.absolute(), *self.directory.absolute().parents) if path.exists())
        free = shutil.disk_usage(below).free
        if needed > free:
            raise DataError(
                f"{below} has {format_bytes(free)} free; {total} samples as {self.request.output} need about"
                f" {format_bytes(needed)} until they are put together.",
                "Free some, or choose another --out or a smaller --num.",
            )

    def start(self) -> None:
        """Make the directory, or take it up again; what belongs to another run, or is not whole, is removed.

        Raises:
            DataError: Another process is at work in it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock_directory()
        if self.difference() or not (self.directory / MANIFEST).is_file():
            for path in self.directory.iterdir():
                if path.name != LOCK:
                    remove(path)
            write_json(self.directory / MANIFEST, self.request.manifest())
        for stray in self.directory.glob(".*.tmp"):
            remove(stray)
        (self.directory / PUBLISHING).unlink(missing_ok=True)
        if self.request.output == "png":
            self.images.mkdir(exist_ok=True)
            if self.request.stages:
                self.strips.mkdir(exist_ok=True)

    def shard_path(self, shard: int) -> Path:
        """The file whose presence says that a shard is done."""
        return self.directory / f"shard-{shard:06d}.npz"

    def present(self) -> set[int]:
        """Shards whose file is there, by its name alone."""
        numbers = (path.name[6:-4] for path in self.directory.glob("shard-*.npz"))
        return {int(number) for number in numbers if number.isdigit() and int(number) in self.request.shards}

    def intact(self) -> set[int]:
        """Shards that are whole, with every file they speak of; a machine that lost power may leave others."""
        return {shard for shard in self.present() if self._is_whole(shard)}

    def samples_in(self, shards: Sequence[int] | set[int]) -> int:
        """How many samples some shards hold."""
        return sum(len(self.request.span(shard)) for shard in shards)

    def write(
        self,
        shard: int,
        images: NDArray[np.uint8],
        tokens: NDArray[np.integer],
        stages: NDArray[np.uint8] | None,
    ) -> None:
        """Write one shard; its own file comes last, whole or not at all.

        Args:
            shard: Its number.
            images: uint8 (B, H, W, 3).
            tokens: (B, L).
            stages: uint8 (B, S, H, W, 3), where asked for.
        """
        arrays: dict[str, Any] = {}
        if self.request.save_tokens:
            arrays["tokens"] = tokens.astype(np.int32)
        if self.request.output == "png":
            arrays["sizes"] = np.array(
                [
                    self._write_pictures(index, images[row], stages[row] if stages is not None else None)
                    for row, index in enumerate(self.request.span(shard))
                ],
                np.int64,
            )
        else:
            arrays["arr_0"] = images
            if stages is not None:
                arrays["stages"] = stages
        with atomic_path(self.shard_path(shard)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, shard: int, name: str) -> NDArray:
        """One array of a shard; what is known before it is drawn follows from the request."""
        if name in self.request.known:
            span = self.request.span(shard)
            return self.request.known[name][span.start : span.stop]
        with np.load(self.shard_path(shard), allow_pickle=False) as file:
            return file[name]

    def remove(self) -> None:
        """Remove the directory and let others have its name."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.release()

    def remove_if_empty(self) -> None:
        """Remove the directory where no shard would be lost with it."""
        if self._lock is not None and not self.present():
            self.remove()

    def release(self) -> None:
        """Let other processes work here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _lock_directory(self) -> None:
        import fcntl

        self._lock = (self.directory / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise DataError(
                f"Another process is at work in {self.directory}.",
                "Wait for it, or choose another --out; several processes share a run under torchrun.",
            ) from None
        except OSError:  # a file system without locks
            self.release()

    def _write_pictures(
        self, index: int, image: NDArray[np.uint8], stages: NDArray[np.uint8] | None
    ) -> tuple[int, int]:
        """The sample's PNG and, where asked for, that of its stages; returns their bytes."""
        from PIL import Image

        name = self.request.file_name(index)
        Image.fromarray(image).save(self.images / name)
        size = (self.images / name).stat().st_size
        if stages is None:
            return size, 0
        Image.fromarray(strip(stages)).save(self.strips / name)
        return size, (self.strips / name).stat().st_size

    def _is_whole(self, shard: int) -> bool:
        try:
            # A zip's directory stands at its end: one that was cut short has none.
            with zipfile.ZipFile(self.shard_path(shard)):
                pass
            if self.request.output != "png":
                return True
            names = [self.request.file_name(index) for index in self.request.span(shard)]
            for name, (image, stages) in zip(names, self.read(shard, "sizes").tolist(), strict=True):
                if (self.images / name).stat().st_size != image:
                    return False
                if self.request.stages and (self.strips / name).stat().st_size != stages:
                    return False
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False
        return True


def parts_directory(target: Path) -> Path:
    """Where the shards of an output lie: beside it, under a hidden name."""
    return target.with_name(f".{target.name}.parts")


def strip(stages: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One sample's stages (S,H,W,3) side by side as one image (H, S·W, 3)."""
    return np.concatenate(list(stages), axis=1)


def remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs, key by key, the settings each by their own name."""
    there, here = ({**values, **values.get("settings", {})} for values in (there, here))
    keys = [key for key in dict.fromkeys([*here, *there]) if key not in ("settings", "shard_size")]
    return [
        f"{key.replace('_', ' ')} is {_short(there.get(key))} there, {_short(here.get(key))} asked"
        for key in keys
        if there.get(key) != here.get(key)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= 40 else text[:37] + "…"
