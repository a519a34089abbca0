"""Vectors that images come with: of class names by hashing their words, or from a file that the user's encoder wrote.

Hashing is a stand-in for a text encoder, which needs no weights and is the same on every machine: a text is the sum of
its features, each a vector of signs that a hash gives: its words, and the pieces of three letters of each, so that what
is spelled alike is near. Sums are of integers and so exact. It knows spelling, not meaning.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import safe_open

from mvar_core.data.tokens import VectorsEntry, map_array
from mvar_core.errors import DataError, one_line
from mvar_core.io.npz import read_npz
from mvar_core.models.vectors import pool_sequence

ENCODER = "hashed-words"
"""`conditioning.encoder` of models that are conditioned on these vectors."""

_WORD, _PIECES, _SMALL = 12, 400, 3
"""How much a word counts; the squares of what its pieces do, taken together; and how much a word that means little."""
_MEANING_LITTLE = frozenset(("a", "an", "the", "of", "this", "that", "is", "my", "please"))
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip

_FILES = "Write one as .npy, .npz or .safetensors."
_AT_ONCE = 65_536
"""Rows of a file that are looked at together."""


@dataclass(frozen=True)
class Vectors:
    """Vectors float16 or float32 (rows, phrasings, X), a row for each class or image, and their entry in a manifest."""

    values: NDArray[Any]
    entry: VectorsEntry

    @classmethod
    def of(cls, kind: Literal["class", "image"], values: NDArray[Any], encoder: str | None, source: str) -> Vectors:
        """Vectors of classes or images, what made them, and the file or what else they came from."""
        _, phrasings, dim = values.shape
        digest = hashlib.sha256()
        for start in range(0, len(values), _AT_ONCE):
            digest.update(np.ascontiguousarray(values[start : start + _AT_ONCE]).tobytes())
        made = {"encoder": encoder, "source": source, "sha256": digest.hexdigest(), "dtype": values.dtype.name}
        return cls(values, VectorsEntry(of=kind, dim=dim, phrasings=phrasings, **made))


def word_vectors(class_names: Sequence[str], dim: int) -> Vectors:
    """Vectors of the classes' names by `embed_words`, several phrasings of each."""
    values = np.stack([embed_words(phrasings(name), dim) for name in class_names])
    return Vectors.of("class", values, ENCODER, "class names")


def caption_vectors(captions: Sequence[str], dim: int) -> Vectors:
    """Vectors of the images' captions by `embed_words`."""
    return Vectors.of("image", embed_words(captions, dim)[:, None], ENCODER, "captions")


def file_vectors(path: Path, *, classes: int, images: int, encoder: str | None = None) -> Vectors:
    """The vectors of a file, one for each image of a source (first choice) or class; `encoder` is what made them.

    DataError for another number of rows.
    """
    values, named = read_vectors(path)
    if len(values) not in (classes, images):
        raise DataError(
            f"{path} holds {len(values)} vectors; expected {images}, one for each image, or {classes}, one for each"
            " class.",
            "Write them in the order of the images' names, or of the classes' names.",
        )
    return Vectors.of("image" if len(values) == images else "class", values[:, None], encoder or named, path.name)


