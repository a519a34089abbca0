"""`mvar evaluate`: scores of images against a reference; and references that are measured once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core import __version__
from mvar_core.classes import Classes, align
from mvar_core.config import Machine, SamplingConfig
from mvar_core.distributed import connect, world
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.extractors import ExtractorChoice, Network
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.measure import ImageSet, Measurer, Reference, check_values, open_measured_images
from mvar_core.evaluation.published import cautions, comparability, comparable_rows, input_reasons
from mvar_core.evaluation.references import is_reference, save_reference
from mvar_core.evaluation.scores import check_counts, check_metrics, evaluate_features, per_class_scores
from mvar_core.evaluation.statistics import FeatureSet
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress
from mvar_core.pyramid import read_size
from mvar_core.results import DryRun, Result
from mvar_core.runtime import resolve_device
from mvar_core.sampling.conditions import by_labels

logger = logging.getLogger("mvar")

SAMPLES_FOR_INCEPTION = 50_000
SAMPLES_FOR_OTHERS = 1_000
NEED_FEATURES = ("precision", "recall", "kid")


@dataclass(frozen=True, kw_only=True)
class Measured(Result):
    """What a figure depends on, next to the images themselves.

    Attributes:
        num_reference: Images that the samples were compared with; None where the reference does not say.
        samples: What the samples are called: their path, or the checkpoint.
        image_shape: Height and width of the samples.
        shuffle_seed: Seed of the shuffle and the subsets.
        sampling: Settings, seed, device, dtype and attention of samples that were generated.
        reasons: Why a score is None.
        why_not: Every reason why figures are not comparable with published ones.
        warnings: What makes a figure noisier than it would be with more images.
        seconds: Time for measuring.
    """

    num_samples: int = 0
    num_reference: int | None = None
    samples: str = ""
    reference: str = ""
    image_shape: tuple[int, int] = (0, 0)
    features: str = ""
    feature_width: int = 0
    weights_hash: str = ""
    shuffle_seed: int = 0
    sampling: Mapping[str, Any] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    processes: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    comparable_to_papers: bool = False
    why_not: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Evaluation(Measured):
    """Scores of images against a reference; a score that cannot be computed is None, and `reasons` says why.

    Attributes:
        fid: Fréchet distance of the features (Heusel et al. 2017).
        sfid: The same of spatial features.
        inception_score: Mean over the splits (Salimans et al. 2016).
        precision: Fraction of the samples within the reference's manifold (Kynkäänniemi et al. 2019).
        recall: Fraction of the reference within the samples' manifold.
        kid: Mean over the subsets (Bińkowski et al. 2018).
        classifier_accuracy: Fraction of the samples that the demo classifier assigns to their class.
        per_class: A score for each class, worst first, where that was asked for.
        settings: Seed, splits and subset sizes.
        published: Published results for the same data, size and features.
    """

    fid: float | None = None
    sfid: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    classifier_accuracy: float | None = None
    per_class: tuple[Mapping[str, Any], ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[Mapping[str, Any], ...] = ()


def evaluate(
    *,
    reference: str | Path,
    samples: str | Path | None = None,
    checkpoint: str | Path | None = None,
    num_samples: int | None = None,
    metrics: str | Sequence[str] = "all",
    kid_subset: int | None = None,
    per_class: bool = False,
    class_names: Sequence[str] | str | None = None,
    features: Network = "auto",
    inception_weights: str | Path | None = None,
    download: bool = False,
    cache: str | Path | None = None,
    settings: SamplingConfig | None = None,
    tokenizer: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Evaluation:
    """FID, sFID, inception score, precision, recall and KID of images, or of a checkpoint, against a reference.

        scores = mvar.evaluate(samples="out", reference="digits")
        scores.fid, scores.comparable_to_papers, scores.why_not

    Under torchrun the processes share the images, and each returns the figures of one process.

    Args:
        reference: A folder, an npz, an npz of the ADM evaluator, a file of `make_reference`, "digits" or "digits:test".
        samples: A folder or npz of images.
        checkpoint: A model whose samples are measured, in place of `samples`; balanced over its classes.
        num_samples: How many to generate (by default 50,000 for Inception features, else 1,000), or to read.
        metrics: "all", or names of metrics: those that are named must be computable.
        kid_subset: Images per subset of KID; by default 1000, or all.
        per_class: Also score each class; classes are matched by name.
        class_names: Names of the classes of a side that has only numbers: a list, a file with one per line, "imagenet",
            or "by-number", where the order is that of the other side's names.
        features: The network that measures images.
        inception_weights: The file of the Inception weights, where it is not in torch's cache.
        download: Whether they may be downloaded.
        cache: A directory where features are saved, and from which known ones are read.
        settings: How to sample; what is not set is as the model recommends.
        tokenizer: The published tokenizer, where `checkpoint` is a .pth file.
        seed: Of the samples, the shuffle and the subsets.
        batch_size: Images at a time; decides speed and memory, never the result.
        machine: Device, dtype and attention backend.
        progress: Called as images are measured.
        dry_run: Check everything, and measure nothing.

    Raises:
        ConfigError: Arguments that contradict each other, or an unknown metric or network.
        DataError: Images, a reference or weights that cannot be used, or too few images.
    """
    machine = machine or Machine()
    asked = check_metrics(metrics)
    check_values(cache, num_samples=num_samples, batch_size=batch_size, kid_subset=kid_subset, seed=seed)
    if (samples is None) == (checkpoint is None):
        raise ConfigError("There must be something to measure.", "Use one of --samples PATH and --checkpoint DIR.")
    with connect(machine.device) as here:
        choice = ExtractorChoice(
            features,
            str(reference),
            inception_weights=inception_weights,
            download=download and not dry_run,
            progress=progress,
        )
        sampled: SampledImages | None = None
        images: ImageSet
        if checkpoint is None:
            images = open_measured_images(str(samples), num_samples, max_pixels=machine.max_pixels)
        else:
            default = SAMPLES_FOR_INCEPTION if choice.name == "inception" else SAMPLES_FOR_OTHERS
            pipeline = load_pipeline(checkpoint, tokenizer, machine)
            images = sampled = SampledImages(str(checkpoint), pipeline, num_samples or default, settings, seed)
        known = Reference.open(str(reference), images.image_shape, choice.name, machine.max_pixels)
        # Metrics that are named must be computable; of "all", those that are not say why.
        named = asked if metrics != "all" else ("kid",) if kid_subset is not None else ()
        check_counts(named, images.count, known.count, kid_subset)
        aligned = None
        if per_class:
            for labels, lacking in ((images.labels, "the samples lack"), (known.labels, f"{known.name} lacks")):
                if labels is None:
                    raise DataError(
                        f"--per-class needs the class of every image, which {lacking}.",
                        "Class folders have it, samples of `mvar sample`, an npz with labels, a checkpoint, digits.",
                    )
            used = np.unique(images.labels).tolist()  # type: ignore[arg-type]
            aligned = align(classes_of(images), classes_of(known), class_names, used)
        elif class_names is not None:
            raise ConfigError("--class-names only matters with --per-class.", "Add --per-class, or leave it out.")
        if dry_run:
            steps = (
                f"{'read' if sampled is None else 'sample'} {images.count} images of {images.name}",
                f"measure {', '.join(asked)} with {choice.name} features against {known.name}",
            )
            configuration = {} if sampled is None else {"sampling": sampled.settings.model_dump()}
            facts = {"num_samples": images.count, "features": choice.name, "metrics": list(asked)}
            return Evaluation(dry_run=DryRun(configuration=configuration, steps=steps, facts=facts))
        start = time.monotonic()
        nearby = [] if checkpoint is None else [Path(checkpoint), Path(checkpoint).parent]
        extractor = choice.load(images.image_shape, resolve_device(here.device(machine.device)), nearby)
        known.check(extractor)
        keep_features = per_class or any(name in asked for name in NEED_FEATURES)
        measurer = Measurer(extractor, cache, keep_features, batch_size, progress)
        reference_set = known.measure(measurer)
        sample_set = measurer.measure(images, "samples")

        def scored() -> Evaluation:
            more_smooth = sampled is not None and sampled.settings.more_smooth
            why_not = comparability(extractor, images.count, reference_set, more_smooth=more_smooth)
            why_not += input_reasons(images, known)
            if sampled is not None and images.count % sampled.num_classes:
                why_not.append(f"{images.count:,} samples cannot be balanced over {sampled.num_classes:,} classes")
            scores = evaluate_features(sample_set, reference_set, asked, seed=seed, kid_subset_size=kid_subset)
            classes = None
            if aligned is not None and images.labels is not None and known.labels is not None:
                labels, names = aligned[0][images.labels], [*map(aligned[1].name, range(aligned[1].count))]
                classes = per_class_scores(sample_set, labels, reference_set, known.labels, names, seed=seed)
            rows = comparable_rows(extractor.name, images.image_shape, known.name)
            return Evaluation(
                **scores,
                classifier_accuracy=classifier_accuracy(sample_set, images),
                per_class=None if classes is None else tuple(asdict(row) for row in classes),
                published=tuple(asdict(row) for row in rows),
                **circumstances(images, known, extractor, reference_set, machine, seed, why_not),
                seconds=time.monotonic() - start,
            )

        return here.run_on_rank_zero(scored)


@dataclass(frozen=True, kw_only=True)
class ReferenceFile(Result):
    """A reference that was measured at `image_shape`, to which some images may have been `resized`."""

    reference: Path
    num_reference: int
    features: str
    weights_hash: str
    image_shape: tuple[int, int]
    resized: bool
    seconds: float


def make_reference(
    out: str | Path,
    *,
    data: str | Path,
    image_size: int | str | tuple[int, int] | None = None,
    features: Network = "auto",
    inception_weights: str | Path | None = None,
    download: bool = False,
    batch_size: int | None = None,
    overwrite: bool = False,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> ReferenceFile:
    """Measure a reference once: features, statistics and labels of images, and a record of how they were measured.

        mvar.make_reference("digits.npz", data="digits")      # calling it again changes nothing
        mvar.evaluate(samples="out", reference="digits.npz", features="demo")

    Args:
        out: The npz file to write.
        data: A folder, an npz, "digits" or "digits:test".
        image_size: Resize and crop the images to this size first: N, (height, width), or text such as "48x64".
        features: As of `evaluate`.
        inception_weights: As of `evaluate`.
        download: As of `evaluate`.
        batch_size: Images at a time.
        overwrite: Whether the file may be replaced.
        machine: The device.
        progress: Called as images are measured.

    Raises:
        DataError: Images or weights that cannot be used, or another file that is already there.
    """
    machine, out, start = machine or Machine(), Path(out), time.monotonic()
    check_values(None, batch_size=batch_size)
    if out.suffix.lower() != ".npz":
        raise DataError(f"--out {out} does not end in .npz.")
    try:
        size = read_size(image_size) if isinstance(image_size, str) else image_size
    except ValueError as error:
        raise ConfigError(f"--image-size: {error}.") from None
    image_shape = (size, size) if isinstance(size, int) else size
    with connect(machine.device) as here:
        choice = ExtractorChoice(
            features, str(data), inception_weights=inception_weights, download=download, progress=progress
        )
        images = open_measured_images(str(data), None, image_shape, machine.max_pixels)
        extractor = choice.load(images.image_shape, resolve_device(here.device(machine.device)))
        if overwrite or not here.run_on_rank_zero(lambda: is_reference(out, extractor, images)):
            measurer = Measurer(extractor, batch_size=batch_size, progress=progress)
            found = measurer.measure(images, "reference")
            here.run_on_rank_zero(lambda: save_reference(out, found, images))
        else:
            logger.info("%s is finished: nothing is left to do.", out)
        return ReferenceFile(
            reference=out,
            num_reference=images.count,
            features=extractor.name,
            weights_hash=extractor.weights_hash,
            image_shape=images.image_shape,
            resized=images.stored_shape is not None,
            seconds=time.monotonic() - start,
        )


class SampledImages:
    """Samples of a model, balanced over its classes, generated while they are measured."""

    def __init__(
        self, name: str, pipeline: Pipeline, count: int, settings: SamplingConfig | None = None, seed: int = 0
    ):
        self.name, self.count, self.seed = name, count, seed
        self.pipeline = pipeline
        self.settings = pipeline.sampling_settings(settings)
        self.image_shape = pipeline.config.image_shape
        self.num_classes = pipeline.transformer.config.num_classes
        self.labels: NDArray[np.int64] | None = np.arange(count) % self.num_classes
        self.class_names = pipeline.config.class_names

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """The samples `start` up to `stop`, uint8 (B, 3, H, W)."""
        for first in range(start, stop, batch_size):
            indices = range(first, min(first + batch_size, stop))
            samples = self.pipeline.sample(
                **by_labels(self.pipeline.config, [index % self.num_classes for index in indices]),
                settings=self.settings,
                seed=self.seed,
                indices=indices,
                batch_size=batch_size,
            )
            yield samples.images.permute(0, 3, 1, 2).contiguous()

    def fingerprint(self) -> None:
        """None: nothing is known of samples before they are generated."""


def load_pipeline(checkpoint: str | Path, tokenizer: str | Path | None, machine: Machine) -> Pipeline:
    """The model, on this process's device."""
    own = machine.model_copy(update={"device": world().device(machine.device)})
    return Pipeline.from_pretrained(checkpoint, tokenizer=tokenizer, machine=own)


