"""The files of a token cache and the manifest that describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mvar_core.config.training import DataConfig
from mvar_core.errors import DataError
from mvar_core.io.files import read_json, sha256_of_file
from mvar_core.pyramid import PatchSize

MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"
ITEMS = "items.txt"
"""Names of all images in caches of version 1; since then each shard has its own."""
RECEIPTS = "shard-*.json"
VECTORS = "vectors.npy"
"""Vectors of classes; those of images lie in the shards."""
OWN_FILES = (
    MANIFEST, PARTIAL, ITEMS, RECEIPTS, VECTORS, "tokens-*.npy", "labels-*.npy", "names-*.txt", "vectors-*.npy"
)  # fmt: skip
VERSION, VERSION_WITH_VECTORS = 2, 3
READABLE = (1, 2, 3)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Record):
    """One file of a cache, so that a changed or shortened file is noticed."""

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The entry of a file as it is now."""
        return cls(file=path.name, bytes=path.stat().st_size, sha256=sha256_of_file(path))

    def problem(self, directory: Path, verify: bool) -> str | None:
        """What is wrong with the file, or None; `verify` compares its hash as well as its size."""
        path = directory / self.file
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != self.bytes:
            return f"{path} has {found} bytes instead of {self.bytes}"
        if verify and sha256_of_file(path) != self.sha256:
            return f"{path} has changed since it was written"
        return None


class Shard(_Record):
    """Some consecutive images of a cache: tokens (images, views, L), labels (images), names (a line for each image).

    Attributes:
        images: Images in the shard.
        tokens: The file of their tokens.
        labels: The file of their labels.
        names: The file of their names; None in caches of version 1.
        vectors: The file of their vectors (images, X), where each image has one of its own.
        skipped: Names of images that could not be read and were left out.
    """

    images: int
    tokens: FileEntry
    labels: FileEntry
    names: FileEntry | None = None
    vectors: FileEntry | None = None
    skipped: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All of the shard's files."""
        return (self.tokens, self.labels, *(file for file in (self.names, self.vectors) if file))

    def problem(self, directory: Path, verify: bool) -> str | None:
        """What is wrong with the shard's files, or None."""
        return next((problem for file in self.files if (problem := file.problem(directory, verify))), None)

    @staticmethod
    def receipt(directory: Path, number: int) -> Path:
        """The file that says, while a cache is being written, that a shard is whole."""
        return directory / f"shard-{number:05d}.json"

    @classmethod
    def read(cls, path: Path) -> Shard | None:
        """A shard's receipt, or None where there is none that can be read."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None


class VectorsEntry(_Record):
    """The vectors that a cache holds for models that are conditioned on them.

    Attributes:
        of: Whether each class has some or each image has one.
        dim: Numbers of a vector, X.
        phrasings: Vectors of a class, which its images take in turn.
        dtype: As which they are stored.
        encoder: What made them: "hashed-words", or what the user called it.
        source: The file that they came from.
        sha256: Of their numbers.
        file: The file of those of classes, once it is there.
    """

    of: Literal["class", "image"]
    dim: int
    phrasings: int = 1
    dtype: Literal["float16", "float32"]
    encoder: str | None = None
    source: str
    sha256: str
    file: FileEntry | None = None


class Manifest(_Record):
    """What a token cache holds and what it was made from.

    Attributes:
        tokenizer_hash: SHA-256 of the tokenizer's weights file.
        patch_sizes: The pyramid.
        codebook_size: V; every token is below it.
        image_size: Side, or (height, width), of the images that were encoded.
        class_names: One name per label.
        images: Number of images, N, without those that were left out.
        skipped: How many images were left out because they could not be read.
        views: Views per image.
        view_names: What each view is.
        data: The settings of the views.
        seed: Seed of the augmented views.
        dtype: Of the tokens: the smallest unsigned type.
        source: Name and split of the images, as typed.
        fingerprint: SHA-256 over names, labels and sizes of all images.
        images_per_shard: Images of the source in every shard but the last.
        tokenizer: The tokenizer's directory, as it was given; None in caches of earlier versions.
        vectors: What the vectors are, where there are any.
        shards: The files, in order.
    """

    format: Literal["mvar-token-cache"] = "mvar-token-cache"
    version: int = VERSION
    tokenizer_hash: str
    patch_sizes: tuple[PatchSize, ...]
    codebook_size: int
    image_size: PatchSize
    class_names: tuple[str, ...]
    images: int
    skipped: int = 0
    views: int
    view_names: tuple[str, ...]
    data: DataConfig
    seed: int
    dtype: Literal["uint8", "uint16", "uint32"]
    source: str
    fingerprint: str
    images_per_shard: int
    tokenizer: str | None = None
    vectors: VectorsEntry | None = None
    shards: tuple[Shard, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            DataError: Not the manifest of a token cache, or one of a later version.
        """
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
            raise DataError(f"{path}: {key}: {first['msg']}.") from None

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON writes it; one without vectors as it always was."""
        values: dict[str, Any] = json.loads(self.model_dump_json(exclude_none=True))
        return values

    def differences(self, asked: Manifest) -> str:
        """How this cache's settings differ from those asked for, in words; empty where they are equal.

        The files, images left out and the name of the source do not count: the same images may lie elsewhere now.
        """
        there, here = self.to_json(), asked.to_json()
        there["images"] += self.skipped
        for values in (there, here):
            values["vectors"] = {
                key: value for key, value in values.get("vectors", {}).items() if key not in ("file", "source")
            } or None
        return "; ".join(
            f"{key} is {_short(there[key])} there, {_short(here[key])} asked"
            for key in there
            if key not in ("shards", "source", "tokenizer", "version", "skipped") and there[key] != here[key]
        )


def smallest_unsigned(largest: int) -> np.dtype[Any]:
    """The smallest unsigned integer type that holds 0 … `largest`."""
    return np.dtype(np.min_scalar_type(largest))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 70 else text[:67] + "…"
