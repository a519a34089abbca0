"""Reading a token cache: tokens through memory maps, nothing of the size of the data in memory but the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.config import ConditioningConfig
from mvar_core.data.manifest import ITEMS, MANIFEST, PARTIAL, RECEIPTS, VECTORS, Manifest, Shard
from mvar_core.errors import DataError
from mvar_core.pyramid import ScalePyramid


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
        self._maps: dict[int, NDArray[np.unsignedinteger]] = {}
        self._arrays: dict[str, NDArray[Any]] = {}
        self._names: tuple[str, list[str]] | None = None
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
                shards = [*partial.shards, *filter(None, map(Shard.read, path.glob(RECEIPTS)))]
                done = sum(shard.images for shard in shards)
                raise DataError(
                    f"{path} is not finished: {done} of {partial.images} images are encoded.",
                    "Run the same `mvar tokenize` command again; it goes on from there.",
                )
            raise DataError(
                f"{path} is not a token cache: it has no {MANIFEST}.",
                "Make one with `mvar tokenize --checkpoint TOKENIZER --data IMAGES --out DIRECTORY`.",
            )
        manifest = Manifest.read(path / MANIFEST)
        table = manifest.vectors.file if manifest.vectors is not None else None
        if table is not None and (problem := table.problem(path, verify)):
            raise DataError(f"The token cache is damaged: {problem}.", f"Make it again: {make_command(path, manifest)}")
        for shard in manifest.shards:
            if problem := shard.problem(path, verify):
                raise DataError(
                    f"The token cache is damaged: {problem}.", f"Make it again: {make_command(path, manifest)}"
                )
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
        return self.tokens_of(images, views), torch.from_numpy(self.labels[images])

    def tokens_of(self, images: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor:
        """Tokens int64 (B, L) of some views of some images of the manifest."""
        shards = np.searchsorted(self._starts, images, side="right") - 1
        tokens = np.empty((len(images), self.pyramid.num_tokens), np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            tokens[here] = self._map(int(shard))[images[here] - self._starts[shard], views[here]]
        return torch.from_numpy(tokens)

    def conditioned(self, conditioning: ConditioningConfig) -> TokenCache | VectorTokens:
        """What a model trains on: rows with labels, or with vectors where it is conditioned on them.

        Raises:
            DataError: The cache has no vectors, or others than the model takes.
        """
        if conditioning.dim is None:
            return self
        entry = self.manifest.vectors
        if entry is None:
            raise DataError(
                f"{self.path} holds no vectors; the model is conditioned on vectors of {conditioning.dim} numbers.",
                f"Make it again with --words, or with --vectors FILE: {make_command(self.path, self.manifest)}",
            )
        if entry.dim != conditioning.dim:
            raise DataError(
                f"{self.path} holds vectors of {entry.dim} numbers; the model takes {conditioning.dim}.",
                f"Set conditioning.dim={entry.dim}, or make the cache with other vectors.",
            )
        if conditioning.encoder not in (None, entry.encoder):
            raise DataError(
                f"{self.path} holds vectors by {entry.encoder or 'an unnamed encoder'}; the model takes those by"
                f" {conditioning.encoder}.",
                f"Set conditioning.encoder={entry.encoder or 'null'}, or make the cache with other vectors.",
            )
        return VectorTokens(self)

    def vectors(self, rows: NDArray[np.int64]) -> Tensor:
        """The vectors of some rows, float32 (B, X); views of the images of a class take its phrasings in turn."""
        images, views = np.divmod(np.asarray(rows, np.int64), self.num_views)
        return self.vectors_of(images, views, self.labels[images])

    def vectors_of(self, images: NDArray[np.int64], views: NDArray[np.int64], labels: NDArray[np.int64]) -> Tensor:
        """The vectors of some views of some images of the whole cache, whose labels these are."""
        entry = self.manifest.vectors
        assert entry is not None
        if entry.of == "class":
            table = self._array(VECTORS, (len(self.class_names), entry.phrasings, entry.dim), entry.dtype)
            return torch.from_numpy(table[labels, (images + views) % entry.phrasings].astype(np.float32))
        vectors = np.empty((len(images), entry.dim), np.float32)
        shards = np.searchsorted(self._starts, images, side="right") - 1
        for number in np.unique(shards):
            shard, here = self.manifest.shards[number], shards == number
            assert shard.vectors is not None
            stored = self._array(shard.vectors.file, (shard.images, entry.dim), entry.dtype)
            vectors[here] = stored[images[here] - self._starts[number]]
        return torch.from_numpy(vectors)

    def item_name(self, row: int) -> str:
        """Path or id of the image that a row was made from; reads the names of its shard."""
        image = row // self.num_views
        shard = int(np.searchsorted(self._starts, image, side="right")) - 1
        names = self.manifest.shards[shard].names
        if names is None:
            return self._lines(ITEMS)[image]
        return self._lines(names.file)[image - int(self._starts[shard])]

    def check(self, tokenizer_hash: str, pyramid: ScalePyramid) -> None:
        """Refuse a cache whose tokens mean something else to this model.

        Args:
            tokenizer_hash: SHA-256 of the model's tokenizer weights.
            pyramid: The model's pyramid.

        Raises:
            DataError: The cache was made by another tokenizer, or for another pyramid.
        """
        hint = f"Make a cache with this tokenizer: {make_command(self.path, self.manifest)}"
        if self.manifest.tokenizer_hash != tokenizer_hash:
            raise DataError(
                f"{self.path} was made by another tokenizer: {self.manifest.tokenizer_hash} there, {tokenizer_hash}"
                " in this model.",
                hint,
            )
        if self.pyramid.patch_sizes != pyramid.patch_sizes:
            raise DataError(
                f"{self.path} was made for another pyramid: {self.pyramid.spelled} there, {pyramid.spelled} in"
                " this model.",
                hint,
            )

    def _lines(self, file: str) -> list[str]:
        if self._names is None or self._names[0] != file:
            self._names = (file, (self.path / file).read_text(encoding="utf-8").split("\n"))
        return self._names[1]

    def _map(self, number: int) -> NDArray[np.unsignedinteger]:
        """The tokens of a shard, mapped when they are first asked for: (images, views, L)."""
        if number in self._maps:
            return self._maps[number]
        shard = self.manifest.shards[number]
        expected = (shard.images, self.num_views, self.pyramid.num_tokens)
        return self._maps.setdefault(number, self._array(shard.tokens.file, expected, self.manifest.dtype))

    def _array(self, file: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An array that a file holds, mapped once."""
        if file in self._arrays:
            return self._arrays[file]
        path = self.path / file
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise DataError(f"{path} is not a numpy array: {error}.") from None
        if array.shape != shape or array.dtype.name != dtype:
            raise DataError(f"{path} holds {array.dtype} {array.shape}; its manifest says {dtype} {shape}.")
        return self._arrays.setdefault(file, array)


