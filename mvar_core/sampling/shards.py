"""Samples on their way to an output: shards of consecutive images next to it, and the output that is made of them.

Samples are numbered globally and cut into shards, whose size depends on their number alone. A shard has the same bytes
whoever makes it. The finished output is marked with a hash of everything that it depends on, so that the same command
finds it done.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mvar_core.config import recorded
from mvar_core.data.decoding import EXTENSIONS
from mvar_core.data.evaluation_images import CLASSES_FILE
from mvar_core.errors import ConfigError, DataError
from mvar_core.formatting import format_bytes
from mvar_core.io.files import atomic_path, remove, require_new_directory, write_json
from mvar_core.io.npz import npz_member
from mvar_core.io.pixels import make_grid
from mvar_core.io.resumable import Resumable
from mvar_core.sampling.images import Samples, join_samples

FORMATS = ("png", "npz", "grid")
TOKENS_FILE = "tokens.npz"
MARK = "mvar-samples"
"""What the mark of a finished output begins with: the comment of an npz, a text in the (first) PNG."""
LARGEST_SHARD = 64
SHARDS_WANTED = 64
"""An interruption costs what is in unfinished shards: small runs have small ones."""
SECONDS_BETWEEN_LOOKS = 0.5
"""How often a process looks for what the others have finished."""

Generate = Callable[[Sequence[int], Callable[[int, int], None]], Iterable[Samples]]
"""generate(indices, progress) yields the samples of these global numbers, in order and in batches of any size."""


@dataclass(frozen=True)
class SampleOutput:
    """Where samples go: what the user named, and the format (png, npz or grid)."""

    out: Path
    format: str

    @classmethod
    def of(cls, out: Path, asked: str | None = None, save_tokens: bool = False) -> SampleOutput:
        """An output in the format that is asked for, by default the one that the name's ending suggests.

        ConfigError or DataError where format, path and what is to be saved contradict each other.
        """
        form = asked or {".npz": "npz", ".png": "grid"}.get(out.suffix.lower(), "png")
        if save_tokens and form == "grid":
            raise ConfigError("--format grid cannot hold tokens.", "Use --format png or npz, or omit --save-tokens.")
        if form not in FORMATS:
            raise DataError(f"--format {form!r} is not known.", f"Use {', '.join(FORMATS)}.")
        output, suffix = cls(out, form), {"png": "", "npz": ".npz", "grid": ".png"}[form]
        if form == "png":
            if out.suffix.lower() in (*EXTENSIONS, ".gif", ".npz"):
                raise DataError(f"--out {out} names a file, but --format png writes a directory of them.",
                                "Use a directory, or --format grid or npz.")  # fmt: skip
            if out.is_mount() or not out.name:
                raise DataError(f"--out {out} cannot be replaced by a directory of samples.", "Use a directory in it.")
        elif out.suffix.lower() not in ("", suffix):
            raise DataError(f"--out {out} does not end in {suffix}, which --format {form} writes.")
        elif output.target.is_dir():
            raise DataError(f"{output.target} is a directory; expected a file to write.", "Choose another --out.")
        elif not out.suffix and out.is_file():
            raise DataError(f"{out} is a file; expected a directory.", "Choose another --out.")
        return output

    @property
    def target(self) -> Path:
        """The file, or for png the directory, that will be written."""
        if self.format == "png" or self.out.suffix:
            return self.out
        return self.out / ("samples.npz" if self.format == "npz" else "grid.png")

    @property
    def strips(self) -> Path:
        """The directory for strips of PNG samples: not among the samples, which are measured as they are."""
        return self.out.with_name(f"{self.out.name}-stages")

    @property
    def shards(self) -> Path:
        """The directory for shards: hidden, next to the target."""
        return self.target.with_name(f".{self.target.name}.parts")

    def mark(self) -> str | None:
        """What a finished output is marked with; None where there is none, or other files."""
        try:
            path = min(self.target.glob("*.png")) if self.format == "png" else self.target
            if not path.is_file():  # a pipe would be waited for
                return None
            if self.format == "npz":
                with zipfile.ZipFile(path) as archive:
                    return archive.comment.decode("ascii") or None
            with Image.open(path, formats=("PNG",)) as image:
                return image.info.get(MARK)
        except (OSError, ValueError, zipfile.BadZipFile):
            return None

    def require_free(self, overwrite: bool) -> None:
        """Refuse an output that exists, unless it may be replaced; its shards do not count."""
        if self.format == "png":
            require_new_directory(self.out, overwrite)
            require_new_directory(self.strips, overwrite)
        elif not overwrite:
            hint = "Choose another --out, or add --overwrite to replace it."
            if self.target.exists():
                raise DataError(f"{self.target} already exists, with other content.", hint)
            if self.target != self.out and self.out.is_dir() and {*self.out.iterdir()} - {self.shards}:
                raise DataError(f"{self.out} is not empty.", hint)


@dataclass(frozen=True)
class SampleSpec:
    """Everything that the bytes of the output depend on; the record by which a run is recognised.

    `weights` is a fingerprint of the model's files, `output` the format, and `device` the kind: others round otherwise.
    `settings` are guidance, filters and seed. `classes` are labels in the order asked for, with `num` images each, -1
    for a text or vector that is no class; files are named after `names`, or else labels. `vectors`, float32 (classes,
    X), are there for a model that is conditioned on them. `class_names`, written next to labels, follow from `weights`.
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
    class_names: tuple[str, ...] | None = field(default=None, kw_only=True)

    @property
    def groups(self) -> int:
        """How many conditions get `num` samples each."""
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
        """Class label of each sample (N,)."""
        return np.asarray(self.classes, np.int64)[self.entries]

    def conditions(self, indices: Sequence[int]) -> dict[str, Any]:
        """Arguments of `Pipeline.stream` that say what some samples are conditioned on."""
        rows = np.asarray(indices, np.int64)
        vectors = None if self.vectors is None else self.vectors[self.entries[rows]]
        return {"labels": self.labels[rows].tolist(), "conditions": vectors}

    @cached_property
    def known(self) -> dict[str, NDArray]:
        """Arrays of the output that are known before anything is sampled, N rows each."""
        return {"labels": self.labels}

    def file_name(self, index: int) -> str:
        """Name of one sample's PNG: its global number, padded with zeros, and its subject."""
        return f"{index:0{max(5, len(str(self.total - 1)))}d}_{self.subject(index)}.png"

    def subject(self, index: int) -> str:
        """What one sample's file is named after: its class, or its text."""
        return str(self.labels[index]) if self.names is None else self.names[self.entries[index]]

    @property
    def raw_bytes(self) -> int:
        """Bytes of one sample's arrays."""
        pixels = self.image_shape[0] * self.image_shape[1] * 3
        return pixels * (1 + (self.scales if self.stages else 0)) + 8 + (4 * self.tokens if self.save_tokens else 0)

    def record(self) -> dict[str, Any]:
        """The record by which an interrupted run is recognised."""
        values = {"format": "mvar-samples", **asdict(self), "shard_size": self.shard_size}
        values["settings"] = recorded(self.settings)
        del values["class_names"]
        if self.vectors is not None:
            values["vectors"] = hashlib.sha256(np.ascontiguousarray(self.vectors).tobytes()).hexdigest()
        return values


