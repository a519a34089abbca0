"""What `mvar` draws by: classes, words or vectors, as the model is conditioned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvar_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mvar_core.config import ModelConfig
    from mvar_core.pipeline import Pipeline

LONGEST_NAME = 40
UNKNOWN = -1
"""The label of what is no class."""


class Chosen(NamedTuple):
    """What is drawn, each as often as the user says.

    Attributes:
        labels: Class labels; -1 for what is no class.
        names: As files are called, where not by their labels.
        vectors: float32 (conditions, X), where the model is conditioned on vectors.
    """

    labels: tuple[int, ...]
    names: tuple[str, ...] | None = None
    vectors: NDArray[np.float32] | None = None


def chosen(config: ModelConfig, classes: Sequence[str], words: Sequence[str], vectors: Path | None) -> Chosen:
    """What the user asked for; nothing where they named nothing.

    Args:
        config: The model; it has a transformer.
        classes: What followed `--class`.
        words: What followed `--words`.
        vectors: A file of vectors.

    Raises:
        ConfigError: Several of them, or something that the model is not conditioned on.
        DataError: No such class, or a file that holds no vectors.
    """
    from mvar_cli.selection import parse_classes

    given = sum(map(bool, (classes, words, vectors)))
    if given > 1:
        raise ConfigError("--class, --words and --vectors each say what to draw.", "Give one of them.")
    if not given:
        return Chosen(())
    dim = config.conditioning.dim
    if classes:
        count = config.transformer.num_classes if config.transformer is not None else 0
        labels = parse_classes(classes, count, config.class_names)
        table = class_vectors_of(config)
        if without_conditions(config):
            raise ConfigError(
                f"{config.name} is conditioned on vectors{_by(config)}, and knows none for its classes.",
                "Give --vectors FILE.",
            )
        return Chosen(tuple(labels), vectors=None if table is None else table[labels])
    if dim is None:
        raise ConfigError(f"{config.name} is conditioned on class labels.", "Say what to draw with --class.")
    if words:
        return _by_words(config, words, dim)
    from mvar_core.data.vectors import read_vectors

    assert vectors is not None
    found, encoder = read_vectors(vectors)
    if found.shape[1] != dim:
        raise ConfigError(f"{vectors} holds vectors of {found.shape[1]} numbers; {config.name} takes {dim}.")
    if None not in (encoder, config.conditioning.encoder) and encoder != config.conditioning.encoder:
        raise ConfigError(f"{vectors} holds vectors by {encoder}; {config.name} takes those{_by(config)}.")
    names = tuple(f"vector-{index}" for index in range(len(found)))
    return Chosen((UNKNOWN,) * len(found), names, np.asarray(found, np.float32))


def class_vectors_of(config: ModelConfig) -> NDArray[np.float32] | None:
    """Vectors (classes, X) that stand for the classes of a model that is conditioned on vectors; None of others.

    They are those of the classes' names where the model takes words, else nan, by which is drawn without a condition.
    """
    from mvar_core.data.words import ENCODER, embed_words, phrasings

    dim = config.conditioning.dim
    if dim is None or config.transformer is None:
        return None
    if config.conditioning.encoder != ENCODER or config.class_names is None:
        return np.full((config.transformer.num_classes, dim), np.nan, np.float32)
    return np.asarray(embed_words([phrasings(name)[0] for name in config.class_names], dim))


def conditions_of(pipeline: Pipeline, labels: Sequence[int]) -> Tensor:
    """What images of these classes are conditioned on, whatever the model is conditioned on; on the CPU."""
    arguments = by_labels(pipeline.config, labels)
    return pipeline.transformer.conditioner.read(arguments.get("conditions", labels))


def without_conditions(config: ModelConfig) -> bool:
    """Whether classes are drawn without a condition, since nobody here knows the vectors of their names."""
    table = class_vectors_of(config)
    return table is not None and bool(np.isnan(table).any())


def by_labels(config: ModelConfig, labels: Sequence[int]) -> dict[str, Any]:
    """Arguments of `Pipeline.sample` that draw by class labels, whatever the model is conditioned on."""
    table = class_vectors_of(config)
    return {"labels": labels} if table is None else {"labels": labels, "conditions": table[np.asarray(labels, int)]}


def _by_words(config: ModelConfig, words: Sequence[str], dim: int) -> Chosen:
    from mvar_core.data.words import ENCODER, class_of_words, embed_words

    if config.conditioning.encoder != ENCODER:
        raise ConfigError(
            f"{config.name} takes vectors{_by(config)}; --words makes those by {ENCODER}.",
            "Compute the texts' vectors with the model's encoder, and give --vectors FILE.",
        )
    labels = tuple(class_of_words(text, config.class_names or ()) for text in words)
    names = tuple(re.sub(r"\W+", "-", text).strip("-")[:LONGEST_NAME] for text in words)
    return Chosen(labels, names, np.asarray(embed_words(words, dim)))


def _by(config: ModelConfig) -> str:
    return f" by {config.conditioning.encoder}" if config.conditioning.encoder else ""
