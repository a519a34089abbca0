"""`mvar evaluate --likelihood`: how well a model knows held-out images, by the probability it gives their tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mvar_cli.old_console import Console, format_seconds
from mvar_cli.processes import Processes
from mvar_core.analysis.likelihood import LikelihoodReport, Tally, measure_likelihood
from mvar_core.config import ModelConfig
from mvar_core.data.images import ImageRows, open_images
from mvar_core.data.tokens import TokenCache
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.sharding import shard
from mvar_core.models.micro_batches import DECODED_AT_ONCE
from mvar_core.models.official import tokenizer_hash_of
from mvar_core.pipeline import Pipeline
from mvar_core.runtime import peak_memory_bytes
from mvar_core.sampling.conditions import parse_classes

IMAGES_AT_ONCE = 16
"""Images whose inputs are held together; what goes through the model at once is smaller."""


@dataclass(frozen=True)
class LikelihoodRequest:
    """What to score.

    Attributes:
        checkpoint: The model.
        loading: How `Pipeline.from_pretrained` loads it.
        tokens: A token cache; one of this and `data` is there.
        data: Images.
        classes: Which classes compete, as typed; all by default.
        zero_shot: Whether any do.
        num: At most so many images, chosen by the seed.
        seed: Of that choice.
        batch_size: Images at a time.
    """

    checkpoint: Path
    loading: dict[str, Any]
    tokens: Path | None
    data: str | None
    classes: list[str] | None
    zero_shot: bool
    num: int | None
    seed: int
    batch_size: int | None

    @property
    def source(self) -> str:
        """What is scored, as the user calls it."""
        return str(self.tokens or self.data)


def score(team: Processes, console: Console, request: LikelihoodRequest, dry_run: bool) -> None:
    """Score images and print what came out; several processes share them and print what one would.

    Raises:
        ConfigError: A model that is not conditioned on classes.
        DataError: Images, tokens or classes that are not the model's.
    """
    start = time.monotonic()
    pipeline = Pipeline.from_pretrained(request.checkpoint, **request.loading)
    config, num_classes = pipeline.config, pipeline.transformer.no_class
    if config.conditioning.kind != "class":
        raise ConfigError(f"{config.name} is conditioned on vectors; --likelihood scores classes.")
    images = _Images(request, pipeline)
    asked = parse_classes(request.classes or ["all"], num_classes, config.class_names)
    rows, labels = images.chosen(console, request, asked)
    classes = asked if request.zero_shot and labels is not None else None
    each = 1 if labels is None else 2 if classes is None else 1 + len(classes)
    if dry_run:
        console.say(f"1. {images.verb} {len(rows)} images of {request.source}")
        console.say(f"2. score each under {each} conditions: {len(rows) * each} passes of one image")
        console.say("Nothing was done (--dry-run).")
        console.finish({"dry_run": True, "num_samples": len(rows), "pairs": len(rows) * each})
        return
    own = shard(len(rows))
    rows, count = rows[own.start : own.stop], len(rows)
    labels = labels[own.start : own.stop] if labels is not None else None

    def gather(tally: Tally) -> list[Tally]:
        tallies: list[Any] = [tally]
        if team.count > 1:
            tallies *= team.count
            dist.all_gather_object(tallies, tally)
        return tallies

    with console.progress("scoring", "passes") as progress:
        report = measure_likelihood(
            pipeline.transformer,
            pipeline.quantizer,
            images.batches(rows, labels, request.batch_size or IMAGES_AT_ONCE),
            config,
            classes=classes,
            attention=pipeline.attention,
            gather=gather,
            progress=lambda done: progress(done, len(rows) * each),
        )
    show(console, config, report, classes)
    seconds = time.monotonic() - start
    console.finish(
        {
            **report.to_dict(),
            "model": str(request.checkpoint),
            "source": request.source,
            "seed": request.seed,
            "device": str(pipeline.device),
            "processes": team.count,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(pipeline.device),
        }
    )
    console.note(f"{count} images under {each} conditions each in {format_seconds(seconds)}")


def show(console: Console, config: ModelConfig, report: LikelihoodReport, classes: Sequence[int] | None) -> None:
    """Tables of what was measured."""
    grids = config.pyramid.grids
    by_scale = report.zero_shot_accuracy_by_scale
    console.table(
        "bits per token, scale by scale",
        ("side", "tokens", "bits per token", *(["zero-shot by scales up to it"] if by_scale else [])),
        [
            (
                str(grid.height) if grid.height == grid.width else str(grid),
                grid.tokens,
                bits,
                *([by_scale[scale]] if by_scale else []),
            )
            for scale, (grid, bits) in enumerate(zip(grids, report.bits_per_token_by_scale, strict=True))
        ],
    )
    condition = "no class" if report.nll_by_class is None else "their own class"
    error = f" ± {report.bits_per_image_error:.3g}" if report.bits_per_image_error is not None else ""
    console.say(
        f"{report.num_samples} images under {condition}: {report.bits_per_token:.4g} bits per token"
        f" (of {report.uniform_bits_per_token:.4g}), {report.bits_per_image:.5g}{error} bits per image,"
        f" {report.bits_per_pixel:.4g} per pixel."
    )
    if report.class_information is not None:
        console.say(
            f"Under no class: {report.bits_per_token_no_class:.4g} bits per token; the class tells"
            f" {report.class_information:.4g} bits of an image."
        )
    if report.nll_by_class is not None and report.samples_by_class is not None:
        worst = sorted(report.nll_by_class.items(), key=lambda item: -item[1])[:20]
        console.table(
            "nats per image, by class" + (", the 20 least likely" if len(report.nll_by_class) > len(worst) else ""),
            ("class", "images", "-ln p"),
            [(name, report.samples_by_class[name], nats) for name, nats in worst],
        )
    if report.zero_shot_accuracy is not None and classes is not None:
        top = f", {report.zero_shot_top5:.1%} among five" if report.zero_shot_top5 is not None else ""
        console.say(
            f"Zero-shot classification among {len(classes)} classes: {report.zero_shot_accuracy:.1%} right{top}"
            f" (chance: {1 / len(classes):.1%})."
        )


class _Images:
    """Tokens and labels of images, from a token cache or encoded on the way; labels are the model's."""

    def __init__(self, request: LikelihoodRequest, pipeline: Pipeline):
        self.pipeline = pipeline
        self.cache: TokenCache | None = None
        if request.tokens is not None:
            self.verb = "read the tokens of"
            self.cache = TokenCache.open(request.tokens)
            digest = tokenizer_hash_of(request.checkpoint, request.loading["tokenizer"])
            self.cache.check(digest, pipeline.config.pyramid)
            names, labels = self.cache.class_names, self.cache.labels
        else:
            self.verb = "encode"
            assert request.data is not None
            source = open_images(request.data)
            self.images = ImageRows(source, pipeline.config.image_shape)
            names, labels = tuple(source.class_names), source.labels
        self.labels = _model_labels(names, labels, pipeline.config, request.source)

    def chosen(
        self, console: Console, request: LikelihoodRequest, classes: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Which images are scored, and their labels; those of other classes are left out."""
        count = self.cache.num_images if self.cache is not None else len(self.images)
        rows = np.arange(count)
        if self.labels is None:
            console.note(f"{request.source} has no classes: its images are scored under no class alone.")
        elif request.classes:
            rows = rows[np.isin(self.labels, classes)]
            if not len(rows):
                raise DataError(f"{request.source} holds no image of the classes that --class names.")
        if request.num is not None and request.num < len(rows):
            rows = np.sort(np.random.default_rng(request.seed).permutation(rows)[: request.num])
        return rows, self.labels[rows] if self.labels is not None else None

    def batches(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64] | None, size: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens (B, L) and labels (B,) of some images; of a cache, the images as they are and not their views."""
        at_once = DECODED_AT_ONCE.get(self.pipeline.device.type, 1)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            if self.cache is not None:
                tokens = self.cache.tokens_of(rows[part], np.zeros_like(rows[part]))
            else:
                pixels, _ = self.images.batch(rows[part])
                tokens = torch.cat([self.pipeline.encode(few) for few in pixels.split(at_once)])
            yield tokens, torch.from_numpy(labels[part]) if labels is not None else None


def _model_labels(
    names: Sequence[str], labels: NDArray[np.int64], config: ModelConfig, source: str
) -> NDArray[np.int64] | None:
    """Labels by which the model knows the classes of a source; None where the source has none.

    Classes are matched by name, or by their number where there are as many as the model has.

    Raises:
        DataError: They are other classes.
    """
    assert config.transformer is not None
    known = {name: label for label, name in enumerate(config.class_names or ())}
    if known and all(name in known for name in names):
        return np.array([known[name] for name in names], np.int64)[labels]
    if len(names) == config.transformer.num_classes:
        return labels
    if len(names) <= 1:
        return None
    raise DataError(
        f"{source} has {len(names)} classes ({', '.join(names[:3])}, …), which are not the model's"
        f" {config.transformer.num_classes}.",
        "Name its folders as the model's classes, or put all images into one folder to score them under no class.",
    )