class SampleShards(Resumable):
    """The shards of a run, in a directory next to its output."""

    def __init__(self, output: SampleOutput, spec: SampleSpec, overwrite: bool = False):
        super().__init__(
            output.shards,
            spec.record(),
            len(spec.shards),
            piece_name="shard-{:06d}.npz",
            ignore=("null_label", "no_class"),  # one thing by its present and its former name; the model decides it
        )
        self.output = output
        self.spec = spec
        self.overwrite = overwrite
        self.images = self.directory / "images"
        self.strips = self.directory / "strips"
        folders = (self.images, self.strips) if spec.stages else (self.images,)
        self._folders = folders if output.format == "png" else ()
        counted = {key: value for key, value in self.record.items() if key not in self.ignore}
        self.mark = f"{MARK} {hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()}"
        self._begun_here = False

    def is_finished(self) -> bool:
        """Whether the output is there, whole, and of this very run, whose shards are then removed."""
        if self.output.mark() != self.mark or not all(path.exists() for path in self.outputs()):
            return False
        if self.directory.is_dir() and not self.difference():  # it was killed while it removed them
            with suppress(DataError):
                self.acquire()
                self.discard()
        return True

    def check(self) -> set[int]:
        """The shards that are done; refuses an output that exists, other settings, and a disk that is too small."""
        if not self.overwrite:
            self.require_same()
        if not self.difference() and self.is_assembled():
            return set(self.pieces)
        self.output.require_free(self.overwrite)
        done = self.done()
        total, each = self.spec.total, self.spec.raw_bytes
        # PNG files of photographs have half the size of their pixels or more; an npz is assembled next to its shards.
        finished = self.samples_in(done)
        needed = (total - finished) * each // 2 if self.output.format == "png" else (2 * total - finished) * each
        above = next(path for path in (self.directory.absolute(), *self.directory.absolute().parents) if path.exists())
        free = shutil.disk_usage(above).free
        if needed > free:
            raise DataError(
                f"{above} has {format_bytes(free)} free; {total} samples as {self.output.format} need about"
                f" {format_bytes(needed)} until they are assembled.",
                "Free some space, or choose another --out or a smaller --num.",
            )
        return done

    def begin(self) -> set[int]:
        """As of `Resumable`; DataError where another process has finished the output in the meantime."""
        self.acquire()
        self._begun_here = True
        if not self.difference() and self.is_assembled():
            return set(self.pieces)
        if not self.overwrite and self.output.mark() == self.mark:
            raise DataError(f"Another process has just finished {self.output.target}.", "Nothing is left to do.")
        done = super().begin()
        for folder in self._folders:
            folder.mkdir(exist_ok=True)
        return done

    def is_whole(self, number: int) -> bool:
        """Whether a shard can be read to its end and every picture it lists is there."""
        try:
            with zipfile.ZipFile(self.piece(number)):
                pass  # a zip's directory is at its end: one that was cut short has none
            return self.output.format != "png" or self.read(number, "sizes").tolist() == self._sizes(number)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False

    def _sizes(self, shard: int) -> list[list[int]]:
        """Bytes of the pictures of a shard, and of their strips (0 where there are none)."""
        names = [self.spec.file_name(index) for index in self.spec.span(shard)]
        return [([(folder / name).stat().st_size for folder in self._folders] + [0])[:2] for name in names]

    def samples_in(self, shards: Iterable[int]) -> int:
        """How many samples some shards hold."""
        return sum(len(self.spec.span(shard)) for shard in shards)

    def write(self, shard: int, samples: Samples) -> None:
        """Write one shard; its own file comes last, whole or not at all."""
        arrays: dict[str, Any] = {}
        if self.spec.save_tokens:
            arrays["tokens"] = samples.tokens.numpy().astype(np.int32)
        if self.output.format == "png":
            for row, index in enumerate(self.spec.span(shard)):
                name = self.spec.file_name(index)
                text = None if index else self._text()
                Image.fromarray(samples.images[row].numpy()).save(self.images / name, pnginfo=text)
                if samples.stages is not None:
                    Image.fromarray(strip(samples.stages[row].numpy())).save(self.strips / name)
            arrays["sizes"] = np.array(self._sizes(shard), np.int64)
        else:
            arrays["arr_0"] = samples.images.numpy()
            if samples.stages is not None:
                arrays["stages"] = samples.stages.numpy()
        with atomic_path(self.piece(shard)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, shard: int, name: str) -> NDArray:
        """One array of a shard; what is known before it is sampled comes from the specification."""
        if name in self.spec.known:
            span = self.spec.span(shard)
            return self.spec.known[name][span.start : span.stop]
        with np.load(self.piece(shard), allow_pickle=False) as file:
            return file[name]

    def make(
        self,
        own: Sequence[int],
        kept: AbstractSet[int],
        generate: Generate,
        report: Callable[[int, int], None],
        *,
        threads: int = 1,
        wait: bool = False,
    ) -> None:
        """Generate the shards `own`; each is written by a thread as soon as it is complete.

        Batches may cross the borders of shards, so that how many samples run together does not depend on them. Shards
        that are neither `own` nor `kept` from before are made by other processes: `report(done, total)` is in samples
        of all, and with `wait` this returns when the others have made theirs too.
        """
        spec, resumed, others = self.spec, self.samples_in(kept), set(self.pieces) - kept - set(own)
        looked, made_by_others = time.monotonic(), 0

        def tell(done: int, total: int, between: float = SECONDS_BETWEEN_LOOKS) -> None:
            nonlocal looked, made_by_others
            if others and time.monotonic() - looked >= between:
                looked, made_by_others = time.monotonic(), self.samples_in(others & self.present())
            report(resumed + done + made_by_others, spec.total)

        tell(0, 0)
        waiting: list[Samples] = []
        remaining = iter(own)
        shard = next(remaining, None)
        submitted: deque[Future[None]] = deque()
        with ThreadPoolExecutor(threads, "mvar-writer") as pool:  # what was submitted is finished, however this ends
            for samples in generate([index for number in own for index in spec.span(number)], tell):
                waiting.append(samples)
                while shard is not None and sum(map(len, waiting)) >= (size := len(spec.span(shard))):
                    joined = join_samples(waiting)
                    while len(submitted) > threads:  # so that memory stays bounded
                        submitted.popleft().result()
                    submitted.append(pool.submit(self.write, shard, joined.rows(slice(size))))
                    waiting = [joined.rows(slice(size, None))]
                    shard = next(remaining, None)
        for future in submitted:
            future.result()
        while wait and others - self.present():
            time.sleep(SECONDS_BETWEEN_LOOKS / 5)
            tell(self.samples_in(own), 0, between=0)
        if wait:
            report(spec.total, spec.total)

    def leave(self) -> None:
        """Let others work here; without any shard, the directory is removed."""
        if self._begun_here and not self.present():
            self.discard()
        self.release()

    def outputs(self) -> list[Path]:
        """Every file of the finished output, in order."""
        target = self.output.target
        if self.output.format != "png":
            return [target]
        names = [self.spec.file_name(index) for index in range(self.spec.total)]
        tokens = [target / TOKENS_FILE] if self.spec.save_tokens else []
        strips = [self.output.strips / name for name in names] if self.spec.stages else []
        return [*(target / name for name in names), *tokens, *strips]

    def is_assembled(self) -> bool:
        """Whether a run was stopped between moving its images and moving their strips: only that is left to do."""
        moved = self.output.format == "png" and self.begun and not self.images.is_dir()
        return moved and self.present() == set(self.pieces)

    def assemble(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Make the output from its shards, one in memory at a time, give it its name, and remove the shards.

        DataError where an output has appeared under that name in the meantime.
        """
        made = self._folders or (self.directory / f"final{self.output.target.suffix}",)
        finals = dict(zip(made, (self.output.target, self.output.strips), strict=False))
        if not self.is_assembled():
            self._build(made[0], progress)
            for final in finals.values():
                if not self.overwrite and (final.is_file() or (final.is_dir() and any(final.iterdir()))):
                    raise DataError(f"{final} has appeared during sampling.",
                                    "Move it away and run the same command again.")  # fmt: skip
        for new, final in finals.items():
            if new.exists():
                old = self.directory / f"old-{new.name}"
                remove(old)
                if final.is_dir():
                    final.rename(old)
                new.replace(final)
        self.discard()

    def _build(self, path: Path, progress: Callable[[int, int], None] | None) -> None:
        """What the shards alone do not hold yet: the npz, the grid, or the tokens next to the images in `path`."""
        spec = self.spec
        if self.output.format == "grid":
            images = np.concatenate([self.read(shard, "stages" if spec.stages else "arr_0") for shard in self.pieces])
            if spec.stages:
                images = np.stack([strip(stages) for stages in images])
            grid = make_grid(images, grid_columns(spec.groups, spec.num, spec.stages))
            Image.fromarray(grid).save(path, pnginfo=self._text())
        elif self.output.format == "npz":
            tokens, stages = ("tokens",) if spec.save_tokens else (), ("stages",) if spec.stages else ()
            self._merge(("arr_0", *spec.known, *tokens, *stages), path, progress)
        else:
            if spec.class_names is not None and type(spec) is SampleSpec:  # edits are called by their images as well
                write_json(path / CLASSES_FILE, spec.class_names)
            if spec.save_tokens:
                self._merge(("tokens", *spec.known), path / TOKENS_FILE, progress)

    def _text(self) -> PngInfo:
        """The mark of a finished output, for a PNG."""
        text = PngInfo()
        text.add_text(MARK, self.mark)
        return text

    def _merge(self, names: Sequence[str], path: Path, progress: Callable[[int, int], None] | None) -> None:
        """One npz from the shards' arrays, in global order."""
        total, done = self.spec.total, 0
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.comment = self.mark.encode("ascii")
            for name in names:
                first = self.read(self.pieces[0], name)
                with npz_member(archive, name, (total, *first.shape[1:]), first.dtype) as member:
                    for shard in self.pieces:
                        array = self.read(shard, name)
                        member.write(np.ascontiguousarray(array).data)
                        done += len(array)
                        if progress is not None:
                            progress(done // len(names), total)
            if self.spec.class_names is not None:
                array = np.array(self.spec.class_names)
                with npz_member(archive, "class_names", array.shape, array.dtype) as member:
                    member.write(array.data)


def strip(stages: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One sample's stages (S, H, W, 3) next to each other as one image (H, S·W, 3)."""
    return np.concatenate(list(stages), axis=1)


def grid_columns(groups: int, num: int, stages: bool) -> int:
    """Images per row of a grid: one row per class or text where that is legible."""
    if stages:
        return 1
    return num if 1 < num <= 24 and groups > 1 else math.ceil(math.sqrt(groups * num))
