"""Token caches: the files, the manifest that describes them, and reading them through memory maps.

Nothing of the size of the data is ever in memory but the labels.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from mvar_core.classes import Classes
from mvar_core.config import ConditioningConfig
from mvar_core.config.training import DataConfig
from mvar_core.errors import ConfigError, DataError, one_line
from mvar_core.io.files import sha256_of_file
from mvar_core.io.resumable import differences
from mvar_core.pyramid import PatchSize, ScalePyramid
from mvar_core.untrusted import read_json

MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"
ITEMS = "items.txt"
"""Names of all images in caches of version 1; since then each shard has its own."""
RECEIPT = "shard-{:05d}.json"
RECEIPTS = "shard-*.json"
VECTORS = "vectors.npy"
"""Vectors of classes; those of images are in the shards."""
SMALL_CACHE = 64 * 2**20
"""Bytes that are compared with their hashes while a first batch waits for it."""
VERSION, VERSION_WITH_VECTORS = 2, 3
READABLE = (1, 2, 3)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Record):
    """One file of a cache, so that a changed or shortened file is noticed."""

    file: str = Field(pattern=r"^\w[\w.-]*$", max_length=100)  # in the cache's own directory
    bytes: NonNegativeInt
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The entry of a file as it is now."""
        return cls(file=path.name, bytes=path.stat().st_size, sha256=sha256_of_file(path))


def find_problem(files: Iterable[FileEntry], directory: Path, verify: bool) -> str | None:
    """What is wrong with some files of a cache, or None; `verify` compares hashes as well as sizes."""
    for entry in files:
        path = directory / entry.file
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != entry.bytes:
            return f"{path} has {found} bytes instead of {entry.bytes}"
        if verify and sha256_of_file(path) != entry.sha256:
            return f"{path} has changed since it was written"
    return None


class Shard(_Record):
    """Some consecutive images of a cache: tokens (images, views, L), vectors (images, X), a line with each one's name.

    Caches of version 1 have no names here. `skipped` are names of images that could not be read.
    """

    images: NonNegativeInt
    tokens: FileEntry
    labels: FileEntry
    names: FileEntry | None = None
    vectors: FileEntry | None = None
    skipped: tuple[str, ...] = ()

    @property
    def files(self) -> list[FileEntry]:
        """All files that the shard has."""
        return list(filter(None, (self.tokens, self.labels, self.names, self.vectors)))

    @classmethod
    def read(cls, path: Path) -> Shard | None:
        """A shard's receipt, or None where there is none that can be read."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None


class VectorsEntry(_Record):
    """The vectors that a cache holds for models that are conditioned on them: of classes, or one of each image.

    They have `dim` values, X. A class has several `phrasings`, which its images use in turn. `encoder` is what made
    them, "hashed-words" or what the user called it; `sha256` is of their values; `file` holds those of classes.
    """

    of: Literal["class", "image"]
    dim: PositiveInt
    phrasings: PositiveInt = 1
    dtype: Literal["float16", "float32"]
    encoder: str | None = None
    source: str
    sha256: str
    file: FileEntry | None = None


class Manifest(_Record):
    """What a token cache holds and what it was made from.

    `tokenizer_hash` is of the tokenizer's weights file, and `tokenizer` its directory as it was given (None in caches
    of earlier versions); `fingerprint` is over names, labels and sizes of all images. `images` are N, without those
    `skipped`, which could not be read; every shard but the last has `images_per_shard` of the source.
    """

    format: Literal["mvar-token-cache"] = "mvar-token-cache"
    version: int = VERSION
    tokenizer_hash: str
    patch_sizes: tuple[PatchSize, ...]
    codebook_size: PositiveInt
    image_size: PatchSize
    class_names: tuple[str, ...]
    images: NonNegativeInt
    skipped: NonNegativeInt = 0
    views: PositiveInt
    view_names: tuple[str, ...]
    data: DataConfig
    seed: int
    dtype: Literal["uint8", "uint16", "uint32"]
    source: str
    fingerprint: str
    images_per_shard: PositiveInt
    tokenizer: str | None = None
    vectors: VectorsEntry | None = None
    shards: tuple[Shard, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest; DataError for another file, or one of a later version."""
        values = read_json(path)
        if not isinstance(values, Mapping) or values.get("format") != "mvar-token-cache":
            raise DataError(f"{path} is not the manifest of a token cache.")
        if values.get("version") not in READABLE:
            raise DataError(
                f"{path} has format version {values.get('version')}; this mvar reads versions"
                f" {', '.join(map(str, READABLE))}.",
                "Install the mvar that wrote it, or make the cache again with `mvar tokenize`.",
            )
        try:
            return cls.model_validate(values)
        except ValidationError as report:
            first = report.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise DataError(f"{path}: {key}: {one_line(ValueError(first['msg']))[:300]}.") from None

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written."""
        return self.model_dump(mode="json", exclude_none=True)

    def differences(self, wanted: Manifest) -> str:
        """How what tokens depend on differs from another's, in words; neither places nor what could not be read do."""

        def settings(manifest: Manifest) -> dict[str, Any]:
            values = manifest.to_json()
            vectors = {key: value for key, value in values.get("vectors", {}).items() if key not in ("file", "source")}
            return {**values, "images": manifest.images + manifest.skipped, "vectors": vectors or None}

        return differences(settings(self), settings(wanted), ("shards", "source", "tokenizer", "version", "skipped"))

    @property
    def files(self) -> list[FileEntry]:
        """All files that the cache has."""
        table = self.vectors.file if self.vectors is not None else None
        return [*([table] if table else []), *(file for shard in self.shards for file in shard.files)]

    def command(self, out: Path, tokenizer: str | None = None) -> str:
        """The command that makes the cache again, with its own or another tokenizer."""
        views = ["--flip"] * self.data.flip + ["--crops", str(self.data.crops)] * (self.data.crops > 1)
        tokenizer = tokenizer or self.tokenizer or "TOKENIZER"
        options = ["--tokenizer", tokenizer, "--data", self.source, *views, "--out", str(out), "--overwrite"]
        return shlex.join(["mvar", "tokenize", *options])


