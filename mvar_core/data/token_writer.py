"""Writing a token cache: every view of every image as token indices, in shards that any number of processes make.

A shard is done when its receipt is there, which is written after its files; the manifest is written when all receipts
are. Every file appears whole under its name. So a run that was stopped at any moment resumes where it stopped, and what
it leaves behind does not depend on when it was stopped or on how many processes shared the work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
    smallest_unsigned,
)
from mvar_core.data.transforms import Views
from mvar_core.data.vectors import Vectors
from mvar_core.errors import DataError
from mvar_core.io.files import atomic_path, require_new_directory, write_json
from mvar_core.io.pixels import from_uint8
from mvar_core.io.resumable import LOCK_FILE, Resumable
from mvar_core.progress import Progress, stage

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


@dataclass(frozen=True)
class CacheSummary:
    """What writing a cache leaves behind.

    Attributes:
        bytes: Size of its tokens and labels.
        encoded: Images encoded by this call; the others were there already.
        skipped: Names of images that could not be read and were left out.
    """

    images: int
    views: int
    bytes: int
    encoded: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What is left to do for a cache; every process receives the same.

    Attributes:
        total: Images of the source.
        images_per_shard: Of these, in every shard but the last.
        pending: Numbers of the shards that are not there yet.
    """

    total: int
    images_per_shard: int
    pending: tuple[int, ...]

    @property
    def images(self) -> int:
        """Images that are still to be encoded."""
        return sum(len(self.images_of(number)) for number in self.pending)

    def images_of(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.images_per_shard, min((number + 1) * self.images_per_shard, self.total))


class UnfinishedCache(Resumable):
    """The shards of a cache that is being written; its record is the manifest without its files."""

    def __init__(self, out: Path, manifest: Manifest):
        shards = -(-manifest.images // manifest.images_per_shard)
        super().__init__(out, manifest.to_json(), shards, record_file=PARTIAL, piece_name=RECEIPT)
        self.manifest = manifest

    def is_whole(self, number: int) -> bool:
        """Whether a shard's receipt can be read and its files are as they were written."""
        shard = Shard.read(self.piece(number))
        return shard is not None and not shard.problem(self.directory, verify=True)

    def difference(self) -> str:
        """How the cache that is there differs in what its tokens depend on."""
        return Manifest.read(self.record_path).differences(self.manifest) if self.begun else ""

    def clear(self) -> None:
        """Remove the files of a cache, and nothing else that is there."""
        for pattern in OWN_FILES:
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)

    def complete(self) -> None:
        """Remove what only an unfinished cache needs."""
        self.release()
        for path in (*self.directory.glob(RECEIPTS), self.record_path, self.directory / LOCK_FILE):
            path.unlink(missing_ok=True)