def model_description(pipeline: Pipeline) -> dict[str, Any]:
    """Device, dtype and attention backend of a model."""
    dtype = next(iter(pipeline.tokenizer.parameters())).dtype
    return {"device": str(pipeline.device), "dtype": str(dtype).removeprefix("torch."), "attention": pipeline.attention}


def circumstances(
    images: ImageSet,
    known: Reference,
    extractor: FeatureExtractor,
    reference_set: FeatureSet,
    machine: Machine,
    seed: int,
    why_not: Sequence[str],
) -> dict[str, Any]:
    """What a figure depends on, and whether it is comparable with published ones: fields of `Measured`."""
    sampling = None
    if isinstance(images, SampledImages):
        sampling = {**images.settings.model_dump(), "seed": images.seed, **model_description(images.pipeline)}
    device = resolve_device(world().device(machine.device))
    return {
        "num_samples": images.count,
        "num_reference": reference_set.num_images,
        "samples": images.name,
        "reference": known.name,
        "image_shape": images.image_shape,
        "features": extractor.name,
        "feature_width": extractor.dim,
        "weights_hash": extractor.weights_hash,
        "shuffle_seed": seed,
        "sampling": sampling,
        "device": "cpu" if extractor.name == "demo" else str(device),
        "processes": world().world_size,
        "versions": {"mvar": __version__, "torch": torch.__version__, "torch-fidelity": version("torch-fidelity")},
        "comparable_to_papers": not why_not,
        "why_not": tuple(why_not),
        "warnings": tuple(cautions(extractor, images.count, reference_set)),
    }


def classifier_accuracy(samples: FeatureSet, images: ImageSet) -> float | None:
    """Fraction of the samples that the demo classifier assigns to their class; None where that is no certain digit."""
    if samples.extractor != "demo" or samples.logits is None or images.labels is None:
        return None
    digits = classes_of(images).match(Classes.of(None, samples.logits.shape[1]))
    expected = np.array([-1 if digit is None else digit for digit in digits.positions])[images.labels]
    if digits.by == "order" or expected.min() < 0:
        return None
    return float((samples.logits.argmax(dim=1).numpy() == expected).mean())


def classes_of(images: ImageSet | Reference) -> Classes:
    """The classes of images that have labels."""
    assert images.labels is not None
    return Classes.of(images.class_names, int(images.labels.max()) + 1, images.name)
