"""What images are generated from: classes, words or vectors, as the model is conditioned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvar_core.config import ModelConfig
from mvar_core.data.vectors import ENCODER, class_of_words, embed_words, phrasings, read_vectors
from mvar_core.errors import CheckpointError, ConfigError, DataError, nearest

LONGEST_NAME = 40
UNKNOWN = -1
"""The label of a text or vector that is no class."""


@dataclass(frozen=True)
class ChosenConditions:
    """Conditions, each of which gets as many images as the user asks for.

    Attributes:
        classes: Class labels; -1 for a text or vector that is no class.
        names: What files are named after instead of labels.
        vectors: float32 (conditions, X), where the model is conditioned on vectors.
    """

    classes: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None
    vectors: NDArray[np.float32] | None = None


def choose_conditions(
    config: ModelConfig,
    classes: Sequence[str | int] | str = (),
    words: Sequence[str] = (),
    vectors: str | Path | None = None,
) -> ChosenConditions:
    """Conditions from what the user named, as of `sample_to`; none where nothing was named.

    Raises:
        MvarError: The model is a tokenizer alone, several of the three, one that the model is not conditioned on, no
            such class, or a file without vectors.
    """
    if config.transformer is None:
        raise CheckpointError(f"{config.name} is a tokenizer without a transformer.", "Train one with `mvar train`.")
    classes = [classes] if isinstance(classes, str) else list(classes)
    if sum((bool(classes), bool(words), vectors is not None)) > 1:
        raise ConfigError("--class, --words and --vectors each say what to generate.", "Give one of them.")
    dim = config.conditioning.dim
    if classes:
        labels = parse_classes(classes, config.transformer.num_classes, config.class_names)
        if without_conditions(config):
            raise ConfigError(
                f"{config.name} is conditioned on vectors{_encoder(config)}, and has none for its classes.",
                "Use --vectors FILE.",
            )
        table = class_vectors(config)
        return ChosenConditions(tuple(labels), vectors=None if table is None else table[labels])
    if not words and vectors is None:
        return ChosenConditions()
    if dim is None:
        raise ConfigError(f"{config.name} is conditioned on class labels.", "Choose classes with --class.")
    if words:
        if config.conditioning.encoder != ENCODER:
            raise ConfigError(
                f"{config.name} expects vectors{_encoder(config)}; --words makes them with {ENCODER}.",
                "Compute the texts' vectors with the model's encoder, and use --vectors FILE.",
            )
        known = tuple(class_of_words(text, config.class_names or ()) for text in words)
        names = tuple(re.sub(r"\W+", "-", text).strip("-")[:LONGEST_NAME] for text in words)
        return ChosenConditions(known, names, np.asarray(embed_words(words, dim)))
    assert vectors is not None
    found, encoder = read_vectors(Path(vectors))
    if found.shape[1] != dim:
        raise ConfigError(f"{vectors} holds vectors of {found.shape[1]} values; {config.name} expects {dim}.")
    if None not in (encoder, config.conditioning.encoder) and encoder != config.conditioning.encoder:
        raise ConfigError(f"{vectors} holds vectors by {encoder}; {config.name} expects those{_encoder(config)}.")
    names = tuple(f"vector-{index}" for index in range(len(found)))
    return ChosenConditions((UNKNOWN,) * len(found), names, np.asarray(found, np.float32))


def class_vectors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Vectors (classes, X) for the classes of a model that is conditioned on vectors; None for other models.

    They are those of the classes' names where the model is conditioned on words, otherwise nan, which is no condition.
    """
    dim = config.conditioning.dim
    if dim is None or config.transformer is None:
        return None
    if config.conditioning.encoder != ENCODER or config.class_names is None:
        return np.full((config.transformer.num_classes, dim), np.nan, np.float32)
    return np.asarray(embed_words([phrasings(name)[0] for name in config.class_names], dim))


def without_conditions(config: ModelConfig) -> bool:
    """Whether classes are generated without a condition, because the vectors of their names are not known here."""
    table = class_vectors(config)
    return table is not None and bool(np.isnan(table).any())


def by_labels(config: ModelConfig, labels: Sequence[int]) -> dict[str, Any]:
    """Arguments of `Pipeline.sample` for these class labels, whatever the model is conditioned on."""
    table = class_vectors(config)
    return {"labels": labels} if table is None else {"labels": labels, "conditions": table[np.asarray(labels, int)]}


def parse_classes(texts: Sequence[str | int], num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Class labels in the order they were asked for, each once, from labels, names, comma lists of them, or "all".

    A whole name is tried before commas are read as separators, for names may hold commas ("tench, Tinca tinca").

    Raises:
        DataError: A label out of range, or a name that no class has (with the nearest names).
    """
    names: dict[str, list[int]] = {}  # each whole name, and each of its synonyms, which commas separate
    for label, name in enumerate(class_names or ()):
        for known in dict.fromkeys([_fold(name), *(_fold(synonym) for synonym in name.split(","))]):
            names.setdefault(known, []).append(label)

    def read(text: str) -> int:
        if labels := names.get(_fold(text)):
            if len(labels) > 1:
                raise DataError(
                    f"--class {text!r} is the name of classes {', '.join(map(str, labels))}.",
                    "Choose one by its number.",
                )
            return labels[0]
        try:
            label = int(text)
        except ValueError:
            if not names:
                raise DataError(f"--class {text.strip()!r}: this model records no class names.",
                                f"Use a label 0 … {num_classes - 1}.") from None  # fmt: skip
            raise DataError(f"There is no class {text.strip()!r}.", nearest(_fold(text), names)) from None
        if not 0 <= label < num_classes:
            raise DataError(f"--class {label} is out of range.", f"The model has classes 0 … {num_classes - 1}.")
        return label

    labels: list[int] = []
    for text in map(str, texts):
        if _fold(text) == "all":
            labels += range(num_classes)
        elif _fold(text) in names:
            labels.append(read(text))
        else:
            labels += [read(part) for part in text.split(",") if part.strip()]
    if not labels:
        raise DataError("--class names no class.", f"Use a label 0 … {num_classes - 1}, a name, or all.")
    return list(dict.fromkeys(labels))


def _fold(name: str) -> str:
    return " ".join(name.casefold().split())


def _encoder(config: ModelConfig) -> str:
    return f" by {config.conditioning.encoder}" if config.conditioning.encoder else ""