class CacheWriter:
    """Encodes all views of all images into a token cache, alone or as one of several processes.

    Rank 0 calls `prepare` and broadcasts the result; each process calls `check`, `write` and `finish`. They must see
    the same directory.

    No batch of `batch_size` views spans two shards. `images_per_shard` is by default that of the cache that is there,
    else as many as make a shard some tens of megabytes, and fewer where the images are few. `skip_bad` leaves out
    images that cannot be read instead of raising an error; `vectors` are for models that are conditioned on them.
    """

    def __init__(
        self,
        out: Path,
        source: ImageSource,
        encode: Encode,
        *,
        config: ModelConfig,
        tokenizer_hash: str,
        data: DataConfig,
        seed: int = 0,
        batch_size: int = 64,
        images_per_shard: int | None = None,
        skip_bad: bool = False,
        vectors: Vectors | None = None,
        tokenizer: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.out = out
        self.source = source
        self.encode = encode
        self.config = config
        self.batch_size = batch_size
        self.images_per_shard = images_per_shard
        self.skip_bad = skip_bad
        self.vectors = vectors
        self.rank = rank
        self.world_size = world_size
        self.views = Views(data, seed)
        self.dtype = smallest_unsigned(config.tokenizer.codebook_size - 1)
        bytes_per_image = len(self.views) * config.pyramid.num_tokens * self.dtype.itemsize
        self.manifest = Manifest(
            version=VERSION if vectors is None else VERSION_WITH_VECTORS,
            vectors=vectors.entry() if vectors is not None else None,
            tokenizer_hash=tokenizer_hash,
            tokenizer=tokenizer,
            patch_sizes=config.pyramid.patch_sizes,
            codebook_size=config.tokenizer.codebook_size,
            image_size=config.image_size,
            class_names=source.class_names,
            images=len(source),
            views=len(self.views),
            view_names=self.views.names,
            data=data,
            seed=seed,
            dtype=self.dtype.name,
            source=f"{source.name}:{source.split}",
            fingerprint=source.fingerprint(),
            images_per_shard=images_per_shard or default_shard(bytes_per_image, len(source)),
        )
        self.unfinished = UnfinishedCache(out, self.manifest)

    def prepare(self, overwrite: bool = False) -> Work:
        """Look at what is there, make room, and return what is left to do.

        `overwrite` replaces a complete cache, one of other settings, or writes next to files that are not a cache's.

        Raises:
            DataError: `out` holds something else, or a cache of other settings; or another process works there.
        """
        if self._is_complete(overwrite):
            self.unfinished.complete()
            return Work(self.manifest.images, self.manifest.images_per_shard, ())
        done = self.unfinished.begin()
        if self.vectors is not None and self.vectors.of == "class":
            with self._writing(VECTORS) as file:
                np.save(file, self.vectors.values)
        pending = tuple(number for number in self.unfinished.pieces if number not in done)
        work = Work(len(self.source), self.manifest.images_per_shard, pending)
        if work.images < work.total:
            logger.info("%s: resuming after %d of %d images.", self.out, work.total - work.images, work.total)
        return work

    def _is_complete(self, overwrite: bool) -> bool:
        """Whether the cache is there already; what may not stay there is removed."""
        complete, unfinished = (self.out / MANIFEST).exists(), (self.out / PARTIAL).exists()
        if not complete and not unfinished:
            require_new_directory(self.out, overwrite)
        elif complete and overwrite:
            self.unfinished.clear()
        else:
            try:
                there = TokenCache.open(self.out).manifest if complete else Manifest.read(self.out / PARTIAL)
                if not complete and there.version < VERSION:
                    raise DataError(f"{self.out} holds an unfinished token cache of an earlier version of mvar.")
                if self.images_per_shard is None:
                    update = {"images_per_shard": there.images_per_shard}
                    self.manifest = self.manifest.model_copy(update=update)
                    self.unfinished = UnfinishedCache(self.out, self.manifest)
                if found := there.differences(self.manifest):
                    kind = "a token cache" if complete else "an unfinished token cache"
                    raise DataError(f"{self.out} holds {kind} made with other settings: {found}.")
                return complete
            except DataError as error:
                if not overwrite:
                    hint = "Choose another --out, or add --overwrite to replace it."
                    raise DataError(error.message, hint) from None
                self.unfinished.clear()
        return False

    def check(self, work: Work, progress: Report | None = None) -> None:
        """Look for damaged images among those that this process will encode, unless they may be left out.

        Raises:
            DataError: An image cannot be read, or `out` is not the directory that was prepared.
        """
        if work.pending and not (self.out / PARTIAL).exists():
            raise DataError(
                f"{self.out} was prepared by process 0, and process {self.rank} does not see it.",
                "Use an --out on storage that all machines share.",
            )
        if not self.skip_bad and work.pending:
            self.source.check(progress, [image for number in self._share(work) for image in work.images_of(number)])

    def write(self, work: Work, progress: Report | None = None) -> None:
        """Encode and write this process's shards; `progress` counts the images of all processes, as far as is known.

        Raises:
            DataError: An image cannot be read.
        """
        numbers = self._share(work)
        views = len(self.views)
        bad: dict[int, DataError] = {}
        report = _reporter(self.unfinished, work, numbers, progress)
        batches = row_batches(
            self.source,
            self.config.image_shape,
            (rows for number in numbers for rows in self._batches(work.images_of(number))),
            self.views,
            bad.__setitem__ if self.skip_bad else None,
        )
        for number in numbers:
            images = work.images_of(number)
            tokens = np.empty((len(images) * views, self.config.pyramid.num_tokens), self.dtype)
            filled = 0
            for _ in self._batches(images):
                pixels, rows = next(batches)
                if pixels is not None:
                    tokens[filled : filled + len(rows)] = self._encoded(from_uint8(pixels))
                    filled += len(rows)
                report(number, filled // views)
            for image in filter(bad.__contains__, images):
                logger.warning("Left out: %s", bad[image].message)
            kept = [image for image in images if image not in bad]
            self._write_shard(number, tokens[:filled].reshape(len(kept), views, tokens.shape[1]), kept, images)

    def finish(self, work: Work) -> CacheSummary:
        """Wait for the shards of all processes; rank 0 completes the cache with its manifest.

        Raises:
            DataError: No image could be read.
        """
        path = self.out / MANIFEST
        while not path.exists():
            if self.rank == 0 and len(self.unfinished.present()) == len(self.unfinished.pieces):
                self._complete()
            else:
                time.sleep(0.2)
        there = Manifest.read(path)
        size = sum(shard.tokens.bytes + shard.labels.bytes for shard in there.shards)
        skipped = tuple(name for shard in there.shards for name in shard.skipped)
        return CacheSummary(there.images, there.views, size, work.images, skipped)

    def _complete(self) -> None:
        shards = tuple(filter(None, map(Shard.read, map(self.unfinished.piece, self.unfinished.pieces))))
        assert len(shards) == len(self.unfinished.pieces)
        images = sum(shard.images for shard in shards)
        if not images:
            raise DataError(f"None of the {len(self.source)} images of {self.source.name} could be read.")
        update: dict[str, Any] = {"images": images, "skipped": len(self.source) - images, "shards": shards}
        if self.manifest.vectors is not None and self.manifest.vectors.of == "class":
            entry = FileEntry.of(self.out / VECTORS)
            update["vectors"] = self.manifest.vectors.model_copy(update={"file": entry})
        write_json(self.out / MANIFEST, self.manifest.model_copy(update=update).to_json())
        self.unfinished.complete()

    def _share(self, work: Work) -> tuple[int, ...]:
        """The shards that this process writes."""
        return work.pending[self.rank :: self.world_size]

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
        names, labels = self.source.item_names, self.source.labels[kept]
        label_dtype = smallest_unsigned(len(self.source.class_names) - 1)
        arrays: dict[str, NDArray[Any]] = {"tokens": tokens, "labels": labels.astype(label_dtype)}
        if self.vectors is not None and self.vectors.of == "image":
            arrays["vectors"] = np.ascontiguousarray(self.vectors.values[kept, 0])
        for kind, array in arrays.items():
            with self._writing(f"{kind}-{number:05d}.npy") as file:
                np.save(file, array)
        with self._writing(f"names-{number:05d}.txt") as file:
            file.writelines(f"{_line(names[image])}\n".encode() for image in kept)
        entries = {kind: FileEntry.of(self.out / f"{kind}-{number:05d}.npy") for kind in arrays}
        left_out = set(images).difference(kept)
        shard = Shard(
            images=len(kept),
            **entries,
            names=FileEntry.of(self.out / f"names-{number:05d}.txt"),
            skipped=tuple(_line(names[image]) for image in sorted(left_out)),
        )
        write_json(self.unfinished.piece(number), shard.model_dump(mode="json", exclude_none=True))

    @contextmanager
    def _writing(self, name: str) -> Iterator[IO[bytes]]:
        """A file of the cache that is on the disk before it has its name: a receipt must not outlive its files."""
        with atomic_path(self.out / name, durable=True) as temporary, temporary.open("wb") as file:
            yield file


def write_token_cache(
    out: Path,
    source: ImageSource,
    encode: Encode,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CacheSummary:
    """Encode all views of all images into a token cache; the processes that are connected share the work.

    Finished shards are kept: the same call again resumes where it was interrupted, and leaves a complete cache of the
    same settings as it is. `options` are those of `CacheWriter`.

    Raises:
        DataError: `out` holds something else, or an image cannot be read.
    """
    world = distributed.world()
    writer = CacheWriter(out, source, encode, rank=world.rank, world_size=world.world_size, **options)
    try:
        work = world.run_on_rank_zero(lambda: writer.prepare(overwrite))
        writer.check(work, stage(progress, "checking images"))
        writer.write(work, stage(progress, "tokenizing"))
        return writer.finish(work)
    finally:
        writer.unfinished.release()


def default_shard(bytes_per_image: int, images: int) -> int:
    """Images in a shard: a power of two, for some tens of megabytes, and fewer where the images are few."""
    fits = min(max(SHARD_BYTES // bytes_per_image, 1), LARGEST_SHARD)
    wanted = max(SMALLEST_SHARD, -(-images // SHARDS_WANTED))
    return 1 << (min(fits, wanted).bit_length() - 1)


def _reporter(
    shards: UnfinishedCache, work: Work, own: tuple[int, ...], progress: Report | None
) -> Callable[[int, int], None]:
    """Reports images over all processes: its own as they come, those of others by their receipts."""
    others = set(work.pending).difference(own)
    done = dict.fromkeys(work.pending, 0)
    looked = time.monotonic()

    def report(number: int, images: int) -> None:
        """So many images of an own shard are encoded."""
        nonlocal looked
        if progress is None:
            return
        done[number] = images
        if others and time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
            looked = time.monotonic()
            for finished in others & shards.present():
                others.remove(finished)
                done[finished] = len(work.images_of(finished))
        progress(work.total - work.images + sum(done.values()), work.total)

    return report


def _line(name: str) -> str:
    """A file's name as one line of UTF-8, whatever bytes it has."""
    return name.replace("\n", "\\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