class TokenCache:
    """A complete token cache, or some of its images, read through memory maps.

    Row r is view r % num_views of image r // num_views; `labels` are int64 (N,), the class of each image. `images` are
    those that count, in the order in which they are numbered here; None for all.
    """

    def __init__(self, path: Path, manifest: Manifest, images: NDArray[np.int64] | None = None):
        self.path = path
        self.manifest = manifest
        self.pyramid = ScalePyramid.from_patch_sizes(manifest.patch_sizes)
        self.num_views = manifest.views
        self.class_names = manifest.class_names
        self._starts = np.cumsum([0, *(shard.images for shard in manifest.shards)])
        self._maps: dict[str, NDArray[Any]] = {}
        self._verifier: _Verifier | None = None
        label_dtype = smallest_unsigned(len(self.class_names) - 1).name
        labels = [self._map(shard.labels.file, (shard.images,), label_dtype) for shard in manifest.shards]
        self._maps.clear()
        every_label = np.concatenate(labels).astype(np.int64)
        if every_label.max() >= len(self.class_names):
            raise DataError(f"{path} has the label {every_label.max()}, and names of {len(self.class_names)} classes.")
        self.labels: NDArray[np.int64] = every_label if images is None else every_label[images]
        self.images = images
        self.num_images = len(self.labels)
        self._gives_vectors = False

    @classmethod
    def open(cls, path: Path, verify: bool | None = None) -> TokenCache:
        """Open a cache whose files are there and have the right sizes.

        Their hashes are compared at once with `verify`, with None once rows are read (so that a later batch raises the
        error), with False never. DataError where there is none, or an unfinished or damaged one.
        """
        if not (path / MANIFEST).exists():
            if (path / PARTIAL).exists():
                total = Manifest.read(path / PARTIAL).images
                done = sum(shard.images for shard in filter(None, map(Shard.read, path.glob(RECEIPTS))))
                raise DataError(
                    f"{path} is not finished: {done} of {total} images are encoded.",
                    "Run the same `mvar tokenize` command again to resume it.",
                )
            found = f"has no {MANIFEST}" if path.is_dir() else "is a file" if path.exists() else "does not exist"
            raise DataError(
                f"{path} is not a token cache: it {found}.",
                "Make one with `mvar tokenize --tokenizer DIRECTORY --data IMAGES --out DIRECTORY`.",
            )
        manifest = Manifest.read(path / MANIFEST)
        in_shards = sum(shard.images for shard in manifest.shards)
        if not in_shards or in_shards != manifest.images or len(manifest.view_names) != manifest.views:
            raise DataError(
                f"{path / MANIFEST} contradicts itself: {manifest.images} images of {manifest.views} views, but"
                f" {in_shards} of {len(manifest.view_names)} in its shards.",
                f"Make the cache again: {manifest.command(path)}",
            )
        if problem := find_problem(manifest.files, path, verify is True):
            raise _damaged(path, manifest, problem)
        try:
            cache = cls(path, manifest)
        except ConfigError as error:
            raise DataError(f"{path / MANIFEST}: {error.message}") from None
        cache._verifier = _Verifier(path, manifest) if verify is None else None
        return cache

    def verify(self) -> None:
        """Wait until the hashes are compared, where `open` was to; DataError where a file has changed."""
        if self._verifier is not None:
            self._verifier.check(wait=True)

    def __len__(self) -> int:
        return self.num_images * self.num_views

    @property
    def classes(self) -> Classes:
        """Names of the classes, as a list to match with others."""
        return Classes.of(self.class_names, origin=str(self.path))

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The tokens int64 (B, L) of B rows, and labels int64 (B,) or, from `conditioned`, vectors float32 (B, X)."""
        chosen = np.asarray(rows, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"rows {chosen.min()} … {chosen.max()} of {len(self)}")
        images, views = np.divmod(chosen, self.num_views)
        tokens = self.tokens_of(images, views)
        return tokens, self.vectors(chosen) if self._gives_vectors else torch.from_numpy(self.labels[images])

    def tokens_of(self, images: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Tokens int64 (B, L) of some views of some images."""
        shape = (self.num_views, self.pyramid.num_tokens)
        tokens = self._gather("tokens", images, shape, self.manifest.dtype, views).astype(np.int64)
        if self._verifier is not None:
            self._verifier.check()
        if tokens.size and tokens.max() >= self.manifest.codebook_size:
            problem = f"{self.path} holds token {tokens.max()}, its codebook has {self.manifest.codebook_size}"
            raise _damaged(self.path, self.manifest, problem)
        return torch.from_numpy(tokens)

    def vectors(self, rows: NDArray[np.int64]) -> Tensor:
        """The vectors of some rows, float32 (B, X); views of the images of a class use its phrasings in turn."""
        images, views = np.divmod(np.asarray(rows, np.int64), self.num_views)
        entry = self.manifest.vectors
        assert entry is not None
        if entry.of == "class":
            table = self._map(VECTORS, (len(self.class_names), entry.phrasings, entry.dim), entry.dtype)
            found = table[self.labels[images], (self._stored(images) + views) % entry.phrasings]
        else:
            found = self._gather("vectors", images, (entry.dim,), entry.dtype)
        return torch.from_numpy(found.astype(np.float32))

    def conditioned(self, conditioning: ConditioningConfig) -> TokenCache:
        """What a model trains on: rows with labels, or with vectors where it is conditioned on them.

        DataError where it has none, or others than the model accepts.
        """
        if conditioning.dim is None:
            return self
        entry = self.manifest.vectors
        if entry is None:
            problem = f"no vectors; the model is conditioned on vectors of {conditioning.dim} values"
            hint = f"Make it again with --words, or with --vectors FILE: {self.manifest.command(self.path)}"
        elif entry.dim != conditioning.dim:
            problem = f"vectors of {entry.dim} values; the model accepts {conditioning.dim}"
            hint = f"Set conditioning.dim={entry.dim}, or make the cache with other vectors."
        elif conditioning.encoder not in (None, entry.encoder):
            by = entry.encoder or "an unnamed encoder"
            problem = f"vectors by {by}; the model accepts those by {conditioning.encoder}"
            hint = f"Set conditioning.encoder={entry.encoder or 'null'}, or make the cache with other vectors."
        else:
            problem = hint = ""
        if problem:
            raise DataError(f"{self.path} holds {problem}.", hint)
        with_vectors = copy.copy(self)
        with_vectors._gives_vectors = True
        return with_vectors

    def check(self, tokenizer_hash: str, pyramid: ScalePyramid, tokenizer: str = "TOKENIZER") -> None:
        """Refuse a cache whose tokens mean something else to a model with this tokenizer (SHA-256) and pyramid."""
        for kind, found, expected in (
            ("by another tokenizer", self.manifest.tokenizer_hash, tokenizer_hash),
            ("for another pyramid", self.pyramid.spelled, pyramid.spelled),
        ):
            if found != expected:
                raise DataError(
                    f"{self.path} was made {kind}: {found} there, {expected} in this model.",
                    f"Make a cache with this tokenizer: {self.manifest.command(self.path, tokenizer)}",
                )

    def _stored(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """The manifest's numbers of some images."""
        return images if self.images is None else self.images[images]

    def _gather(
        self, kind: str, images: NDArray[np.int64], shape: tuple[int, ...], dtype: str, *within: NDArray[np.int64]
    ) -> NDArray[Any]:
        """What the shards' arrays (images, *shape) hold for some images, at the indices `within` the further axes."""
        stored = self._stored(images)
        shards = np.searchsorted(self._starts, stored, side="right") - 1
        arrays = {}
        for number in np.unique(shards).tolist():
            shard = self.manifest.shards[number]
            arrays[number] = self._map(getattr(shard, kind).file, (shard.images, *shape), dtype)
        found = np.empty((len(stored), *shape[len(within) :]), dtype)
        for number, array in arrays.items():
            here = shards == number
            found[here] = array[(stored[here] - self._starts[number], *(index[here] for index in within))]
        return found

    def _map(self, file: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An array that a file holds, mapped when it is first asked for."""
        if file in self._maps:
            return self._maps[file]
        path = self.path / file
        array = map_array(path)
        if array.shape != shape or array.dtype.name != dtype:
            raise DataError(f"{path} holds {array.dtype} {array.shape}; its manifest says {dtype} {shape}.")
        return self._maps.setdefault(file, array)


class _Verifier:
    """Compares the hashes of a cache's files: of a small cache with the first batch, else in a thread after it."""

    def __init__(self, path: Path, manifest: Manifest):
        self._path, self._manifest = path, manifest
        self._is_small = sum(entry.bytes for entry in manifest.files) <= SMALL_CACHE
        self._thread = Thread(target=self._compare, daemon=True)
        self._calls = 0
        self._problem: str | None = None

    def check(self, wait: bool = False) -> None:
        """Raise DataError if a problem has been found by now, or with `wait` at the end."""
        wait = wait or self._is_small
        self._calls += 1
        if self._thread.ident is None and (wait or self._calls > 1):
            self._thread.start()
        if wait:
            self._thread.join()
        if self._problem is not None:
            raise _damaged(self._path, self._manifest, self._problem)

    def _compare(self) -> None:
        try:
            self._problem = find_problem(self._manifest.files, self._path, verify=True)
        except OSError as error:
            self._problem = f"{error.filename or self._path} cannot be read ({error.strerror})"


def _damaged(path: Path, manifest: Manifest, problem: str) -> DataError:
    return DataError(f"The token cache is damaged: {problem}.", f"Make it again: {manifest.command(path)}")


def map_array(path: Path) -> NDArray[Any]:
    """A .npy file, mapped into memory; DataError where it is not one, or not of plain numbers."""
    try:
        return np.lib.format.open_memmap(path, mode="r")  # unlike np.load it reads nothing but .npy
    except Exception:  # a header may be anything
        raise DataError(f"{path} is not a whole .npy file of numbers.", "Write or download it again.") from None


def split_off(cache: TokenCache, fraction: float, seed: int) -> tuple[TokenCache, TokenCache]:
    """A cache in two: what is trained on, and images that the seed holds out, no view of which is trained on."""
    count = cache.num_images
    if count < 2:
        raise DataError(f"{cache.path} holds {count} images: none can be held out.", "Use --validation CACHE.")
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(count)
    held = min(count - 1, max(1, round(fraction * count)))
    parts = [TokenCache(cache.path, cache.manifest, cache._stored(np.sort(of))) for of in (order[held:], order[:held])]
    for part in parts:
        part._verifier = cache._verifier
    return parts[0], parts[1]


def smallest_unsigned(largest: int) -> np.dtype[Any]:
    """The smallest unsigned integer type that holds 0 … `largest`."""
    return np.dtype(np.min_scalar_type(largest))
