"""`mvar evaluate` and its sub-commands: images, reconstructions, likelihoods, and references that are made once."""

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
from mvar_core.analysis.likelihood import LikelihoodReport, measure_likelihood
from mvar_core.classes import Classes, align
from mvar_core.config import Machine, SamplingConfig
from mvar_core.data.evaluation_images import EvaluationImages
from mvar_core.data.images import ImageRows, open_images
from mvar_core.data.tokens import TokenCache
from mvar_core.distributed import connect, world
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.extractors import ExtractorChoice, Network
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.measure import (
    ImageSet,
    Measurer,
    Reference,
    check_values,
    is_reference,
    open_measured_images,
    save_reference,
    shards,
)
from mvar_core.evaluation.published import cautions, comparability, comparable_rows, input_reasons
from mvar_core.evaluation.reconstruction import ReconstructionMeter
from mvar_core.evaluation.scores import check_counts, check_metrics, evaluate_features, per_class_scores
from mvar_core.evaluation.statistics import FeatureSet
from mvar_core.io.pixels import from_uint8, to_uint8
from mvar_core.models.official import tokenizer_hash_of
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress, stage
from mvar_core.pyramid import read_size
from mvar_core.results import DryRun, Result
from mvar_core.runtime import peak_memory_bytes, resolve_device
from mvar_core.sampling.conditions import by_labels
from mvar_core.untrusted import check_whole

logger = logging.getLogger("mvar")

SAMPLES_FOR_INCEPTION = 50_000
SAMPLES_FOR_OTHERS = 1_000
NEED_FEATURES = ("precision", "recall", "kid")


