"""The tokens whose attention is measured: a token cache's, those of images, or samples of the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvar_cli.old_console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from mvar_core.pipeline import Pipeline


@dataclass(frozen=True)
class TokenSource:
    """Where the measured tokens come from.

    Attributes:
        name: What a reader of the report is told.
        total: Images.
        batches: Pairs of tokens (B, L) and conditions, in the sizes that were asked for.
    """

    name: str
    total: int
    batches: Iterator[tuple[Tensor, Any]]


def from_cache(
    pipeline: Pipeline, tokens: Path, tokenizer_hash: str, *, num: int, batch_size: int, seed: int
) -> TokenSource:
    """Rows of a token cache, chosen evenly.

    Raises:
        DataError: The cache was made by another tokenizer or for another pyramid, or has no vectors for a model that is
            conditioned on them.
    """
    from mvar_core.data.tokens import TokenCache

    cache = TokenCache.open(tokens)
    cache.check(tokenizer_hash, pipeline.config.pyramid)
    rows = cache.conditioned(pipeline.config.conditioning)
    chosen = _chosen(len(rows), num, seed)
    return TokenSource(f"{tokens} ({cache.manifest.source})", len(chosen), map(rows.batch, _parts(chosen, batch_size)))


def from_images(pipeline: Pipeline, data: str, *, num: int, batch_size: int, seed: int) -> TokenSource:
    """Images, chosen evenly, encoded a few at a time.

    Raises:
        DataError: There are no such images.
        ConfigError: A label that the model does not have.
    """
    import torch

    from mvar_core.data.images import ImageRows, open_images
    from mvar_core.models.micro_batches import DECODED_AT_ONCE

    images = ImageRows(open_images(data), pipeline.config.image_shape)
    chosen = _chosen(len(images), num, seed)
    at_once = DECODED_AT_ONCE.get(pipeline.device.type, 1)

    def batches() -> Iterator[tuple[Tensor, Any]]:
        for rows in _parts(chosen, batch_size):
            pixels, labels = images.batch(rows)
            # The encoder works at full resolution, where an image takes more memory than all of its attention.
            tokens_BL = torch.cat([pipeline.encode(part) for part in pixels.split(at_once)])
            yield tokens_BL, pipeline.conditions_of(labels.tolist())

    return TokenSource(f"images of {data}{_note(pipeline)}", len(chosen), batches())


def from_model(console: Console, pipeline: Pipeline, *, num: int, batch_size: int, seed: int) -> TokenSource:
    """Samples of the model itself, their classes evenly spread, drawn with its recommended settings.

    The images are never decoded. Sample i is the one that `mvar sample` draws with this seed, number and class.

    Raises:
        ConfigError: One image does not fit in memory.
    """
    import torch

    from mvar_core.sampling.images import ImageSampler
    from mvar_core.sampling.sampler import sample_tokens

    config, transformer = pipeline.config, pipeline.transformer
    console.note("No --tokens and no --data: the model's own samples are measured.")
    conditions = pipeline.conditions_of(spread_classes(num, transformer.no_class))
    sampler = ImageSampler(config, transformer, pipeline._tokenizer, pipeline.attention)
    settings = pipeline.sampling_settings()
    sizes = sampler.micro_batches(num, settings)
    parts = []
    drawn = 0
    with console.progress("sampling", "tokens") as progress:

        def show(count: int) -> None:
            nonlocal drawn
            drawn += count
            progress(drawn, num * config.pyramid.num_tokens)

        for start in range(0, num, sizes.images):
            indices = range(start, min(start + sizes.images, num))
            sampled = sample_tokens(
                transformer,
                pipeline.quantizer,
                conditions[indices.start : indices.stop],
                indices,
                seed,
                settings,
                micro_batches=sizes.scales,
                attention=pipeline.attention,
                on_tokens=show,
            )
            parts.append(sampled.tokens_NL)
    batches = zip(torch.cat(parts).split(batch_size), conditions.split(batch_size), strict=True)
    name = f"the model's own samples (seed {seed}, cfg {settings.cfg:g}){_note(pipeline)}"
    return TokenSource(name, num, batches)


def spread_classes(num: int, classes: int) -> list[int]:
    """`num` labels in ascending order, every class as often as any other but for one, or evenly spread over them."""
    return [index * classes // num for index in range(num)]


def _note(pipeline: Pipeline) -> str:
    """What a reader must know of conditions that are not there."""
    from mvar_core.sampling.conditions import without_conditions

    return ", without a condition, for vectors of classes are not known" if without_conditions(pipeline.config) else ""


def _chosen(rows: int, num: int, seed: int) -> np.ndarray:
    chosen: np.ndarray = np.sort(np.random.default_rng(seed).permutation(rows)[:num])
    return chosen


def _parts(chosen: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (chosen[start : start + size] for start in range(0, len(chosen), size))
