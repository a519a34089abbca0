"""How rows of an ablation are scored: `mvar evaluate`'s metrics, and on bundled digits the quickstart's measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar_cli.ablation_request import Scoring
from mvar_cli.old_console import Console
from mvar_core.data.evaluation_images import ImageShape
from mvar_core.data.images import split_name
from mvar_core.errors import DataError, MvarError
from mvar_core.evaluation.extractors import ExtractorChoice
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.measure import DEFAULT_BATCH, Measurer, Reference
from mvar_core.evaluation.scores import METRICS, evaluate_features
from mvar_core.evaluation.statistics import FeatureSet
from mvar_core.runtime import resolve_device
from mvar_core.workflows.evaluate import SampledImages, classifier_accuracy

_PICTURED = 80


@dataclass
class Judge:
    """Scores samples of one model after another against one reference.

    Attributes:
        why_not: Why there are no scores; None where there are.
    """

    console: Console
    known: Reference | None = None
    extractor: FeatureExtractor | None = None
    why_not: str | None = None
    _reference: FeatureSet | None = None
    _digits: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def open(
        cls,
        console: Console,
        scoring: Scoring,
        training_images: str,
        shape: ImageShape,
        device: str,
        *,
        out: Path,
        nearby: list[Path],
    ) -> Judge:
        """Find reference, network and weights.

        Args:
            console: Where to report.
            scoring: What was asked for.
            training_images: Names the reference where none was asked for.
            shape: Height and width of the samples.
            device: Where to compute features.
            out: Where a demo classifier is kept that has to be trained.
            nearby: Directories that may hold one.

        Raises:
            MvarError: Something that the user named cannot be used; what was not named is left out with the reason.
        """
        reference = scoring.reference or training_images
        try:
            choice = ExtractorChoice(
                scoring.demo_classifier or scoring.features, reference, inception_weights=scoring.inception_weights
            )
            known = Reference.open(reference, shape, choice.name)
            if choice.name == "demo" and scoring.demo_classifier is None:
                choice = ExtractorChoice(_classifier(reference, shape, out, nearby), reference)
            extractor = choice.load(shape, resolve_device(device))
            known.check(extractor)
        except MvarError as error:
            named = (scoring.reference, scoring.inception_weights, scoring.demo_classifier)
            if scoring.features != "auto" or any(named):
                raise
            return cls(console, why_not=str(error))
        judge = cls(console, known, extractor)
        if choice.name == "demo" and split_name(reference) == ("digits", "train"):
            from mvar_core.evaluation.demo import read_digits

            judge._digits = (read_digits("train", shape), read_digits("test", shape))
        return judge

    def identity(self) -> dict[str, Any]:
        """What scores depend on beside the samples, for the record of an experiment."""
        if self.extractor is None or self.known is None:
            return {"features": None, "reference": None, "weights_hash": None}
        names = {"features": self.extractor.name, "reference": self.known.name}
        return {**names, "weights_hash": self.extractor.weights_hash}

    def score(self, images: SampledImages, picture: Path) -> dict[str, Any]:
        """Draw the images and score them.

        Args:
            images: Samples, not yet drawn.
            picture: Where to leave a grid of the first of them.

        Returns:
            The scores of `mvar evaluate`, None with a reason where there is none; `classifier_accuracy`; on digits the
            quickstart's measures too.
        """
        if self.extractor is None or self.known is None:
            _draw_picture(images, picture)
            reasons = dict.fromkeys(METRICS, self.why_not)
            return {**dict.fromkeys(METRICS), "classifier_accuracy": None, "reasons": reasons}
        measurer = Measurer(self.extractor)
        if self._reference is None:
            self._reference = self.known.measure(measurer)
        kept = _Keeping(images, None if self._digits else _PICTURED)
        found = measurer.measure(kept, "samples")
        scores = evaluate_features(found, self._reference)
        scores["classifier_accuracy"] = classifier_accuracy(found, images.labels)
        _save_picture(kept, picture)
        if self._digits is not None:
            from mvar_core.evaluation.demo import DemoExtractor
            from mvar_core.evaluation.demo_scores import score_samples

            assert isinstance(self.extractor, DemoExtractor)
            assert images.labels is not None
            samples = (torch.cat(kept.seen), torch.from_numpy(images.labels))
            scores.update(vars(score_samples(self.extractor.classifier, samples, *self._digits)))
        return scores


class _Keeping:
    """Images that are drawn, of which the first are kept while they pass; None keeps all."""

    def __init__(self, images: SampledImages, keep: int | None):
        self.images = images
        self.keep = keep
        self.seen: list[Tensor] = []
        self.name, self.count = images.name, images.count
        self.image_shape, self.labels, self.class_names = images.image_shape, images.labels, images.class_names

    def batches(self, batch_size: int, start: int, stop: int) -> Any:
        """The images `start` up to `stop`, uint8 (B, 3, H, W)."""
        self.seen.clear()
        held = 0
        for batch in self.images.batches(batch_size, start, stop):
            if self.keep is None or held < self.keep:
                self.seen.append(batch if self.keep is None else batch[: self.keep - held])
                held += len(batch)
            yield batch

    def fingerprint(self) -> None:
        """Nothing is known of samples before they are drawn."""


def _save_picture(kept: _Keeping, path: Path) -> None:
    from mvar_core.io.pictures import save_grid

    images = torch.cat(kept.seen)[:_PICTURED].permute(0, 2, 3, 1).contiguous()
    classes = kept.images.pipeline.transformer.no_class
    save_grid(images, path, classes if 2 <= classes <= 16 else 8)


def _draw_picture(images: SampledImages, path: Path) -> None:
    """Draw the first images for their picture alone."""
    kept = _Keeping(images, _PICTURED)
    for _ in kept.batches(DEFAULT_BATCH, 0, min(_PICTURED, images.count)):
        pass
    _save_picture(kept, path)


def _classifier(reference: str, shape: ImageShape, out: Path, nearby: list[Path]) -> Path:
    """The demo classifier beside the model, else the experiment's own, trained where it is absent."""
    from mvar_core.evaluation.demo import CLASSIFIER_FILE, train_digits_classifier

    if split_name(reference)[0] != "digits":
        raise DataError(
            "Demo features of other images than digits need a classifier.", "Name its file with --demo-classifier."
        )
    for directory in (out, *nearby):
        if (directory / CLASSIFIER_FILE).is_file():
            return directory / CLASSIFIER_FILE
    train_digits_classifier(out / CLASSIFIER_FILE, shape)
    return out / CLASSIFIER_FILE
