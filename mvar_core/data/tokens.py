"""Writing a token cache: every view of every image as token indices, in shards that any number of processes make.

A shard is done when its receipt is there, which is written after its files; the manifest is written when all receipts
are. Every file appears whole under its name. So a run that was stopped at any moment goes on where it stopped, and what
it leaves behind does not depend on when it was stopped or on how many processes shared the work.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.config import ModelConfig
from mvar_core.config.training import DataConfig
from mvar_core.data.images import row_batches
from mvar_core.data.manifest import (
    MANIFEST,
    OWN_FILES,
    PARTIAL,
    RECEIPTS,
    VECTORS,
    VERSION,
    VERSION_WITH_VECTORS,
    FileEntry,
    Manifest,
    Shard,
    smallest_unsigned,
)
from mvar_core.data.sources import ImageSource, Progress
from mvar_core.data.token_cache import TokenCache
from mvar_core.data.transforms import Views
from mvar_core.data.vectors import Vectors
from mvar_core.data.work import CacheSummary, Tally, Work, default_shard
from mvar_core.errors import DataError
from mvar_core.io.files import atomic_path, require_new_directory, write_json
from mvar_core.io.pixels import from_uint8

__all__ = ["CacheSummary", "CacheWriter", "Encode", "TokenCache", "Work", "write_token_cache"]

logger = logging.getLogger("mvar")

Encode = Callable[[Tensor], Tensor]
"""Images float32 (B, 3, H, W) in [-1, 1] → tokens (B, L), integers."""


class CacheWriter:
    """Encodes all views of all images into a token cache, alone or as one of several processes.

    One process calls `prepare` and hands the result to all; each calls `check` and `write`; the first calls `finish`,
    which waits for the others' shards. They must see the same directory.

    Args:
        out: The cache's directory.
        source: The images.
        encode: The tokenizer.
        config: The model, for its pyramid, codebook and image size.
        tokenizer_hash: SHA-256 of the tokenizer's weights.
        tokenizer: Its directory, for the manifest.
        data: Which views.
        seed: Seed of random crops and augmented views.
        batch_size: Views per call of `encode`. No batch spans two shards.
        images_per_shard: Images in a shard; by default those of the cache that is there, else so many that a shard is
            some tens of megabytes, and fewer where the images are few.
        skip_bad: Leave out images that cannot be read instead of raising an error.
        vectors: Of the source's classes or images, for models that are conditioned on them.
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
    ):
        self.out = out
        self.source = source
        self.encode = encode
        self.config = config
        self.tokenizer_hash = tokenizer_hash
        self.tokenizer = tokenizer
        self.data = data
        self.seed = seed
        self.batch_size = batch_size
        self.images_per_shard = images_per_shard
        self.skip_bad = skip_bad
        self.vectors = vectors
        self._vectors_entry = vectors.entry() if vectors is not None else None
        self.views = Views(data, seed)
        self.dtype = smallest_unsigned(config.tokenizer.codebook_size - 1)

    def prepare(self, overwrite: bool = False) -> Work:
        """Look at what is there, make room, and say what is left to do.

        Args:
            overwrite: Replace a complete cache, one of other settings, or write beside files that are not a cache's.

        Raises:
            DataError: `out` holds something else, or a cache of other settings.
        """
        for pattern in OWN_FILES:
            _remove(self.out, f".{pattern}.*.tmp")  # left by a process that was killed
        asked = self._asked()
        there = self._there(asked, overwrite)
        if there is None:
            for pattern in OWN_FILES:
                _remove(self.out, pattern)
        manifest = there or asked
        if (self.out / MANIFEST).exists():
            self._clean()
            return Work(manifest.images, manifest.images_per_shard, ())
        if self.vectors is not None and self.vectors.of == "class":
            with atomic_path(self.out / VECTORS) as temporary, temporary.open("wb") as file:
                np.save(file, self.vectors.values)
                _to_disk(file.fileno())
        if there is None:
            write_json(self.out / PARTIAL, manifest.to_json())
        work = Work(len(self.source), manifest.images_per_shard, ())
        pending = []
        for number in range(work.num_shards):
            shard = Shard.read(Shard.receipt(self.out, number))
            if shard is None or shard.problem(self.out, verify=True):
                Shard.receipt(self.out, number).unlink(missing_ok=True)
                pending.append(number)
        work = replace(work, pending=tuple(pending))
        if work.images < work.total:
            logger.info("%s: going on after %d of %d images.", self.out, work.total - work.images, work.total)
        return work

    def check(self, work: Work, rank: int = 0, count: int = 1, progress: Progress | None = None) -> None:
        """Look for damaged images among those that this process will encode, unless they may be left out.

        Raises:
            DataError: An image cannot be read, or `out` is not the directory that was prepared.
        """
        if work.pending and not (self.out / PARTIAL).exists():
            raise DataError(
                f"{self.out} was prepared by process 0, and process {rank} does not see it.",
                "Give an --out on storage that all machines share.",
            )
        if not self.skip_bad and work.pending:
            shards = [work.images_of(number) for number in work.of(rank, count)]
            self.source.check(progress, [image for images in shards for image in images])

    def write(self, work: Work, rank: int = 0, count: int = 1, progress: Progress | None = None) -> None:
        """Encode and write this process's shards.

        Args:
            work: From `prepare`.
            rank: Number of this process.
            count: How many there are.
            progress: Called with images done, by all processes as far as is known, and images in all.

        Raises:
            DataError: An image cannot be read.
        """
        numbers = work.of(rank, count)
        views = len(self.views)
        bad: dict[int, DataError] = {}
        tally = Tally(self.out, work, numbers, progress)
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
                tally.report(filled // views)
            kept = [image for image in images if image not in bad]
            for image in filter(bad.__contains__, images):
                logger.warning("Left out: %s", bad[image].message)
            self._write_shard(number, tokens[:filled].reshape(len(kept), views, tokens.shape[1]), kept, images)
            tally.add(len(kept))

    def finish(self, work: Work) -> CacheSummary:
        """Wait for all shards and complete the cache with its manifest.

        Raises:
            DataError: No image could be read.
        """
        if (self.out / MANIFEST).exists():
            return CacheSummary.of(Manifest.read(self.out / MANIFEST), 0)
        for number in work.pending:
            while not Shard.receipt(self.out, number).exists():
                time.sleep(0.2)
        found = [Shard.read(Shard.receipt(self.out, number)) for number in range(work.num_shards)]
        shards = tuple(shard for shard in found if shard is not None)
        assert len(shards) == work.num_shards
        images = sum(shard.images for shard in shards)
        if not images:
            raise DataError(f"None of the {len(self.source)} images of {self.source.name} could be read.")
        asked = self._asked()
        update: dict[str, Any] = {"images": images, "skipped": asked.images - images, "shards": shards}
        if asked.vectors is not None and asked.vectors.of == "class":
            update["vectors"] = asked.vectors.model_copy(update={"file": FileEntry.of(self.out / VECTORS)})
        manifest = asked.model_copy(update={**update, "images_per_shard": work.images_per_shard})
        write_json(self.out / MANIFEST, manifest.to_json())
        self._clean()
        return CacheSummary.of(manifest, work.images)

    def wait(self) -> None:
        """Wait until another process has completed the cache."""
        while not (self.out / MANIFEST).exists():
            time.sleep(0.2)

    def _asked(self) -> Manifest:
        bytes_per_image = len(self.views) * self.config.pyramid.num_tokens * self.dtype.itemsize
        return Manifest(
            version=VERSION if self.vectors is None else VERSION_WITH_VECTORS,
            vectors=self._vectors_entry,
            tokenizer_hash=self.tokenizer_hash,
            tokenizer=self.tokenizer,
            patch_sizes=self.config.pyramid.patch_sizes,
            codebook_size=self.config.tokenizer.codebook_size,
            image_size=self.config.image_size,
            class_names=self.source.class_names,
            images=len(self.source),
            views=len(self.views),
            view_names=self.views.names,
            data=self.data,
            seed=self.seed,
            dtype=self.dtype.name,
            source=f"{self.source.name}:{self.source.split}",
            fingerprint=self.source.fingerprint(),
            images_per_shard=self.images_per_shard or default_shard(bytes_per_image, len(self.source)),
        )

    def _there(self, asked: Manifest, overwrite: bool) -> Manifest | None:
        """The manifest of the complete or unfinished cache that is gone on with; None starts anew."""
        complete, unfinished = (self.out / MANIFEST).exists(), (self.out / PARTIAL).exists()
        if not complete and not unfinished:
            require_new_directory(self.out, overwrite)
            return None
        if complete and overwrite:
            return None
        try:
            there = TokenCache.open(self.out).manifest if complete else Manifest.read(self.out / PARTIAL)
            if not complete and there.version < VERSION:
                raise DataError(f"{self.out} holds an unfinished token cache of an earlier version of mvar.")
            if self.images_per_shard is None:
                asked = asked.model_copy(update={"images_per_shard": there.images_per_shard})
            if differences := there.differences(asked):
                kind = "a token cache" if complete else "an unfinished token cache"
                raise DataError(f"{self.out} holds {kind} made with other settings: {differences}.")
        except DataError as error:
            if not overwrite:
                raise DataError(error.message, "Choose another --out, or add --overwrite to replace it.") from None
            return None
        return there

    def _clean(self) -> None:
        """Remove what only an unfinished cache needs."""
        _remove(self.out, RECEIPTS)
        (self.out / PARTIAL).unlink(missing_ok=True)

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
        names = self.source.item_names
        labels = self.source.labels[kept].astype(smallest_unsigned(len(self.source.class_names) - 1))
        entries = {}
        arrays: list[tuple[str, NDArray[Any]]] = [("tokens", tokens), ("labels", labels)]
        if self.vectors is not None and self.vectors.of == "image":
            arrays.append(("vectors", np.ascontiguousarray(self.vectors.values[kept, 0])))
        for kind, array in arrays:
            path = self.out / f"{kind}-{number:05d}.npy"
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, array)
                _to_disk(file.fileno())
            entries[kind] = FileEntry.of(path)
        path = self.out / f"names-{number:05d}.txt"
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as text:
            text.writelines(f"{_line(names[image])}\n" for image in kept)
            _to_disk(text.fileno())
        kept_set = set(kept)
        skipped = tuple(_line(names[image]) for image in images if image not in kept_set)
        shard = Shard(images=len(kept), **entries, names=FileEntry.of(path), skipped=skipped)
        write_json(Shard.receipt(self.out, number), shard.model_dump(mode="json", exclude_none=True))


def write_token_cache(
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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CacheSummary:
    """Encode all views of all images into a token cache in this process alone; the arguments are `CacheWriter`'s.

    Finished shards are kept: the same call again goes on where it was interrupted, and leaves a complete cache of the
    same settings as it is.

    Raises:
        DataError: `out` holds something else, or an image cannot be read.
    """
    writer = CacheWriter(
        out,
        source,
        encode,
        config=config,
        tokenizer_hash=tokenizer_hash,
        data=data,
        seed=seed,
        batch_size=batch_size,
        images_per_shard=images_per_shard,
        skip_bad=skip_bad,
        vectors=vectors,
    )
    work = writer.prepare(overwrite)
    writer.check(work)
    writer.write(work, progress=progress)
    return writer.finish(work)


def _remove(out: Path, pattern: str) -> None:
    for path in out.glob(pattern):
        path.unlink(missing_ok=True)


def _to_disk(handle: int) -> None:
    """A receipt must not survive a power cut that its files do not survive."""
    os.fsync(handle)


def _line(name: str) -> str:
    """A file's name as one line of UTF-8, whatever bytes it has."""
    return name.replace("\n", "\\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
