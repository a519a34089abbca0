"""`mvar evaluate likelihood`: how well a model knows held-out images, by the probability of their tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.analysis.likelihood import LikelihoodReport, measure_likelihood
from mvar_core.classes import Classes, align
from mvar_core.config import Machine
from mvar_core.data.images import ImageRows, open_images
from mvar_core.data.tokens import TokenCache
from mvar_core.distributed import connect
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.measure import shards
from mvar_core.models.micro_batches import DECODED_AT_ONCE
from mvar_core.models.official import tokenizer_hash_of
from mvar_core.progress import Progress, stage
from mvar_core.results import DryRun
from mvar_core.runtime import peak_memory_bytes
from mvar_core.untrusted import check_whole
from mvar_core.workflows.evaluate import load_pipeline

logger = logging.getLogger("mvar")

IMAGES_AT_ONCE = 16
"""Images whose inputs are held together; what goes through the model at once is smaller."""


@dataclass(frozen=True, kw_only=True)
class Likelihood(LikelihoodReport):
    """Likelihoods of images, and what they depend on.

    Attributes:
        source: The cache or the images.
        seed: Of the choice of images.
        conditions: Conditions under which each image was scored.
        peak_memory_bytes: Of this process on its device.
    """

    model: str
    source: str
    seed: int
    conditions: int
    device: str = ""
    processes: int = 1
    seconds: float = 0.0
    peak_memory_bytes: int = 0


def evaluate_likelihood(
    *,
    checkpoint: str | Path,
    tokens: str | Path | None = None,
    data: str | Path | None = None,
    classes: Sequence[str | int] | None = None,
    class_names: Sequence[str] | str | None = None,
    zero_shot: bool = True,
    num_samples: int | None = None,
    tokenizer: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Likelihood:
    """Bits per token of held-out images under a model, scale by scale, and zero-shot classification by it.

        mvar.evaluate_likelihood(checkpoint="runs/mvar", data="digits:test").bits_per_token

    Under torchrun the processes share the images, and each returns the figures of one process.

    Args:
        checkpoint: A model that is conditioned on classes.
        tokens: A token cache; one of this and `data`.
        data: Images.
        classes: Score only images of these classes, which compete in zero-shot classification; by default all.
        class_names: Names of classes that have only numbers, as of `evaluate`.
        zero_shot: Score each image under all classes; otherwise only under its own and under none.
        num_samples: At most so many images, chosen by the seed.
        tokenizer: The published tokenizer, where `checkpoint` is a .pth file.
        seed: Of that choice.
        batch_size: Images at a time; decides speed and memory, never the result.
        machine: Device, dtype and attention backend.
        progress: Called as images are scored.
        dry_run: Check everything, and score nothing.

    Raises:
        ConfigError: A model that is not conditioned on classes, or both or neither of `tokens` and `data`.
        DataError: Images, tokens or classes that are not the model's.
    """
    if (tokens is None) == (data is None):
        raise ConfigError("Likelihoods are of tokens or of images.", "Use one of --tokens CACHE and --data IMAGES.")
    for name, value in (("--num-samples", num_samples), ("--batch-size", batch_size)):
        if value is not None:
            check_whole(name, value, 1)
    check_whole("--seed", seed)
    machine, start = machine or Machine(), time.monotonic()
    with connect(machine.device) as here:
        pipeline = load_pipeline(checkpoint, tokenizer, machine)
        config = pipeline.config
        if config.conditioning.kind != "class":
            raise ConfigError(f"{config.name} is conditioned on vectors; likelihoods are scored under classes.")
        if tokens is not None:
            cache, source = TokenCache.open(Path(tokens)), str(tokens)
            cache.check(
                tokenizer_hash_of(Path(checkpoint), None if tokenizer is None else Path(tokenizer)), config.pyramid
            )
            names, numbers = cache.class_names, cache.labels

            def read(rows: NDArray[np.int64]) -> Tensor:
                return cache.tokens_of(rows, np.zeros_like(rows))  # none of the augmented views

        else:
            opened, source = open_images(str(data), max_pixels=machine.max_pixels), str(data)
            images = ImageRows(opened, config.image_shape)
            names, numbers = opened.class_names, opened.labels
            at_once = DECODED_AT_ONCE.get(pipeline.device.type, 1)

            def read(rows: NDArray[np.int64]) -> Tensor:
                pixels, _ = images.batch(rows)
                return torch.cat([pipeline.encode(few) for few in pixels.split(at_once)])

        rows, known_classes = np.arange(len(numbers)), Classes.of_model(config)
        labels = model_labels(Classes.of(names, origin=source), numbers, known_classes, class_names)
        asked = known_classes.resolve(classes or "all")
        if labels is None:
            logger.info("%s has no classes: its images are scored under no class only.", source)
        elif classes:
            rows = rows[np.isin(labels, asked)]
            if not len(rows):
                raise DataError(f"{source} holds no image of the classes that --class names.")
        if num_samples is not None and num_samples < len(rows):
            rows = np.sort(np.random.default_rng(seed).permutation(rows)[:num_samples])
        competing = asked if zero_shot and labels is not None else None
        conditions = 1 if labels is None else 2 if competing is None else 1 + len(competing)
        known: dict[str, Any] = {
            "model": str(checkpoint), "source": source, "seed": seed, "conditions": conditions
        }  # fmt: skip
        if dry_run:
            steps = (
                f"{'encode' if tokens is None else 'read the tokens of'} {len(rows)} images of {source}",
                f"score each under {conditions} conditions: {len(rows) * conditions} passes of one image",
            )
            facts = {"num_samples": len(rows), "pairs": len(rows) * conditions}
            return Likelihood(**known, dry_run=DryRun(configuration={}, steps=steps, facts=facts))
        block = shards(len(rows))[here.rank]
        own = rows[block.start : block.stop]
        size = batch_size or IMAGES_AT_ONCE
        batches = (own[start : start + size] for start in range(0, len(own), size))
        report_pairs = stage(progress, "scoring", "passes")
        report = measure_likelihood(
            pipeline.transformer,
            pipeline.quantizer,
            ((read(batch), None if labels is None else torch.from_numpy(labels[batch])) for batch in batches),
            config,
            classes=competing,
            attention=pipeline.attention,
            gather=here.all_gather_object,
            progress=lambda done: report_pairs(done, len(own) * conditions),
        )
        return Likelihood(
            **vars(report) | known,
            device=str(pipeline.device),
            processes=here.world_size,
            seconds=time.monotonic() - start,
            peak_memory_bytes=peak_memory_bytes(pipeline.device),
        )


def model_labels(
    classes: Classes, labels: NDArray[np.int64], model: Classes, class_names: Sequence[str] | str | None
) -> NDArray[np.int64] | None:
    """Labels in the model's numbering; None where the images are of one class, which the model does not have."""
    if classes.count == 1 and class_names is None and classes.match(model)[0] == (None,):
        return None
    return align(classes, model, class_names, np.unique(labels).tolist())[0][labels]
