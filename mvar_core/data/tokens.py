"""The token cache: every view of every image as token indices, in shards that training reads through memory maps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.config import DataConfig, ModelConfig
from mvar_core.data.images import image_batches
from mvar_core.data.manifest import ITEMS, MANIFEST, OWN_FILES, PARTIAL, FileEntry, Manifest, Shard, smallest_unsigned
from mvar_core.data.sources import ImageSource, Progress
from mvar_core.data.transforms import Views
from mvar_core.errors import DataError
from mvar_core.files import atomic_path, require_new_directory, write_json, write_text
from mvar_core.scales import ScalePyramid

SHARD_BYTES = 32 * 2**20
LARGEST_SHARD = 65_536

logger = logging.getLogger("mvar")

Encode = Callable[[Tensor], Tensor]
"""Images float32 (B, 3, H, W) in [-1, 1] → tokens (B, L), integers."""


@dataclass(frozen=True)
class CacheSummary:
    """What `write_token_cache` leaves behind.

    Attributes:
        images: Images in the cache.
        views: Views per image.
        bytes: Size of its tokens and labels.
        encoded: Images encoded by this call; the others were there already.
    """

    images: int
    views: int
    bytes: int
    encoded: int


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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CacheSummary:
    """Encode all views of all images into a token cache.

    Finished shards are kept: the same call again goes on where it was interrupted, and leaves a complete cache of the
    same settings as it is. No batch spans two shards, so that an interruption changes nothing in the files.

    Args:
        out: The cache's directory.
        source: The images.
        encode: The tokenizer.
        config: The model, for its pyramid, codebook and image size.
        tokenizer_hash: SHA-256 of the tokenizer's weights file.
        data: Which views.
        seed: Seed of the augmented views.
        batch_size: Views per call of `encode`.
        images_per_shard: Images in a shard; by default so many that a shard is some tens of megabytes.
        overwrite: Replace a complete cache, one of other settings, or write beside files that are not a cache's.
        progress: Called with images done and images in all, after every batch.

    Raises:
        DataError: `out` holds something else, or an image cannot be read.
    """
    views = Views(data, seed)
    dtype = smallest_unsigned(config.tokenizer.codebook_size - 1)
    asked = Manifest(
        tokenizer_hash=tokenizer_hash,
        patch_sizes=config.pyramid.patch_sizes,
        codebook_size=config.tokenizer.codebook_size,
        image_size=config.image_size,
        class_names=source.class_names,
        images=len(source),
        views=len(views),
        view_names=views.names,
        data=data,
        seed=seed,
        dtype=dtype.name,
        source=f"{source.name}:{source.split}",
        fingerprint=source.fingerprint(),
        images_per_shard=images_per_shard or _default_shard(len(views) * config.pyramid.num_tokens * dtype.itemsize),
    )
    manifest = _start(out, asked, overwrite)
    if (out / MANIFEST).exists():
        return _summary(manifest, 0)
    done = sum(shard.images for shard in manifest.shards)
    if done:
        logger.info("%s: going on after %d of %d images.", out, done, len(source))
    if done < len(source):
        source.check()
    write_text(out / ITEMS, "".join(f"{_line(name)}\n" for name in source.item_names))
    write_json(out / PARTIAL, manifest.to_json())
    for start in range(done, len(source), asked.images_per_shard):
        images = range(start, min(start + asked.images_per_shard, len(source)))

        def report(encoded: int, start: int = start) -> None:
            if progress is not None:
                progress(start + encoded // len(views), len(source))

        shard = np.empty((len(images) * len(views), config.pyramid.num_tokens), dtype)
        _encode_into(shard, source, encode, config, images, views, batch_size, report)
        entries = _write_shard(out, len(manifest.shards), shard.reshape(len(images), len(views), -1), source, images)
        manifest = manifest.model_copy(update={"shards": (*manifest.shards, entries)})
        write_json(out / PARTIAL, manifest.to_json())
    write_json(out / MANIFEST, manifest.to_json())
    (out / PARTIAL).unlink()
    return _summary(manifest, len(source) - done)


class TokenCache:
    """A complete token cache, read through memory maps.

    Row r is view r % num_views of image r // num_views.

    Attributes:
        path: The cache's directory.
        manifest: What it holds and what it was made from.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self.pyramid = ScalePyramid.from_patch_sizes(manifest.patch_sizes)
        self._starts = np.cumsum([0, *(shard.images for shard in manifest.shards)])
        self._tokens = [self._map(shard) for shard in manifest.shards]
        labels = [np.load(path / shard.labels.file) for shard in manifest.shards]
        self.labels: NDArray[np.int64] = np.concatenate(labels).astype(np.int64)

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> TokenCache:
        """Open a cache after checking that its files are there and have the right sizes.

        Args:
            path: The cache's directory.
            verify: Also compare the files' hashes, which reads all of them.

        Raises:
            DataError: Not a token cache, an unfinished one, or one with missing, shortened or changed files.
        """
        if not path.is_dir():
            raise DataError(
                f"{path} {'is not a directory' if path.exists() else 'does not exist'}; expected a token cache.",
                "Make one with `mvar tokenize --checkpoint TOKENIZER --data IMAGES --out DIRECTORY`.",
            )
        if not (path / MANIFEST).exists():
            if (path / PARTIAL).exists():
                partial = Manifest.read(path / PARTIAL)
                done = sum(shard.images for shard in partial.shards)
                raise DataError(
                    f"{path} is not finished: {done} of {partial.images} images are encoded.",
                    "Run the same `mvar tokenize` command again; it goes on from there.",
                )
            raise DataError(
                f"{path} is not a token cache: it has no {MANIFEST}.",
                "Make one with `mvar tokenize --checkpoint TOKENIZER --data IMAGES --out DIRECTORY`.",
            )
        manifest = Manifest.read(path / MANIFEST)
        for shard in manifest.shards:
            if problem := shard.problem(path, verify):
                raise DataError(f"The token cache is damaged: {problem}.", f"Make it again: {_command(path, manifest)}")
        return cls(path, manifest)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.manifest.images

    @property
    def num_views(self) -> int:
        """Views per image."""
        return self.manifest.views

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label."""
        return self.manifest.class_names

    def __len__(self) -> int:
        return self.num_images * self.num_views

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The tokens and labels of some rows.

        Args:
            rows: Row numbers, B of them, in any order.

        Returns:
            Tokens int64 (B, L) and labels int64 (B,).

        Raises:
            IndexError: A row that the cache does not have.
        """
        chosen = np.asarray(rows, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"rows {chosen.min()} … {chosen.max()} of {len(self)}")
        images, views = np.divmod(chosen, self.num_views)
        shards = np.searchsorted(self._starts, images, side="right") - 1
        tokens = np.empty((len(chosen), self.pyramid.num_tokens), np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            tokens[here] = self._tokens[shard][images[here] - self._starts[shard], views[here]]
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[images])

    def item_name(self, row: int) -> str:
        """Path or id of the image that a row was made from."""
        return self._items[row // self.num_views]

    def check(self, tokenizer_hash: str, pyramid: ScalePyramid) -> None:
        """Refuse a cache whose tokens mean something else to this model.

        Args:
            tokenizer_hash: SHA-256 of the model's tokenizer weights.
            pyramid: The model's pyramid.

        Raises:
            DataError: The cache was made by another tokenizer, or for another pyramid.
        """
        hint = f"Make a cache with this tokenizer: {_command(self.path, self.manifest)}"
        if self.manifest.tokenizer_hash != tokenizer_hash:
            raise DataError(
                f"{self.path} was made by another tokenizer: {self.manifest.tokenizer_hash} there, {tokenizer_hash}"
                " in this model.",
                hint,
            )
        if self.pyramid.patch_sizes != pyramid.patch_sizes:
            raise DataError(
                f"{self.path} was made for another pyramid: {_sides(self.pyramid)} there, {_sides(pyramid)} in this"
                " model.",
                hint,
            )

    @cached_property
    def _items(self) -> list[str]:
        return (self.path / ITEMS).read_text(encoding="utf-8").split("\n")

    def _map(self, shard: Shard) -> NDArray[np.unsignedinteger]:
        path = self.path / shard.tokens.file
        try:
            tokens: NDArray[np.unsignedinteger] = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise DataError(f"{path} is not a numpy array: {error}.") from None
        expected = (shard.images, self.num_views, self.pyramid.num_tokens)
        if tokens.shape != expected or tokens.dtype.name != self.manifest.dtype:
            raise DataError(
                f"{path} holds {tokens.dtype} {tokens.shape}; its manifest says {self.manifest.dtype} {expected}."
            )
        return tokens


def _start(out: Path, asked: Manifest, overwrite: bool) -> Manifest:
    """The manifest to go on from: of a complete cache, of an unfinished one, or the one asked for, without shards."""
    complete, unfinished = (out / MANIFEST).exists(), (out / PARTIAL).exists()
    if not complete and not unfinished:
        require_new_directory(out, overwrite)
    elif not (complete and overwrite):
        try:
            there = TokenCache.open(out).manifest if complete else Manifest.read(out / PARTIAL)
            if differences := there.differences(asked):
                kind = "a token cache" if complete else "an unfinished token cache"
                raise DataError(f"{out} holds {kind} made with other settings: {differences}.")
        except DataError as error:
            if not overwrite:
                raise DataError(error.message, "Choose another --out, or add --overwrite to replace it.") from None
        else:
            return there if complete else there.model_copy(update={"shards": _whole_shards(out, there)})
    for pattern in OWN_FILES:
        _remove(out, pattern)
        _remove(out, f".{pattern}.*.tmp")
    return asked


def _whole_shards(out: Path, manifest: Manifest) -> tuple[Shard, ...]:
    """The shards of an unfinished cache, up to the first that is damaged; leftovers of a killed process are removed."""
    for pattern in OWN_FILES:
        _remove(out, f".{pattern}.*.tmp")
    return tuple(itertools.takewhile(lambda shard: shard.problem(out, verify=True) is None, manifest.shards))


def _remove(out: Path, pattern: str) -> None:
    for path in out.glob(pattern):
        path.unlink()


def _encode_into(
    shard: NDArray[np.unsignedinteger],
    source: ImageSource,
    encode: Encode,
    config: ModelConfig,
    images: range,
    views: Views,
    batch_size: int,
    report: Callable[[int], None],
) -> None:
    """Fill (images · views, L) with tokens."""
    rows = np.arange(images.start * len(views), images.stop * len(views))
    filled = 0
    for pixels, _ in image_batches(source, config.image_shape, rows, batch_size, views):
        tokens = encode(pixels).cpu().numpy()
        expected = (len(pixels), config.pyramid.num_tokens)
        if tokens.shape != expected or tokens.min() < 0 or tokens.max() >= config.tokenizer.codebook_size:
            raise DataError(
                f"The tokenizer gave {tokens.shape} tokens from {tokens.min()} to {tokens.max()}; expected {expected}"
                f" below {config.tokenizer.codebook_size}.",
                "Its weights do not fit its config.json.",
            )
        shard[filled : filled + len(tokens)] = tokens
        filled += len(tokens)
        report(filled)


def _write_shard(
    out: Path, number: int, tokens: NDArray[np.unsignedinteger], source: ImageSource, images: range
) -> Shard:
    labels = source.labels[images.start : images.stop].astype(smallest_unsigned(len(source.class_names) - 1))
    paths = [out / f"{kind}-{number:05d}.npy" for kind in ("tokens", "labels")]
    for path, array in zip(paths, (tokens, labels), strict=True):
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, array)
    return Shard(images=len(images), tokens=FileEntry.of(paths[0]), labels=FileEntry.of(paths[1]))


def _line(name: str) -> str:
    """A file's name as one line of UTF-8, whatever bytes it has."""
    return name.replace("\n", "\\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _default_shard(bytes_per_image: int) -> int:
    images = min(max(SHARD_BYTES // bytes_per_image, 1), LARGEST_SHARD)
    return 1 << (images.bit_length() - 1)


def _summary(manifest: Manifest, encoded: int) -> CacheSummary:
    size = sum(shard.tokens.bytes + shard.labels.bytes for shard in manifest.shards)
    return CacheSummary(manifest.images, manifest.views, size, encoded)


def _command(path: Path, manifest: Manifest) -> str:
    flip = " --flip" if manifest.data.flip else ""
    return f"mvar tokenize --checkpoint TOKENIZER --data {manifest.source}{flip} --out {path} --overwrite"


def _sides(pyramid: ScalePyramid) -> str:
    return ",".join(map(str, pyramid.patch_sizes))