class VectorTokens:
    """A token cache whose rows come with vectors in the place of labels.

    Attributes:
        cache: The cache.
    """

    def __init__(self, cache: TokenCache):
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Tokens int64 (B, L) and vectors float32 (B, X) of some rows."""
        return self.cache.batch(rows)[0], self.cache.vectors(rows)


class TokenCachePart(TokenCache):
    """Some images of a cache, with all of their views, read as if there were no others.

    Args:
        cache: The whole cache.
        images: Numbers of the images, in the order in which they are numbered here.
    """

    def __init__(self, cache: TokenCache, images: NDArray[np.int64]):
        super().__init__(cache.path, cache.manifest)
        self.images = np.asarray(images, np.int64)
        self.labels = self.labels[self.images]

    @property
    def num_images(self) -> int:
        """Number of images of this part."""
        return len(self.images)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The tokens and labels of some rows of this part; see `TokenCache.batch`."""
        chosen = np.asarray(rows, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"rows {chosen.min()} … {chosen.max()} of {len(self)}")
        images, views = np.divmod(chosen, self.num_views)
        return self.tokens_of(self.images[images], views), torch.from_numpy(self.labels[images])

    def vectors(self, rows: NDArray[np.int64]) -> Tensor:
        """The vectors of some rows of this part; see `TokenCache.vectors`."""
        images, views = np.divmod(np.asarray(rows, np.int64), self.num_views)
        return self.vectors_of(self.images[images], views, self.labels[images])

    def item_name(self, row: int) -> str:
        """Path or id of the image that a row was made from."""
        image, view = divmod(row, self.num_views)
        return super().item_name(int(self.images[image]) * self.num_views + view)


def split_off(cache: TokenCache, part: float, seed: int) -> tuple[TokenCachePart, TokenCachePart]:
    """A cache in two: what is trained on, and images held out to measure on, which no view of training shows.

    Args:
        cache: The cache.
        part: Part of the images that is held out; at least one image is, and at least one is not.
        seed: Decides which.

    Raises:
        DataError: A single image cannot be split.
    """
    count = cache.num_images
    if count < 2:
        raise DataError(f"{cache.path} holds {count} images: none can be held out.", "Give --validation CACHE.")
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(count)
    held = min(count - 1, max(1, round(part * count)))
    return TokenCachePart(cache, np.sort(order[held:])), TokenCachePart(cache, np.sort(order[:held]))


def make_command(path: Path, manifest: Manifest) -> str:
    """The command that makes a cache again."""
    flip = " --flip" if manifest.data.flip else ""
    crops = f" --crops {manifest.data.crops}" if manifest.data.crops > 1 else ""
    return f"mvar tokenize --checkpoint TOKENIZER --data {manifest.source}{flip}{crops} --out {path} --overwrite"
