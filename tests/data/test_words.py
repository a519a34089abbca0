import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from mvar_core.data.vectors import class_of_words, embed_words, phrasings, word_vectors
from mvar_core.errors import DataError

FROZEN = "ca44cea8ccbe8d4a0a600ed13c45d3531ebfd306c703fe5979c920b9ce0799a7"
FROZEN = "ca44cea8ccbe8d4a0a600ed13c45d3531ebfd306c703fe5979c920b9ce0799a7"
DIGITS = [str(digit) for digit in range(10)]


def test_vectors_are_the_same_everywhere() -> None:
    """Frozen bytes: a model that was trained elsewhere, or long ago, must find its words again."""
    vectors = embed_words(["seven", "a golden retriever"], 64)
    assert vectors.shape == (2, 64)
    assert vectors.dtype == np.float32
    assert hashlib.sha256(vectors.tobytes()).hexdigest() == FROZEN
    code = (
        "import hashlib; from mvar_core.data.vectors import embed_words;"
        "print(hashlib.sha256(embed_words(['seven', 'a golden retriever'], 64).tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == FROZEN


def test_case_order_and_punctuation_make_no_difference() -> None:
    first = embed_words(["A seven, please"], 64)
    assert np.array_equal(first, embed_words(["please a SEVEN!"], 64))
    assert np.allclose(np.linalg.norm(first, axis=1), 1)


@pytest.mark.parametrize("dim", [1, 8, 61, 768])
def test_every_dim(dim: int) -> None:
    vectors = embed_words(["one", "two", "three", "four"], dim)
    assert vectors.shape == (4, dim)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_phrasings_lie_nearest_their_own_class() -> None:
    plain = embed_words([phrasings(digit)[0] for digit in DIGITS], 64)
    unseen = [f"number {phrasings(digit)[0]}" for digit in DIGITS] + [f"my {phrasings(digit)[0]}" for digit in DIGITS]
    nearest = (embed_words(unseen, 64) @ plain.T).argmax(axis=1)
    assert nearest.tolist() == [*range(10), *range(10)]


def test_phrasings_of_numbers_and_names() -> None:
    assert phrasings("7") == ("seven", "a seven", "the digit seven", "7")
    assert phrasings("8")[1] == "an eight"
    assert phrasings("golden_retriever, dog") == (
        "golden retriever",
        "a golden retriever",
        "the golden retriever",
        "an image of a golden retriever",
    )
    assert phrasings("2024")[0] == "2024"


def test_class_of_words() -> None:
    assert class_of_words("The digit SEVEN", DIGITS) == 7
    assert class_of_words("number seven", DIGITS) == -1


def test_word_vectors_hold_every_phrasing() -> None:
    table = word_vectors(DIGITS, 16).values
    assert table.shape == (10, 4, 16)
    assert np.array_equal(table[3, 2], embed_words(["the digit three"], 16)[0])


def test_a_text_without_words_is_refused() -> None:
    with pytest.raises(DataError, match="holds no word"):
        embed_words(["?!"], 8)