@dataclass(frozen=True, kw_only=True)
class Measured(Result):
    """What a figure depends on, next to the images themselves.

    `samples` is their path, or the checkpoint, and `image_shape` their height and width; `num_reference` is None where
    the reference does not say. `shuffle_seed` is of the shuffle and the subsets; `sampling` holds settings, seed,
    device, dtype and attention of samples that were generated. `reasons` say why a score is None, `why_not` why figures
    are not comparable with published ones, `warnings` what makes them noisier than they would be with more images.
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

    FID (Heusel et al. 2017), the same of spatial features, the inception score (Salimans et al. 2016; mean over the
    splits), precision and recall of the manifolds (Kynkäänniemi et al. 2019), KID (Bińkowski et al. 2018; mean over the
    subsets). `classifier_accuracy` is the fraction of the samples that the demo classifier assigns to their class,
    `per_class` has the worst class first, `settings` are seed, splits and subset sizes, and `published` are results for
    the same data, size and features.
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
        choice = ExtractorChoice(features, str(reference), inception_weights, download and not dry_run, progress)
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
        if per_class:
            (ours, labels), (theirs, known_labels) = labelled(images), labelled(known)
            positions, theirs = align(ours, theirs, class_names, np.unique(labels).tolist())
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
            by_class = None
            if per_class:
                sets = sample_set, positions[labels], reference_set, known_labels
                by_class = tuple(asdict(row) for row in per_class_scores(*sets, theirs.all_names(), seed=seed))
            rows = comparable_rows(extractor.name, images.image_shape, known.name)
            return Evaluation(
                **scores,
                classifier_accuracy=classifier_accuracy(sample_set, images),
                per_class=by_class,
                published=tuple(asdict(row) for row in rows),
                **circumstances(images, known, extractor, reference_set, machine, seed, why_not),
                seconds=time.monotonic() - start,
            )

        return here.run_on_rank_zero(scored)


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Measured):
    """What a tokenizer makes of images.

    `rfid` is the FID of the reconstructions against their originals, None where `reasons` says why; `psnr`, in dB, the
    mean over the images of each one's own. Usage is the fraction of the codebook that some scale, and that each scale
    uses; `scales` are height×width of their grids of tokens.
    """

    rfid: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    code_usage: float | None = None
    usage_per_scale: tuple[float, ...] = ()
    scales: tuple[str, ...] = ()
    images: int = 0


def evaluate_reconstruction(
    *,
    checkpoint: str | Path,
    reference: str | Path,
    num_samples: int | None = None,
    features: Network = "auto",
    inception_weights: str | Path | None = None,
    download: bool = False,
    cache: str | Path | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Reconstruction:
    """rFID, PSNR and SSIM of a tokenizer's reconstructions, and how much of its codebook it uses; in one process.

        mvar.evaluate_reconstruction(checkpoint="runs/tokenizer", reference="digits:test").psnr

    Arguments and errors are as of `evaluate`, but for these:

    * reference: Images to reconstruct: a folder, an npz, "digits" or "digits:test".
    * num_samples: At most so many of them.
    * cache: Only the originals' features are saved.
    """
    machine = machine or Machine()
    check_values(cache, num_samples=num_samples, batch_size=batch_size)
    with connect(machine.device) as here:
        if here.world_size > 1:
            raise ConfigError(f"Reconstructions are measured in one process, found {here.world_size}.")
        choice = ExtractorChoice(features, str(reference), inception_weights, download and not dry_run, progress)
        pipeline = load_pipeline(checkpoint, tokenizer, machine)
        originals = open_measured_images(str(reference), num_samples, pipeline.config.image_shape, machine.max_pixels)
        if dry_run:
            steps = (
                f"encode and decode {originals.count} images of {reference}",
                f"measure rFID, PSNR, SSIM and code usage with {choice.name} features",
            )
            facts = {"num_samples": originals.count, "features": choice.name}
            return Reconstruction(dry_run=DryRun(configuration={}, steps=steps, facts=facts))
        start = time.monotonic()
        images = ReconstructedImages(str(checkpoint), pipeline, originals)
        known = Reference(str(reference), originals)
        nearby = [Path(checkpoint), Path(checkpoint).parent]
        extractor = choice.load(originals.image_shape, resolve_device(machine.device), nearby)
        measurer = Measurer(extractor, cache, False, batch_size, progress)
        reference_set = known.measure(measurer)
        scores = evaluate_features(measurer.measure(images, "reconstructions"), reference_set, ("fid",))
        # Papers compare reconstructions with their originals too, so a reference of images is no reason.
        why_not = comparability(extractor, images.count) + input_reasons(images, known)
        fields = circumstances(images, known, extractor, reference_set, machine, 0, why_not)
        return Reconstruction(
            **{**fields, "sampling": model_description(pipeline)},
            rfid=scores["fid"],
            **images.meter.result(),
            scales=tuple(f"{grid.height}×{grid.width}" for grid in pipeline.config.pyramid.grids),
            reasons={"rfid": scores["reasons"]["fid"]} if "fid" in scores["reasons"] else {},
            seconds=time.monotonic() - start,
        )


class ReconstructedImages:
    """Reconstructions of images; each is compared with its original as it is made."""

    def __init__(self, name: str, pipeline: Pipeline, originals: EvaluationImages):
        self.name = name
        self.pipeline = pipeline
        self.originals = originals
        self.count, self.image_shape = originals.count, originals.image_shape
        self.labels, self.class_names = originals.labels, originals.class_names
        config = pipeline.config
        self.meter = ReconstructionMeter(config.pyramid.spans, config.tokenizer.codebook_size)

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """The reconstructions `start` up to `stop`, uint8 (B, 3, H, W)."""
        # One by one on a CPU, where convolutions choose their algorithm, and so their rounding, by the batch size.
        size = 1 if self.pipeline.device.type == "cpu" else batch_size
        for originals in self.originals.batches(batch_size, start, stop):
            pieces = originals.permute(0, 2, 3, 1).split(size)
            tokens = torch.cat([self.pipeline.encode(from_uint8(piece)) for piece in pieces])
            pixels = torch.cat([to_uint8(self.pipeline.decode(piece)) for piece in tokens.split(size)])
            images = pixels.cpu().permute(0, 3, 1, 2).contiguous()
            self.meter.update(originals, images, tokens.cpu())
            yield images

    def fingerprint(self) -> None:
        """None: every image must be decoded, as its pixels are compared as well as its features."""


IMAGES_AT_ONCE = 16
"""Images whose inputs are held together; what goes through the model at once is smaller."""


@dataclass(frozen=True, kw_only=True)
class Likelihood(LikelihoodReport):
    """Likelihoods of images, and what they depend on: the cache or images, the seed that chose among them.

    `conditions` is under how many each image was scored; `peak_memory_bytes` of this process on its device.
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

    Arguments that are not named here, and errors, are as of `evaluate`.

    * checkpoint: A model that is conditioned on classes.
    * tokens, data: A token cache, or images.
    * classes: Score only images of these classes, which compete in zero-shot classification; by default all.
    * zero_shot: Score each image under all classes; otherwise only under its own and under none.
    * num_samples: At most so many images, chosen by the seed.
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
            found, numbers = cache.classes, cache.labels

            def read(rows: NDArray[np.int64]) -> Tensor:
                return cache.tokens_of(rows, np.zeros_like(rows))  # none of the augmented views

        else:
            opened, source = open_images(str(data), max_pixels=machine.max_pixels), str(data)
            images = ImageRows(opened, config.image_shape)
            found, numbers = opened.classes, opened.labels

            def read(rows: NDArray[np.int64]) -> Tensor:
                return pipeline.encode_apart(images.batch(rows)[0])

        rows, known_classes, labels = np.arange(len(numbers)), pipeline.classes, None
        positions, by = found.match(known_classes)
        if found.count > 1 or class_names is not None or (by != "order" and positions != (None,)):
            labels = align(found, known_classes, class_names, np.unique(numbers).tolist())[0][numbers]
        asked = known_classes.resolve(classes) if classes else list(range(known_classes.count))
        if labels is None:  # of one class, which the model does not have
            logger.info("%s has no classes: its images are scored under no class only.", source)
        elif classes:
            rows = rows[np.isin(labels, asked)]
            if not len(rows):
                raise DataError(f"{source} holds no image of the classes that --class names.")
        if num_samples is not None and num_samples < len(rows):
            rows = np.sort(np.random.default_rng(seed).permutation(rows)[:num_samples])
        competing = asked if zero_shot and labels is not None else None
        conditions = 1 if labels is None else 2 if competing is None else 1 + len(competing)
        known: dict[str, Any] = {"model": str(checkpoint), "source": source, "seed": seed, "conditions": conditions}
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

    Arguments that are not named here, and errors, are as of `evaluate`.

    * out: The npz file to write.
    * data: A folder, an npz, "digits" or "digits:test".
    * image_size: Resize and crop the images to this size first: N, (height, width), or text such as "48x64".
    * overwrite: Whether another file that is already there may be replaced.
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
        choice = ExtractorChoice(features, str(data), inception_weights, download, progress)
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
    if samples.extractor != "demo" or samples.logits is None:
        return None
    expected = digits_of(images, samples.logits.shape[1])
    return None if expected is None else float((samples.logits.argmax(dim=1).numpy() == expected).mean())


def digits_of(images: ImageSet, count: int = 10) -> NDArray[np.int64] | None:
    """The digit of each image, whatever the order of the classes; None where they are not called by numbers."""
    if images.labels is None:
        return None
    classes, labels = labelled(images)
    digits, by = classes.match(Classes.of(None, count))
    expected = np.array([-1 if digit is None else digit for digit in digits])[labels]
    return None if by == "order" or expected.min() < 0 else expected


def labelled(images: ImageSet | Reference) -> tuple[Classes, NDArray[np.int64]]:
    """The classes of images, and their labels; DataError where they have none."""
    if images.labels is None:
        raise DataError(
            f"--per-class needs the class of every image, which {images.name} lacks.",
            "Class folders have it, samples of `mvar sample`, an npz with labels, a checkpoint, digits.",
        )
    return Classes.of(images.class_names, int(images.labels.max()) + 1, images.name), images.labels
