"""What images are generated from: classes, words or vectors, as the model is conditioned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvar_core.classes import Classes
from mvar_core.config import ModelConfig
from mvar_core.data.vectors import ENCODER, class_of_words, embed_words, phrasings, read_vectors
from mvar_core.errors import CheckpointError, ConfigError

LONGEST_NAME = 40
UNKNOWN = -1
"""The label of a text or vector that is no class."""


@dataclass(frozen=True)
class ChosenConditions:
    """Conditions, each of which gets as many images as the user asks for.

    `classes` are labels, -1 for a text or vector that is no class; files are named after `names`, or else labels.
    `vectors`, float32 (conditions, X), are there where the model is conditioned on them, and `class_names` are those of
    the model's classes where classes were chosen.
    """

    classes: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None
    vectors: NDArray[np.float32] | None = None
    class_names: tuple[str, ...] | None = None

    def described(self) -> tuple[dict[str, Any], ...]:
        """Name and index of each condition's class; of a text or vector that is no class, the index is None."""
        named = self.names or [self.class_names[index] for index in self.classes if self.class_names]
        known = (None if index == UNKNOWN else index for index in self.classes)
        return tuple({"name": name, "index": index} for name, index in zip(named, known, strict=True))


def choose_conditions(
    config: ModelConfig,
    classes: Sequence[str | int] | str = (),
    words: Sequence[str] = (),
    vectors: str | Path | None = None,
) -> ChosenConditions:
    """Conditions from what the user named, as of `sample_to`; none where nothing was named."""
    if config.transformer is None:
        raise CheckpointError(f"{config.name} is a tokenizer without a transformer.", "Train one with `mvar train`.")
    if sum((bool(classes), bool(words), vectors is not None)) > 1:
        raise ConfigError("--class, --words and --vectors each say what to generate.", "Give one of them.")
    dim = config.conditioning.dim
    if classes:
        known = Classes.of_model(config)
        labels = known.resolve(classes)
        if without_conditions(config):
            raise ConfigError(
                f"{config.name} is conditioned on vectors{_encoder(config)}, and has none for its classes.",
                "Use --vectors FILE.",
            )
        table = class_vectors(config)
        vectors_of_classes = None if table is None else table[labels]
        return ChosenConditions(tuple(labels), None, vectors_of_classes, known.all_names())
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
        found_classes = tuple(class_of_words(text, config.class_names or ()) for text in words)
        names = tuple(re.sub(r"\W+", "-", text).strip("-")[:LONGEST_NAME] for text in words)
        return ChosenConditions(found_classes, names, np.asarray(embed_words(words, dim)))
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
    if (table := class_vectors(config)) is None:
        return {"labels": labels}
    with_none = np.vstack([table, np.full_like(table[:1], np.nan)])  # behind the last class
    return {"labels": labels, "conditions": with_none[np.asarray(labels, int)]}


def _encoder(config: ModelConfig) -> str:
    return f" by {config.conditioning.encoder}" if config.conditioning.encoder else ""
