"""Vectors of words by hashing: a stand-in for a text encoder, which needs no weights and is the same on every machine.

A text is the sum of its features, each a vector of signs that a hash gives: its words, and the pieces of three letters
of each, so that what is spelled alike lies near. Sums are of integers and so exact. It knows spelling, not meaning.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from mvar_core.errors import DataError

ENCODER = "hashed-words"
"""What a configuration's `conditioning.encoder` says where these vectors are meant."""

_WORD, _PIECES, _SMALL = 12, 400, 3
"""How much a word counts; the squares of what its pieces do, taken together; and how much a word that says little."""
_SAYING_LITTLE = frozenset(("a", "an", "the", "of", "this", "that", "is", "my", "please"))
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip


def embed_words(texts: Sequence[str], dim: int) -> Float[np.ndarray, "texts dim"]:
    """One vector of length 1 for each text, float32; equal texts have equal vectors, on any machine.

    Case, punctuation, and order of the words make no difference.

    Args:
        texts: In any language that separates words.
        dim: Numbers of a vector; 64 tell some dozens of words apart.

    Raises:
        DataError: A text without a word.
    """
    rows = []
    for text in texts:
        counts = _features(text)
        if not counts:
            raise DataError(f"{text!r} holds no word.", "Write at least one letter or figure.")
        total = np.zeros(dim, np.int64)
        for feature, weight in counts.items():
            total += weight * _signs(feature, dim)
        if not total.any():  # as may be where a vector has very few numbers
            total[0] = 1
        rows.append(total / np.sqrt(np.float64((total * total).sum())))
    return np.asarray(rows, np.float64).reshape(len(rows), dim).astype(np.float32)


def phrasings(class_name: str) -> tuple[str, ...]:
    """Ways to say a class, the plain one first, as many for every class: a seven is also "the digit seven", and "7".

    Of synonyms that commas separate the first counts; numbers below twenty are said as words.
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


def class_vectors(class_names: Sequence[str], dim: int) -> Float[np.ndarray, "classes phrasings dim"]:
    """Vectors of all phrasings of all classes."""
    every = [phrasings(name) for name in class_names]
    return np.stack([embed_words(texts, dim) for texts in every])


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].casefold() in 'aeiou' else 'a'} {name}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _features(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}

    def count(feature: str, weight: int) -> None:
        counts[feature] = counts.get(feature, 0) + weight

    for word in _words(text):
        if word in _SAYING_LITTLE:
            count(f"word {word}", _SMALL)
            continue
        count(f"word {word}", _WORD)
        bounded = f"<{word}>"
        pieces = [bounded[start : start + 3] for start in range(len(bounded) - 2)]
        for piece in pieces:  # so that long words do not drown short ones
            count(f"piece {piece}", math.isqrt(_PIECES // len(pieces)))
    return counts


@lru_cache(maxsize=4096)
def _signs(feature: str, dim: int) -> NDArray[np.int64]:
    """+1 and -1, by the bits of a hash."""
    digest = hashlib.shake_256(feature.encode("utf-8")).digest(-(-dim // 8))
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:dim].astype(np.int64) * 2 - 1