def read_vectors(path: Path) -> tuple[NDArray[Any], str | None]:
    """Vectors (rows, X) of a file, float16 or float32, and the name of what made them where the file has it.

    A .npy is mapped, not read. In a .npz or .safetensors they are called `vectors`; next to them may be a `mask`
    (rows, T), and then they are sequences (rows, T, X) and are pooled (mvar_core.models.vectors), and `encoder`, an
    array or metadata.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a file of vectors.", _FILES)
    found, mask, encoder = _arrays(path)
    if mask is not None:
        kinds = {mask.dtype.kind, found.dtype.kind} - set("biuf")
        if found.ndim != 3 or mask.shape != found.shape[:2] or kinds or not np.isin(mask, (0, 1)).all():
            problem = f"a mask {mask.dtype} {mask.shape} of zeros and ones does not fit"
            raise DataError(f"{path}: {problem} vectors {found.dtype} {found.shape}.")
        found = pool_sequence(torch.from_numpy(found.astype(np.float32)), torch.from_numpy(mask)).numpy()
    if found.ndim != 2 or not found.size or found.dtype.kind != "f":
        hint = "Sequences (rows, T, X) need a `mask` (rows, T) next to them." if found.ndim == 3 else None
        raise DataError(f"{path} holds {found.dtype} of shape {found.shape}; expected floats (rows, numbers).", hint)
    if found.dtype not in (np.float16, np.float32):
        found = found.astype(np.float32)
    for start in range(0, len(found), _AT_ONCE):
        usable = np.isfinite(found[start : start + _AT_ONCE]).all(axis=1)
        if not usable.all():
            raise DataError(f"{path}: vector {start + int(usable.argmin())} holds numbers that are not finite.")
    return found, encoder


def _arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None, str | None]:
    """Vectors, mask and encoder of a file."""
    try:
        if path.suffix == ".npy":
            return map_array(path), None, None
        if path.suffix == ".npz":
            arrays = read_npz(path, ("vectors", "mask", "encoder"))
            return arrays["vectors"], arrays.get("mask"), str(arrays["encoder"]) if "encoder" in arrays else None
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                vectors = file.get_tensor("vectors")
                # numpy knows no bfloat16.
                vectors = vectors.float() if vectors.dtype == torch.bfloat16 else vectors
                mask = file.get_tensor("mask").numpy() if "mask" in file.keys() else None  # noqa: SIM118
                return vectors.numpy(), mask, (file.metadata() or {}).get("encoder")
    except KeyError:
        raise DataError(f"{path} holds no array `vectors`.") from None
    except DataError:
        raise
    except Exception as error:  # whatever a damaged header makes of the readers
        raise DataError(f"{path} cannot be read as vectors: {one_line(error)[:300]}.", _FILES) from None
    raise DataError(f"{path} is not a file of vectors.", _FILES)


def embed_words(texts: Sequence[str], dim: int) -> Float[np.ndarray, "texts dim"]:
    """One vector of length 1 for each text, float32; the same on any machine, in any case, order and punctuation.

    Texts are in any language that separates words; 64 values (`dim`) tell some dozens of words apart. DataError for a
    text without a word.
    """
    rows = np.zeros((len(texts), dim), np.float64)
    for row, text in zip(rows, texts, strict=True):
        counts = _features(text)
        if not counts:
            raise DataError(f"{text!r:.200} holds no word.", "Write at least one letter or figure.")
        total = np.sum([weight * _signs(feature, dim) for feature, weight in counts.items()], axis=0)
        if not total.any():  # as may be where a vector has very few numbers
            total[0] = 1
        row[:] = total / np.sqrt(np.float64((total * total).sum()))
    return rows.astype(np.float32)


def phrasings(class_name: str) -> tuple[str, ...]:
    """Four ways to name a class, the plain one first: a seven is also "the digit seven", and "7".

    Of synonyms that commas separate the first counts; numbers below twenty are written as words.
    """
    name = " ".join(class_name.split(",")[0].replace("_", " ").split()) or class_name
    if name.isascii() and name.isdigit() and int(name) < len(_NUMBERS):
        word = _NUMBERS[int(name)]
        return word, _with_article(word), f"the digit {word}", str(int(name))
    return name, _with_article(name), f"the {name}", f"an image of {_with_article(name)}"


def class_of_words(text: str, class_names: Sequence[str]) -> int:
    """The class that a text is a phrasing of; -1 where it is none's."""
    wanted = _words(text)
    return next((label for label, name in enumerate(class_names) if wanted in map(_words, phrasings(name))), -1)


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].casefold() in 'aeiou' else 'a'} {name}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _features(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for word in _words(text):
        little = word in _MEANING_LITTLE
        counts[f"word {word}"] += _SMALL if little else _WORD
        bounded = f"<{word}>"
        pieces = [] if little else [bounded[start : start + 3] for start in range(len(bounded) - 2)]
        for piece in pieces:  # so that long words do not drown short ones
            counts[f"piece {piece}"] += math.isqrt(_PIECES // len(pieces))
    return counts


@lru_cache(maxsize=4096)
def _signs(feature: str, dim: int) -> NDArray[np.int64]:
    """+1 and -1, by the bits of a hash."""
    digest = hashlib.shake_256(feature.encode("utf-8")).digest(-(-dim // 8))
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:dim].astype(np.int64) * 2 - 1
