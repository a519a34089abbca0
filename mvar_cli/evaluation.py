"""How `mvar evaluate` measures: references, extractors, and the pass over the images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvar_cli.image_sets import DrawnImages, ImageSet, ImageShape, StoredImages
from mvar_cli.old_console import Console
from mvar_cli.processes import Processes
from mvar_core import __version__
from mvar_core.data.evaluation_images import open_evaluation_images
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.cache import FeatureCache, feature_key
from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.references import ReferenceRecord, check_reference, load_reference
from mvar_core.evaluation.sharding import merge_features, shard
from mvar_core.evaluation.statistics import FeatureSet, collect, read_statistics

DEFAULT_BATCH = 64
OWN_FEATURES = ("inception", "demo")
NEED_FEATURES = ("precision", "recall", "kid")


@dataclass
class Measurer:
    """One pass over images: in several processes, a block of them each; known features are taken from the cache.

    Attributes:
        extractor: The network.
        console: Where progress is shown.
        team: The processes that share the work.
        cache: Where features are kept, if anywhere.
        keep_features: Whether single images' features are needed, beside their mean and covariance.
        batch_size: Images at a time; decides speed and memory, never the result.
    """

    extractor: FeatureExtractor
    console: Console
    team: Processes
    cache: FeatureCache | None = None
    keep_features: bool = True
    batch_size: int = DEFAULT_BATCH

    def measure(self, images: ImageSet, title: str) -> FeatureSet | None:
        """Features of all images; where the cache has them, None in all processes but the first.

        Raises:
            DataError: An image cannot be read, or there are fewer images than processes.
        """
        known = self._cached(images)
        if self.team.from_first(lambda: known is not None):
            if known is not None:
                self.console.note(f"{title}: features of {images.count:,} images taken from the cache.")
            return replace(known, labels=images.labels) if known is not None else None
        positions = shard(images.count)
        block = (positions.start, positions.stop)
        with self.console.progress(title) as progress:
            batches = images.batches(self.batch_size, *block)
            found = collect(
                self.extractor, batches, len(positions), progress, keep_features=self.keep_features, first=block[0]
            )
        found = replace(merge_features(found, positions, images.count), labels=images.labels)
        if isinstance(images, DrawnImages) and images.save_to is not None and self.team.count > 1:
            self._join(images, block)
        if self.team.first:
            self._keep(images, found)
        return found

    def _join(self, images: DrawnImages, block: tuple[int, int]) -> None:
        import torch.distributed as dist

        blocks: list[Any] = [None] * self.team.count
        dist.all_gather_object(blocks, block)
        self.team.from_first(lambda: images.join(blocks))

    def _cached(self, images: ImageSet) -> FeatureSet | None:
        if self.cache is None or not self.team.first:
            return None
        content = images.content()
        if content is None:
            return None
        return self.cache.load(feature_key(self.extractor, content, images.count), features=self.keep_features)

    def _keep(self, images: ImageSet, found: FeatureSet) -> None:
        if self.cache is None:
            return
        content = images.content()
        if isinstance(images, DrawnImages) and images.save_to is not None:
            content = open_evaluation_images(str(images.save_to)).fingerprint()
        if content:
            self.cache.save(feature_key(self.extractor, content, images.count), found)


@dataclass
class Reference:
    """What images are judged by: images, published statistics (with or without images), or features made before.

    Attributes:
        name: What the user typed.
        images: The images that are known.
        statistics: A file in the ADM evaluator's layout, for Inception features.
        made: A file of `mvar evaluate make-reference`: its features and its record.
    """

    name: str
    images: StoredImages | None = None
    statistics: Path | None = None
    made: tuple[FeatureSet, ReferenceRecord] | None = None

    @classmethod
    def open(cls, text: str, image_shape: ImageShape, kind: str) -> Reference:
        """Check that the reference is there and can be used, before anything slow.

        Raises:
            DataError: It is neither images nor statistics.
        """
        path = Path(text).expanduser()
        if path.suffix.lower() != ".npz":
            return cls(text, StoredImages(open_evaluation_images(text, image_shape)))
        if path.is_file():
            made = load_reference(path)
            if made is not None:
                return cls(text, made=made)
        has_statistics = read_statistics(path) is not None
        try:
            images = StoredImages(open_evaluation_images(text, image_shape))
        except DataError:
            if not has_statistics:
                raise
            if kind != "inception":
                raise DataError(
                    f"{text} holds statistics of Inception features and no images, so it cannot serve {kind} features.",
                    "Use --features inception, or give images as the reference.",
                ) from None
            images = None
        return cls(text, images, path if has_statistics and kind == "inception" else None)

    @property
    def count(self) -> int | None:
        """Number of images, where it is known before anything is measured."""
        if self.made is not None:
            return self.made[1].count
        return None if self.images is None else self.images.count

    def check(self, extractor: FeatureExtractor) -> None:
        """Refuse a file whose features are not the extractor's, before anything is measured.

        Raises:
            DataError: Another network, other weights, or another number of features.
        """
        path = Path(self.name).expanduser()
        if self.made is not None:
            check_reference(self.made[1], extractor, path, self.made[0])
        if self.statistics is not None:
            known = read_statistics(self.statistics)
            assert known is not None
            assert known.statistics is not None
            width = len(known.statistics["mu"])
            if width != extractor.dim:
                raise DataError(
                    f"{self.name} holds statistics of {width} features, {extractor.name} features are {extractor.dim}.",
                    "Choose the --features that the file was made with.",
                )

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(N,) the class of each reference image, where it is known."""
        if self.made is not None:
            return self.made[0].labels
        return self.images.labels if self.images is not None else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name per class, where they are known."""
        if self.made is not None:
            return self.made[1].class_names
        return self.images.class_names if self.images is not None else None

    @property
    def stored_shape(self) -> ImageShape | None:
        """Height and width of reference images that had to be brought to the samples' size, if there are any."""
        return self.images.images.stored_shape if self.images is not None else None

    def measure(self, measurer: Measurer) -> FeatureSet | None:
        """Features and statistics of the reference; None where another process has them."""
        if self.made is not None:
            return self.made[0]
        measured = None
        if self.images is not None and (self.statistics is None or measurer.keep_features):
            measured = measurer.measure(self.images, "reference")
            if measured is None:
                return None
        if self.statistics is None:
            return measured
        return read_statistics(self.statistics, measured)


