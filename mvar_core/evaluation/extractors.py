"""Which network measures images: chosen by name, by file, or by what the images are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mvar_core.data.images import split_name
from mvar_core.distributed import world
from mvar_core.errors import ConfigError, DataError, nearest
from mvar_core.evaluation.custom import OWN_NAMES, ExportedExtractor, RegisteredExtractor, registered_names
from mvar_core.evaluation.demo import DemoClassifier, DemoExtractor, find_classifier
from mvar_core.evaluation.features import FeatureExtractor, download_inception, find_inception_weights, load_inception
from mvar_core.progress import Progress, stage

CLASSIFIER_SUFFIX, PROGRAM_SUFFIX = ".safetensors", ".pt2"

Network = str | Path | FeatureExtractor
"""inception; demo, or a demo classifier's file (.safetensors); a program that torch.export saved (.pt2); a name that
torch-fidelity has registered; auto, which is demo for digits and else inception; or an extractor."""


class ExtractorChoice:
    """A network that is known to exist before the slow work, and loaded when it is needed.

    `reference` decides "auto"; the Inception weights are where `find_inception_weights` looks, or are downloaded if
    that is allowed.

    Raises:
        ConfigError: No such network.
        DataError: The Inception weights are absent, or are other weights.
    """

    def __init__(
        self,
        network: Network,
        reference: str,
        *,
        inception_weights: str | Path | None = None,
        download: bool = False,
        progress: Progress | None = None,
    ):
        self._extractor = None if isinstance(network, (str, Path)) else network
        self._file: Path | None = None
        if self._extractor is not None:
            self.name = self._extractor.name
            return
        text = str(network)
        if text == "auto":
            text = "demo" if split_name(reference)[0] == "digits" else "inception"
        if text.lower().endswith((CLASSIFIER_SUFFIX, PROGRAM_SUFFIX)):
            self._file = Path(text).expanduser()
            self.name = "demo" if text.lower().endswith(CLASSIFIER_SUFFIX) else text
        elif text in OWN_NAMES or text in registered_names():
            self.name = text
        else:
            raise ConfigError(
                f"--features {text!r} is not known. {nearest(text, [*OWN_NAMES, *registered_names()])}",
                "A program from torch.export is chosen by its file, which ends in .pt2.",
            )
        if self.name == "inception":
            self._file = _inception_file(inception_weights, download, progress)

    def load(self, image_shape: tuple[int, int], device: torch.device, nearby: Iterable[Path] = ()) -> FeatureExtractor:
        """The network; of demo classifiers the one for this size, also from a directory `nearby`.

        Raises:
            MvarError: Its file cannot be used.
        """
        if self._extractor is not None:
            return self._extractor
        device = torch.device("cpu") if device.type == "mps" else device  # float64 is unknown there
        if self.name == "demo":
            if self._file is not None:
                return DemoExtractor(DemoClassifier.load(self._file))
            # Rank 0 alone trains the classifier that is not there yet.
            world().run_on_rank_zero(lambda: find_classifier(None, list(nearby), image_shape) is None)
            return DemoExtractor(find_classifier(None, list(nearby), image_shape))
        if self.name == "inception":
            return load_inception(self._file, device)
        if self._file is not None:
            return ExportedExtractor(self._file, device)
        return RegisteredExtractor(self.name, device)


def _inception_file(named: str | Path | None, download: bool, progress: Progress | None) -> Path:
    """The verified Inception weights, downloaded where that is allowed and they are absent."""

    def find() -> Path:
        try:
            return find_inception_weights(named)
        except DataError:
            if not download or named is not None:
                raise
            return download_inception(stage(progress, "Inception weights", "bytes"))

    world().run_on_rank_zero(find)
    return find_inception_weights(named) if world().world_size > 1 else find()
