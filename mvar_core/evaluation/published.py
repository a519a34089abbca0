"""Published results on ImageNet at 256×256, and what keeps measured figures from being comparable with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mvar_core.data.evaluation_images import EvaluationImages, shape_text
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.measure import ImageSet, Reference
from mvar_core.evaluation.statistics import FeatureSet

PAPER_SAMPLES = 50_000
USUAL_SIZES = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class PublishedRow:
    """What a paper, or its code's README, reports of a model; None where it reports nothing."""

    model: str
    kind: str
    fid: float
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    parameters: str | None = None


IMAGENET_256 = (
    PublishedRow("StyleGAN-XL", "GAN", 2.30, 265.1, 0.78, 0.53, "166M"),
    PublishedRow("DiT-XL/2", "diffusion", 2.27, 278.2, 0.83, 0.57, "675M"),
    PublishedRow("MaskGIT", "masked tokens", 6.18, 182.1, 0.80, 0.51, "227M"),
    PublishedRow("VQGAN-re", "token AR", 5.20, 280.3, parameters="1.4B"),
    PublishedRow("VAR-d16", "scale AR", 3.55, 280.4, 0.84, 0.51, "310M"),
    PublishedRow("VAR-d20", "scale AR", 2.95, 302.6, 0.83, 0.56, "600M"),
    PublishedRow("VAR-d24", "scale AR", 2.33, 312.9, 0.82, 0.59, "1.0B"),
    PublishedRow("VAR-d30", "scale AR", 1.97, parameters="2.0B"),
    PublishedRow("MVAR-d16", "scale AR", 3.09, 285.5, 0.85, 0.51, "310M"),
    PublishedRow("MVAR-d16 (fine-tuned)", "scale AR", 3.40, 297.2, 0.86, 0.48),
    PublishedRow("MVAR-d20 (fine-tuned)", "scale AR", 2.87, 295.3, 0.86, 0.52),
    PublishedRow("MVAR-d24 (fine-tuned)", "scale AR", 2.23, 300.1, 0.85, 0.56),
)
"""Rows of the VAR and MVAR papers' tables, as printed; VAR-d30's is from its README."""


def comparability(
    extractor: FeatureExtractor, num_samples: int, reference: FeatureSet | None = None, *, more_smooth: bool = False
) -> list[str]:
    """Every reason why figures are not comparable with published ones; none where they are.

    Papers measure 50,000 samples, with the Inception network of 2015-12-05, against statistics of the whole training
    set from the ADM evaluator's reference file.

    Without a `reference` only the samples and their features are considered; `more_smooth` samples mix codes.
    """
    why_not = []
    if not extractor.comparable_to_papers:
        network = {"demo": "a small classifier's", "inception": "other weights'"}.get(
            extractor.name, "another network's"
        )
        why_not.append(f"{extractor.name} features are {network}, not those of the Inception network of 2015-12-05")
    if num_samples < PAPER_SAMPLES:
        why_not.append(f"{num_samples:,} samples, papers measure {PAPER_SAMPLES:,}")
    if reference is not None and reference.source is None:
        why_not.append("the reference is a set of images, not the ADM file's statistics of the whole training set")
    if more_smooth:
        why_not.append("more-smooth samples are made for looks and change the scores")
    return why_not


def input_reasons(images: ImageSet, reference: Reference) -> list[str]:
    """What about the images themselves keeps their figures from being comparable with published ones."""
    found = []
    if isinstance(images, EvaluationImages):
        if images.num_lossy:
            found.append(f"{images.num_lossy:,} samples are stored in lossy formats, which changes the features")
        if images.stored_shape is not None:
            found.append(f"samples were resized from {shape_text(images.stored_shape)}")
    ours, record = images.image_shape, reference.record
    stored = None if reference.images is None else reference.images.stored_shape
    if stored is not None:
        found.append(f"reference images were resized from {shape_text(stored)} to {shape_text(ours)}")
    if record is not None and record.resized:
        found.append("some reference images were resized before they were measured")
    if record is not None and record.image_shape != ours:
        found.append(
            f"the reference was measured at {shape_text(record.image_shape)}, the samples at {shape_text(ours)}"
        )
    if record is None and reference.known is not None and stored is None:
        named = map(int, re.findall(r"(?<!\d)(\d{2,4})(?!\d)", Path(reference.name).stem))
        size = next((number for number in named if number in USUAL_SIZES), None)
        if size is not None and ours != (size, size):
            found.append(f"the samples are {shape_text(ours)}, the reference {Path(reference.name).name} is for {size}")
    return found


def cautions(extractor: FeatureExtractor, num_samples: int, reference: FeatureSet) -> list[str]:
    """What makes a figure larger or noisier than it would be with more images."""
    found = []
    if extractor.comparable_to_papers and num_samples < PAPER_SAMPLES:
        found.append(f"FID of {num_samples:,} samples is larger than that of {PAPER_SAMPLES:,}, which papers report")
    sets = [(num_samples, "samples")]
    if reference.source is None and reference.num_images is not None:
        sets.append((reference.num_images, "reference images"))
    for count, what in sets:
        if count < extractor.dim:
            found.append(f"{count:,} {what} are fewer than {extractor.dim:,} features: their covariance is singular")
    return found


def comparable_rows(features: str, image_shape: tuple[int, int], reference: str) -> tuple[PublishedRow, ...]:
    """Published results for the same data, size and features; the data is recognized by the reference's name."""
    same = features == "inception" and image_shape == (256, 256) and "imagenet" in Path(reference).name.lower()
    return IMAGENET_256 if same else ()
