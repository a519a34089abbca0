"""`mvar evaluate`: how good images are, measured against a reference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import options
from mvar_cli.console import Console, format_seconds
from mvar_core.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mvar_core.metrics.features import FeatureExtractor
    from mvar_core.metrics.statistics import FeatureSet

EXAMPLE = "mvar evaluate --checkpoint runs/quickstart/mvar --reference digits"

FEATURES = ("auto", "inception", "demo")
DEFAULT_SAMPLES = {"inception": 50_000, "demo": 1_000}
HEADINGS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
}


def run(
    reference: Annotated[
        str, typer.Option("--reference", metavar="PATH|digits", help="Folder, npz, ADM npz, digits or digits:test.")
    ],
    samples: Annotated[str | None, typer.Option("--samples", metavar="PATH", help="Folder or npz of images.")] = None,
    checkpoint: options.OptionalCheckpoint = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", min=2, metavar="N", help="To draw, balanced over classes.")
    ] = None,
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="NAMES", help="Comma list of fid, sfid, inception_score, precision, …")
    ] = "all",
    features: Annotated[
        str, typer.Option("--features", metavar="NAME", help="inception, or demo; auto is demo for digits.")
    ] = "auto",
    inception_weights: Annotated[
        Path | None, typer.Option("--inception-weights", metavar="FILE", help="The network that FID is defined by.")
    ] = None,
    demo_classifier: Annotated[
        Path | None, typer.Option("--demo-classifier", metavar="FILE", help="The classifier behind demo features.")
    ] = None,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance, with --checkpoint.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="With --checkpoint.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="With --checkpoint.")] = None,
    tokenizer: options.TokenizerFile = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """FID, sFID, inception score, precision, recall and KID of images, or of a checkpoint, against a reference.

    Says whether the figures may stand beside published ones, and if not, why not.
    """
    console = Console(as_json)
    if (samples is None) == (checkpoint is None):
        raise ConfigError(
            "There must be something to measure.", "Give --samples PATH or --checkpoint DIR, one of them."
        )
    if features not in FEATURES:
        raise ConfigError(f"--features {features!r} is not known. {nearest(features, FEATURES)}")
    from mvar_core.metrics.scores import METRICS, check_metrics

    asked = METRICS if metrics == "all" else check_metrics([name.strip() for name in metrics.split(",")])
    kind = features if features != "auto" else "demo" if reference.split(":")[0] == "digits" else "inception"
    if kind == "inception":
        from mvar_core.metrics.features import find_inception_weights

        inception_weights = find_inception_weights(inception_weights)
    if checkpoint is not None:
        judged = _of_checkpoint(checkpoint, tokenizer, num_samples or DEFAULT_SAMPLES[kind], device, dtype, attention)
        judged.settings = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "seed": seed}
        judged.pipeline.sampling_settings(cfg, top_k, top_p)
    else:
        judged = _of_images(str(samples), num_samples)
    judged.batch_size = batch_size or 64
    known = Reference.open(reference, judged.image_shape, kind)
    if dry_run:
        console.say(f"1. {judged.verb} {judged.count} images of {judged.name}")
        console.say(f"2. measure {', '.join(asked)} with {kind} features against {reference}")
        console.say("Nothing was done (--dry-run).")
        console.finish({"dry_run": True, "num_samples": judged.count, "features": kind, "metrics": asked})
        return
    extractor = _extractor(kind, inception_weights, demo_classifier, checkpoint, judged.image_shape, device)
    start = time.monotonic()
    reference_set = known.measure(console, extractor)
    sample_set = judged.measure(console, extractor)
    _report(console, judged, sample_set, reference_set, extractor, asked, seed, time.monotonic() - start)


@dataclass
class Judged:
    """The images that are judged: read, or drawn as they are measured."""

    name: str
    verb: str
    count: int
    image_shape: tuple[int, int]
    labels: np.ndarray | None
    source: Any = None
    pipeline: Any = None
    settings: dict[str, Any] | None = None
    batch_size: int = 64

    def batches(self) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W)."""
        if self.pipeline is None:
            yield from _first(self.source.batches(self.batch_size), self.count)
            return
        assert self.labels is not None
        for start in range(0, self.count, self.batch_size):
            labels = self.labels[start : start + self.batch_size].tolist()
            indices = range(start, start + len(labels))
            drawn = self.pipeline.sample(labels, indices=indices, **(self.settings or {}))
            yield drawn.images.permute(0, 3, 1, 2).contiguous()

    def measure(self, console: Console, extractor: FeatureExtractor) -> FeatureSet:
        """Features of all images."""
        from mvar_core.metrics.statistics import collect

        with console.progress("samples") as progress:
            return collect(extractor, self.batches(), self.count, progress)