def open_cache(directory: Path | None) -> FeatureCache | None:
    """The cache in a directory, made when first used.

    Raises:
        DataError: The directory is a file.
    """
    if directory is not None and directory.is_file():
        raise DataError(f"--cache {directory} is a file; expected a directory.")
    return FeatureCache(directory) if directory is not None else None


def versions() -> dict[str, str]:
    """Versions of what figures are computed with."""
    from importlib.metadata import version

    return {"mvar": __version__, "torch": torch.__version__, "torch-fidelity": version("torch-fidelity")}


def feature_kind(features: str, reference: str) -> str:
    """What `--features` comes to: inception, demo, an exported program's file, or a registered extractor.

    Raises:
        ConfigError: None of these.
    """
    if features == "auto":
        return "demo" if reference.rpartition(":")[0] == "digits" or reference == "digits" else "inception"
    if features in OWN_FEATURES or features.lower().endswith(".pt2"):
        return features
    from mvar_core.evaluation.custom import registered_names

    names = registered_names()
    if features not in names:
        from mvar_core.errors import nearest

        raise ConfigError(
            f"--features {features!r} is not known. {nearest(features, [*OWN_FEATURES, *names])}",
            "A program from torch.export is named by its file, which ends in .pt2.",
        )
    return features


def inception_file(named: Path | None, download: bool, console: Console, team: Processes) -> Path:
    """The verified Inception weights, fetched where that is allowed and they are absent.

    Raises:
        DataError: They are absent, or are other weights.
    """
    from mvar_core.evaluation import features

    def find() -> Path:
        try:
            return features.find_inception_weights(named)
        except DataError:
            if not download or named is not None:
                raise
            with console.progress("Inception weights", "bytes") as progress:
                return features.download_inception(progress)

    team.from_first(find)
    return features.find_inception_weights(named) if team.count > 1 else find()


def make_extractor(
    kind: str,
    weights: Path | None,
    demo_classifier: Path | None,
    nearby: Iterable[Path],
    image_shape: ImageShape,
    device: torch.device,
) -> FeatureExtractor:
    """The network that `feature_kind` named.

    Raises:
        MvarError: Its file cannot be used.
    """
    if kind == "demo":
        from mvar_core.evaluation.demo import DemoExtractor, find_classifier

        return DemoExtractor(find_classifier(demo_classifier, list(nearby), image_shape), "cpu")
    device = torch.device("cpu") if device.type == "mps" else device  # float64 is unknown there
    if kind == "inception":
        from mvar_core.evaluation import features

        return features.load_inception(weights, device)
    from mvar_core.evaluation.custom import ExportedExtractor, RegisteredExtractor

    if kind.lower().endswith(".pt2"):
        return ExportedExtractor(Path(kind).expanduser(), device)
    return RegisteredExtractor(kind, device)
