"""Writing a token cache: every view of every image as token indices, in shards that any number of processes make.

A shard is done when its receipt is there, which is written after its files; the manifest is written when all receipts
are. Every file appears whole under its name. So a run that was stopped at any moment resumes where it stopped, and what
it leaves behind does not depend on when it was stopped or on how many processes shared the work.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mvar_core import distributed
from mvar_core.config import ModelConfig
from mvar_core.config.training import DataConfig
from mvar_core.data.images import row_batches
from mvar_core.data.sources import ImageSource, Report
from mvar_core.data.tokens import (
    ITEMS,
    MANIFEST,
    PARTIAL,
    RECEIPT,
    RECEIPTS,
    VECTORS,
    VERSION,
    VERSION_WITH_VECTORS,
    FileEntry,
    Manifest,
    Shard,
    TokenCache,
    find_problem,
    smallest_unsigned,
)
from mvar_core.data.transforms import Views
from mvar_core.data.vectors import Vectors
from mvar_core.errors import DataError
from mvar_core.io.files import atomic_path, naming, require_new_directory, write_json
from mvar_core.io.pixels import from_uint8
from mvar_core.io.resumable import Resumable
from mvar_core.progress import Progress, stage
from mvar_core.untrusted import check_whole

logger = logging.getLogger("mvar")

Encode = Callable[[Tensor], Tensor]
"""Images float32 (B, 3, H, W) in [-1, 1] → tokens (B, L), integers."""

OWN_FILES = (
    MANIFEST, PARTIAL, ITEMS, RECEIPTS, VECTORS, "tokens-*.npy", "labels-*.npy", "names-*.txt", "vectors-*.npy"
)  # fmt: skip

SHARD_BYTES = 32 * 2**20
LARGEST_SHARD = 65_536
SMALLEST_SHARD = 256
SHARDS_WANTED = 64
"""A process works on a shard at a time, and a crash loses one: so small sets are cut into this many too."""

SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(eq=False)
class CacheWriter(Resumable):
    """Encodes all views of all images into a token cache, alone or as one of several processes.

    Rank 0 calls `prepare` and broadcasts the result; each process calls `accept` with it, `check`, `write` and
    `finish`. The record of the unfinished work is the manifest without its files. No batch of `batch_size` views spans
    two shards; `images_per_shard` is by default that of the cache that is there, else as `default_shard`.
    """

    out: Path
    source: ImageSource
    encode: Encode
    _: KW_ONLY
    config: ModelConfig
    tokenizer_hash: str
    data: DataConfig
    seed: int = 0
    batch_size: int = 64
    images_per_shard: int | None = None
    skip_bad: bool = False
    vectors: Vectors | None = None
    tokenizer: str | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1, 2**20)
        config, source = self.config, self.source
        self.views = Views(self.data, self.seed)
        self.dtype = smallest_unsigned(config.tokenizer.codebook_size - 1)
        bytes_per_image = len(self.views) * config.pyramid.num_tokens * self.dtype.itemsize
        self.manifest = Manifest(
            version=VERSION if self.vectors is None else VERSION_WITH_VECTORS,
            vectors=self.vectors.entry if self.vectors is not None else None,
            tokenizer_hash=self.tokenizer_hash, tokenizer=self.tokenizer and _line(self.tokenizer),
            patch_sizes=config.pyramid.patch_sizes, codebook_size=config.tokenizer.codebook_size,
            image_size=config.image_size, class_names=source.class_names, images=len(source),
            views=len(self.views), view_names=self.views.names, data=self.data, seed=self.seed, dtype=self.dtype.name,
            source=_line(f"{source.name}:{source.split}"), fingerprint=source.fingerprint(),
            images_per_shard=self.images_per_shard or default_shard(bytes_per_image, len(source)),
        )  # fmt: skip
        super().__init__(self.out, self.manifest.to_json(), 0, record_file=PARTIAL, piece_name=RECEIPT)

    def is_whole(self, number: int) -> bool:
        """Whether a shard's receipt can be read and its files are as they were written."""
        shard = Shard.read(self.piece(number))
        return shard is not None and find_problem(shard.files, self.directory, verify=True) is None

    def difference(self) -> str:
        """How the cache that is there differs in what its tokens depend on."""
        return Manifest.read(self.record_path).differences(self.manifest) if self.begun else ""

    def clear(self) -> None:
        """Remove the files of a cache, and nothing else that is there."""
        for pattern in OWN_FILES:
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)

    def prepare(self, overwrite: bool = False) -> tuple[int, tuple[int, ...]]:
        """Look at what is there, make room; returns the images per shard, and the shards that are missing.

        DataError where `out` holds something else, or another process works there.
        """
        out = self.directory
        self.acquire()
        complete = (out / MANIFEST).exists()
        if not complete and not self.begun:
            require_new_directory(out, overwrite)
        try:
            if complete and overwrite:
                raise DataError(f"{out} is to be replaced.")
            if complete or self.begun:
                self._require_same(complete)
        except DataError as error:
            if not overwrite:
                raise DataError(error.message, "Choose another --out, or add --overwrite to replace it.") from None
            self.clear()
            complete = False
        self.accept(self.manifest.images_per_shard, ())
        if complete:
            self._tidy()
            return self.manifest.images_per_shard, ()
        done = self.begin()
        if self.vectors is not None and self.vectors.entry.of == "class":
            self._save(VECTORS, self.vectors.values)
        if done:
            logger.info("%s: resuming after %d of %d images.", out, self._images(done), len(self.source))
        return self.manifest.images_per_shard, tuple(number for number in self.pieces if number not in done)

    def _require_same(self, complete: bool) -> None:
        """Refuse a cache that is damaged or of other settings; the size of its shards is taken over."""
        out = self.directory
        there = TokenCache.open(out, verify=False).manifest if complete else Manifest.read(self.record_path)
        if not complete and there.version < VERSION:
            raise DataError(f"{out} holds an unfinished token cache of an earlier version of mvar.")
        if self.images_per_shard is None:
            self.manifest = self.manifest.model_copy(update={"images_per_shard": there.images_per_shard})
        if found := there.differences(self.manifest):
            kind = "a token cache" if complete else "an unfinished token cache"
            raise DataError(f"{out} holds {kind} made with other settings: {found}.")

    def accept(self, images_per_shard: int, pending: tuple[int, ...]) -> None:
        """What is left to do, as `prepare` returns it."""
        self.manifest = self.manifest.model_copy(update={"images_per_shard": images_per_shard})
        self.record = self.manifest.to_json()
        self.pieces = range(-(-len(self.source) // images_per_shard))
        self.pending = pending
        self.share = pending[self.rank :: self.world_size]

    def check(self, progress: Report | None = None) -> None:
        """Look for damaged images among those to encode here, unless they may be left out."""
        if self.pending and not self.begun:
            raise DataError(
                f"{self.directory} was prepared by process 0, and process {self.rank} does not see it.",
                "Use an --out on storage that all machines share.",
            )
        if not self.skip_bad and self.pending:
            self.source.check(progress, [image for number in self.share for image in self.images_of(number)])

    def write(self, progress: Report | None = None) -> None:
        """Encode and write this process's shards; `progress` counts the images of all, as far as is known."""
        views = len(self.views)
        bad: dict[int, DataError] = {}
        batches = row_batches(
            self.source,
            self.config.image_shape,
            (rows for number in self.share for rows in self._batches(self.images_of(number))),
            self.views,
            bad.__setitem__ if self.skip_bad else None,
        )
        for number in self.share:
            images = self.images_of(number)
            tokens = np.empty((len(images) * views, self.config.pyramid.num_tokens), self.dtype)
            filled, looked, finished = 0, -math.inf, 0
            for _ in self._batches(images):
                pixels, rows = next(batches)
                if pixels is not None:
                    tokens[filled : filled + len(rows)] = self._encoded(from_uint8(pixels))
                    filled += len(rows)
                if progress is not None:
                    if time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                        looked, finished = time.monotonic(), self._images(self.present())
                    progress(finished + filled // views, len(self.source))
            for image in filter(bad.__contains__, images):
                logger.warning("Left out: %s", bad[image].message)
            kept = [image for image in images if image not in bad]
            self._write_shard(number, tokens[:filled].reshape(len(kept), views, tokens.shape[1]), kept, images)

    def finish(self) -> tuple[Manifest, int]:
        """Wait for all processes; rank 0 writes the manifest. Returns it, and how many images were encoded now."""
        path = self.directory / MANIFEST
        while not path.exists():
            if self.rank == 0 and len(self.present()) == len(self.pieces):
                self._complete()
            else:
                time.sleep(0.2)
        return Manifest.read(path), self._images(self.pending)

    def _complete(self) -> None:
        shards = tuple(filter(None, map(Shard.read, map(self.piece, self.pieces))))
        assert len(shards) == len(self.pieces)
        images = sum(shard.images for shard in shards)
        if not images:
            raise DataError(f"None of the {len(self.source)} images of {self.source.name} could be read.")
        update: dict[str, Any] = {"images": images, "skipped": len(self.source) - images, "shards": shards}
        if self.manifest.vectors is not None and self.manifest.vectors.of == "class":
            entry = FileEntry.of(self.directory / VECTORS)
            update["vectors"] = self.manifest.vectors.model_copy(update={"file": entry})
        write_json(self.directory / MANIFEST, self.manifest.model_copy(update=update).to_json())
        self._tidy()

    def _tidy(self) -> None:
        """Remove what only an unfinished cache needs."""
        for path in (*self.directory.glob(RECEIPTS), self.record_path):
            path.unlink(missing_ok=True)
        self.release()

    def images_of(self, number: int) -> range:
        """The images of a shard."""
        size = self.manifest.images_per_shard
        return range(number * size, min((number + 1) * size, len(self.source)))

    def _images(self, numbers: Iterable[int]) -> int:
        return sum(len(self.images_of(number)) for number in numbers)

    def _batches(self, images: range) -> Iterator[NDArray[np.int64]]:
        start, stop = images.start * len(self.views), images.stop * len(self.views)
        for first in range(start, stop, self.batch_size):
            yield np.arange(first, min(first + self.batch_size, stop))

    def _encoded(self, images: Tensor) -> NDArray[np.integer]:
        tokens: NDArray[np.integer] = self.encode(images).cpu().numpy()
        expected = (len(images), self.config.pyramid.num_tokens)
        if tokens.shape != expected or tokens.min() < 0 or tokens.max() >= self.config.tokenizer.codebook_size:
            raise DataError(
                f"The tokenizer gave {tokens.shape} tokens from {tokens.min()} to {tokens.max()}; expected {expected}"
                f" below {self.config.tokenizer.codebook_size}.",
                "Its weights do not fit its config.json.",
            )
        return tokens

    def _write_shard(self, number: int, tokens: NDArray[np.unsignedinteger], kept: list[int], images: range) -> None:
        names = [_line(self.source.item_names[image]) for image in images]
        label_dtype = smallest_unsigned(len(self.source.class_names) - 1)
        arrays: dict[str, NDArray[Any]] = {"tokens": tokens, "labels": self.source.labels[kept].astype(label_dtype)}
        if self.vectors is not None and self.vectors.entry.of == "image":
            arrays["vectors"] = np.ascontiguousarray(self.vectors.values[kept, 0])
        shard = Shard(
            images=len(kept),
            **{kind: self._save(f"{kind}-{number:05d}.npy", array) for kind, array in arrays.items()},
            names=self._save(f"names-{number:05d}.txt", [names[image - images.start] for image in kept]),
            skipped=tuple(names[image - images.start] for image in sorted(set(images).difference(kept))),
        )
        write_json(self.piece(number), shard.model_dump(mode="json", exclude_none=True))

    def _save(self, name: str, content: NDArray[Any] | list[str]) -> FileEntry:
        """Write a file, which is on the disk before it has its name: a receipt must not outlive its files."""
        path = self.directory / name
        with atomic_path(path, durable=True) as temporary, temporary.open("wb") as file:
            if isinstance(content, list):
                file.writelines(f"{line}\n".encode() for line in content)
            else:
                np.save(file, content)
        return FileEntry.of(path)


def write_token_cache(
    out: Path,
    source: ImageSource,
    encode: Encode,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Manifest, int]:
    """Encode all views of all images into a token cache; the processes that are connected share the work.

    The same call again resumes where it was interrupted, and leaves a complete cache of the same settings as it is.
    `options` are those of `CacheWriter`; returns what its `finish` does.
    """
    world = distributed.world()
    writer = CacheWriter(out, source, encode, rank=world.rank, world_size=world.world_size, **options)
    try:
        with naming(out):
            writer.accept(*world.run_on_rank_zero(lambda: writer.prepare(overwrite)))
            writer.check(stage(progress, "checking images"))
            writer.write(stage(progress, "tokenizing"))
            return writer.finish()
    finally:
        writer.release()


def default_shard(bytes_per_image: int, images: int) -> int:
    """Images in a shard: a power of two, for some tens of megabytes, and fewer where the images are few."""
    fits = min(max(SHARD_BYTES // bytes_per_image, 1), LARGEST_SHARD)
    wanted = max(SMALLEST_SHARD, -(-images // SHARDS_WANTED))
    return 1 << (min(fits, wanted).bit_length() - 1)


def _line(name: str) -> str:
    """A file's name as one line of UTF-8, whatever bytes it has."""
    return name.replace("\n", "\\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