def _first(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for batch in batches:
        if count <= 0:
            return
        yield batch[:count]
        count -= len(batch)


def _of_images(samples: str, limit: int | None) -> Judged:
    from mvar_core.data.evaluation_images import open_evaluation_images
    from mvar_core.data.images import split_name
    from mvar_core.presets import load_config

    # Digits have no size of their own; they are measured at the size that the preset gives them.
    shape = load_config("digits").image_shape if split_name(samples)[0] == "digits" else None
    images = open_evaluation_images(samples, shape)
    count = min(images.count, limit or images.count)
    labels = images.labels[:count] if images.labels is not None else None
    return Judged(samples, "read", count, images.image_shape, labels, source=images)


def _of_checkpoint(
    checkpoint: Path, tokenizer: Path | None, count: int, device: str, dtype: str, attention: str
) -> Judged:
    import numpy as np

    from mvar_core.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(
        checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, attention=attention
    )
    labels = np.arange(count) % pipeline.transformer.no_class
    return Judged(str(checkpoint), "draw", count, pipeline.config.image_shape, labels, pipeline=pipeline)


@dataclass
class Reference:
    """What the images are judged by: images, or statistics of them, or both."""

    path: Path | None
    images: Any

    @classmethod
    def open(cls, text: str, image_shape: tuple[int, int], kind: str) -> Reference:
        """Check that the reference is there and can be used, before anything slow.

        Raises:
            DataError: It is neither images nor statistics.
        """
        from mvar_core.data.evaluation_images import open_evaluation_images
        from mvar_core.metrics.statistics import read_statistics

        path = Path(text).expanduser()
        if path.suffix.lower() != ".npz":
            return cls(None, open_evaluation_images(text, image_shape))
        has_statistics = kind == "inception" and read_statistics(path) is not None
        try:
            images = open_evaluation_images(text, image_shape)
        except DataError:
            if not has_statistics:
                raise
            images = None
        return cls(path if has_statistics else None, images)

    def measure(self, console: Console, extractor: FeatureExtractor) -> FeatureSet:
        """Features and statistics of the reference."""
        from mvar_core.metrics.statistics import collect, read_statistics

        measured = None
        if self.images is not None:
            with console.progress("reference") as progress:
                measured = collect(extractor, self.images.batches(64), self.images.count, progress)
        if self.path is None:
            assert measured is not None
            return measured
        known = read_statistics(self.path, measured)
        assert known is not None
        return known


def _extractor(
    kind: str,
    inception_weights: Path | None,
    demo_classifier: Path | None,
    checkpoint: Path | None,
    image_shape: tuple[int, int],
    device: str,
) -> FeatureExtractor:
    from mvar_core.runtime import resolve_device

    target = resolve_device(device)
    if kind == "inception":
        from mvar_core.metrics.features import load_inception

        return load_inception(inception_weights, "cpu" if target.type == "mps" else target)
    from mvar_cli.classifier import find_classifier
    from mvar_core.metrics.demo import DemoExtractor

    nearby = [checkpoint, checkpoint.parent] if checkpoint is not None else []
    return DemoExtractor(find_classifier(demo_classifier, nearby, image_shape), "cpu")


def _report(
    console: Console,
    judged: Judged,
    sample_set: FeatureSet,
    reference_set: FeatureSet,
    extractor: FeatureExtractor,
    asked: tuple[str, ...],
    seed: int,
    seconds: float,
) -> None:
    from mvar_core.metrics.published import comparability
    from mvar_core.metrics.scores import evaluate_features

    scores = evaluate_features(sample_set, reference_set, asked, seed=seed)
    comparable, why_not = comparability(extractor, judged.count, reference_set)
    rows: list[tuple[Any, ...]] = [(judged.name, *(scores[name] for name in HEADINGS))]
    if extractor.name == "inception" and judged.image_shape == (256, 256):
        rows += _published_rows()
    console.table(f"{judged.count:,} samples, {extractor.name} features", ("", *HEADINGS.values()), rows)
    accuracy = _accuracy(sample_set, judged) if extractor.name == "demo" else None
    if accuracy is not None:
        console.say(f"Classified as their labels say: {accuracy:.1%}")
    for name, reason in scores["reasons"].items():
        if reason != "not asked for":
            console.say(f"{HEADINGS[name]}: not computed, {reason}")
    if comparable:
        console.say("Comparable with published figures.")
    else:
        console.say(f"Not comparable with published figures: {'; '.join(why_not)}.")
    console.note(f"Measured in {format_seconds(seconds)}.")
    console.finish(
        {
            **scores,
            "num_samples": judged.count,
            "num_reference": reference_set.num_images,
            "features": extractor.name,
            "weights_hash": extractor.weights_hash,
            "comparable_to_papers": comparable,
            "why_not": why_not,
            "classifier_accuracy": accuracy,
            "seconds": seconds,
        }
    )


def _accuracy(sample_set: FeatureSet, judged: Judged) -> float | None:
    """Part of the samples that the classifier takes for what they are labelled as."""
    if judged.labels is None or sample_set.logits is None or judged.labels.max() >= sample_set.logits.shape[1]:
        return None
    return float((sample_set.logits.argmax(dim=1).numpy() == judged.labels).mean())


def _published_rows() -> list[tuple[Any, ...]]:
    from mvar_core.metrics.published import IMAGENET_256

    return [
        (f"{row.model}, published", row.fid, None, row.inception_score, row.precision, row.recall, None)
        for row in IMAGENET_256
    ]
