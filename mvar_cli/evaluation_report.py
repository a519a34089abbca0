"""What `mvar evaluate` says: scores beside published ones, what keeps them apart, and all it takes to repeat them."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvar_cli.evaluation import Reference
from mvar_cli.image_sets import DrawnImages, ReconstructedImages, StoredImages
from mvar_cli.old_console import Console, format_number, format_seconds
from mvar_core.errors import DataError, nearest
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.statistics import FeatureSet

HEADINGS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
}
CLASSES_SHOWN = 20
USUAL_SIZES = (64, 128, 256, 512, 1024)


@dataclass
class Report:
    """Figures of one evaluation, and what they depend on.

    Attributes:
        judged: The images that were judged.
        known: What they were judged by.
        sample_set: Their features.
        reference_set: The reference's features.
        extractor: The network.
        device: Where the network ran.
        seed: Seed of the shuffle, the subsets, and the samples if they were drawn.
        num_processes: How many processes shared the work.
        start: When measuring began, by the monotonic clock.
    """

    judged: StoredImages | DrawnImages | ReconstructedImages
    known: Reference
    sample_set: FeatureSet
    reference_set: FeatureSet
    extractor: FeatureExtractor
    device: str
    seed: int
    num_processes: int
    start: float

    def show(self, console: Console, asked: tuple[str, ...], *, per_class: bool, kid_subset: int | None = None) -> None:
        """Compute the scores, print them, and end with the JSON object where it is wanted."""
        if isinstance(self.judged, ReconstructedImages):
            scores = self._reconstruction(console, self.judged)
        else:
            scores = self._generation(console, asked, kid_subset)
            if per_class:
                scores["per_class"] = self._per_class(console)
        comparable, why_not = self._comparability()
        warnings = self._warnings()
        if comparable:
            console.say("Comparable with published figures.")
        else:
            console.say(f"Not comparable with published figures: {'; '.join(why_not)}.")
        for warning in warnings:
            console.note(f"warning: {warning}")
        seconds = time.monotonic() - self.start
        console.note(f"Measured in {format_seconds(seconds)}.")
        console.finish(
            {
                **scores,
                "num_samples": self.judged.count,
                "num_reference": self.reference_set.num_images,
                **self._circumstances(),
                "comparable_to_papers": comparable,
                "why_not": why_not,
                "warnings": warnings,
                "seconds": seconds,
            }
        )

    def _generation(self, console: Console, asked: tuple[str, ...], kid_subset: int | None) -> dict[str, Any]:
        from mvar_core.evaluation.scores import evaluate_features

        scores = evaluate_features(
            self.sample_set, self.reference_set, asked, seed=self.seed, kid_subset_size=kid_subset
        )
        rows: list[tuple[Any, ...]] = [(self.judged.name, *(scores[name] for name in HEADINGS))]
        rows += self._published_rows()
        prefix = "" if self.extractor.name == "inception" else f"{self.extractor.name}-"
        headings = [heading if heading[0].islower() else f"{prefix}{heading}" for heading in HEADINGS.values()]
        console.table(f"{self.judged.count:,} samples, {self.extractor.name} features", ("", *headings), rows)
        if scores["inception_score"] is not None:
            spread = f"{format_number(scores['inception_score'])} ± {format_number(scores['inception_score_std'])}"
            splits = scores["settings"]["splits"]
            console.say(f"{prefix}IS {spread} over {splits} splits, shuffled with seed {self.seed}.")
        accuracy = self._accuracy() if self.extractor.name == "demo" else None
        if accuracy is not None:
            console.say(f"Classified as their labels say: {accuracy:.1%}")
        for name, reason in scores["reasons"].items():
            if reason != "not asked for":
                console.say(f"{HEADINGS[name]}: not computed, {reason}")
        return {**scores, "classifier_accuracy": accuracy}

    def _reconstruction(self, console: Console, judged: ReconstructedImages) -> dict[str, Any]:
        from mvar_core.evaluation.scores import evaluate_features

        scores = evaluate_features(self.sample_set, self.reference_set, ("fid",), seed=self.seed)
        measured = judged.meter.result()
        prefix = "" if self.extractor.name == "inception" else f"{self.extractor.name}-"
        console.table(
            f"{judged.count:,} reconstructions, {self.extractor.name} features",
            ("", f"{prefix}rFID", "PSNR (dB)", "SSIM", "codes used"),
            [(judged.name, scores["fid"], measured["psnr"], measured["ssim"], f"{measured['code_usage']:.1%}")],
        )
        grids = judged.pipeline.config.pyramid.grids
        usage = zip(grids, measured["usage_per_scale"], strict=True)
        console.table(
            "", ("scale", "codes used"), [(f"{grid.height}×{grid.width}", f"{part:.1%}") for grid, part in usage]
        )
        reasons = {"rfid": scores["reasons"]["fid"]} if "fid" in scores["reasons"] else {}
        return {"rfid": scores["fid"], **measured, "reasons": reasons}

    def _per_class(self, console: Console) -> list[dict[str, Any]]:
        from dataclasses import asdict

        from mvar_core.evaluation.per_class import per_class

        assert self.judged.labels is not None
        assert self.known.labels is not None
        names = self.known.class_names or self.judged.class_names
        labels = matching_labels(self.judged.labels, self.judged.class_names, self.known.class_names)
        rows = per_class(
            self.sample_set, labels, self.reference_set, self.known.labels, class_names=names, seed=self.seed
        )
        found = [asdict(row) for row in rows]
        columns = list(found[0])
        shown = [tuple(row.values()) for row in found[:CLASSES_SHOWN]]
        more = f", the worst {CLASSES_SHOWN} of {len(found)}" if len(found) > CLASSES_SHOWN else ", worst first"
        console.table(f"Per class{more}", [column.replace("_", " ") for column in columns], shown)
        return found

    def _accuracy(self) -> float | None:
        """Part of the samples that the classifier takes for what they are labelled as."""
        labels, logits = self.judged.labels, self.sample_set.logits
        if labels is None or logits is None or labels.max() >= logits.shape[1]:
            return None
        return float((logits.argmax(dim=1).numpy() == labels).mean())

    def _published_rows(self) -> list[tuple[Any, ...]]:
        """Rows of papers that measured the same data at the same size: so far ImageNet at 256×256."""
        from mvar_core.evaluation.published import IMAGENET_256

        same_data = "imagenet" in Path(self.known.name).name.lower()
        if self.extractor.name != "inception" or self.judged.image_shape != (256, 256) or not same_data:
            return []
        return [
            (f"{row.model}, published", row.fid, None, row.inception_score, row.precision, row.recall, None)
            for row in IMAGENET_256
        ]

    def _comparability(self) -> tuple[bool, list[str]]:
        from mvar_core.evaluation.published import comparability

        smooth = isinstance(self.judged, DrawnImages) and self.judged.settings.more_smooth
        # Reconstructions are compared with their originals, in papers too.
        reference = None if isinstance(self.judged, ReconstructedImages) else self.reference_set
        _, why_not = comparability(self.extractor, self.judged.count, reference, more_smooth=smooth)
        why_not += input_reasons(self.judged, self.known)
        return not why_not, why_not

    def _warnings(self) -> list[str]:
        from mvar_core.evaluation.published import PAPER_SAMPLES

        found = []
        count, width = self.judged.count, self.extractor.dim
        if self.extractor.comparable_to_papers and count < PAPER_SAMPLES:
            found.append(f"FID of {count:,} samples is larger than that of {PAPER_SAMPLES:,}, which papers report")
        if count < width:
            found.append(f"{count:,} samples are fewer than {width:,} features: their covariance is singular")
        size = self.reference_set.num_images
        if self.reference_set.source is None and size is not None and size < width:
            found.append(f"{size:,} reference images are fewer than {width:,} features: their covariance is singular")
        return found

    def _circumstances(self) -> dict[str, Any]:
        """All that a figure depends on, beside the images themselves."""
        from mvar_cli.evaluation import versions

        judged = self.judged
        sampling = None
        if isinstance(judged, DrawnImages):
            sampling = {**judged.settings.model_dump(), "seed": judged.seed, **_model(judged)}
        elif isinstance(judged, ReconstructedImages):
            sampling = _model(judged)
        return {
            "samples": judged.name,
            "reference": self.known.name,
            "image_shape": judged.image_shape,
            "features": self.extractor.name,
            "feature_width": self.extractor.dim,
            "weights_hash": self.extractor.weights_hash,
            "shuffle_seed": self.seed,
            "sampling": sampling,
            "device": "cpu" if self.extractor.name == "demo" else self.device,
            "dtype": "float32",
            "processes": self.num_processes,
            "versions": versions(),
        }


def _model(judged: DrawnImages | ReconstructedImages) -> dict[str, Any]:
    pipeline = judged.pipeline
    dtype = next(iter(pipeline.tokenizer.parameters())).dtype
    return {"device": str(pipeline.device), "dtype": str(dtype).removeprefix("torch."), "attention": pipeline.attention}


def input_reasons(judged: StoredImages | DrawnImages | ReconstructedImages, known: Reference) -> list[str]:
    """What about the images themselves keeps their figures apart from published ones."""
    found = []
    if isinstance(judged, StoredImages):
        if judged.images.num_lossy:
            found.append(
                f"{judged.images.num_lossy:,} samples are JPEG or WebP files, whose compression moves the features"
            )
        if judged.images.stored_shape is not None:
            found.append(f"samples were resized from {_size(judged.images.stored_shape)}")
    if isinstance(judged, DrawnImages) and judged.count % judged.pipeline.transformer.no_class:
        classes = judged.pipeline.transformer.no_class
        found.append(f"{judged.count:,} samples cannot be balanced over {classes:,} classes")
    ours = judged.image_shape
    if known.stored_shape is not None:
        found.append(f"reference images were resized from {_size(known.stored_shape)} to {_size(ours)}")
    if known.made is not None:
        record = known.made[1]
        if record.resized:
            found.append("some reference images were resized before they were measured")
        if record.image_shape != ours:
            found.append(f"the reference was measured at {_size(record.image_shape)}, the samples at {_size(ours)}")
    named = re.findall(r"(?<!\d)(\d{2,4})(?!\d)", Path(known.name).stem) if known.statistics is not None else []
    sizes = [int(size) for size in named if int(size) in USUAL_SIZES]
    if sizes and known.stored_shape is None and ours != (sizes[0], sizes[0]):
        found.append(f"the samples are {_size(ours)}, the reference {Path(known.name).name} is for {sizes[0]}")
    return found


def matching_labels(
    labels: NDArray[np.int64], ours: tuple[str, ...] | None, theirs: tuple[str, ...] | None
) -> NDArray[np.int64]:
    """The samples' labels in the reference's numbering: by name where both sides name their classes.

    Raises:
        DataError: A class that the reference does not have.
    """
    if ours is None or theirs is None or ours == theirs:
        return labels
    index = {name: number for number, name in enumerate(theirs)}
    for name in ours:
        if name not in index:
            raise DataError(f"Class {name!r} of the samples is not a class of the reference. {nearest(name, theirs)}")
    return np.asarray([index[name] for name in ours], np.int64)[labels]


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"
