"""Which network measures images: chosen by name, by file, or by what the images are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mvar_core.data.images import split_name
from mvar_core.distributed import world
from mvar_core.errors import ConfigError, DataError, nearest
from mvar_core.evaluation.demo import DemoClassifier, DemoExtractor, find_classifier
from mvar_core.evaluation.features import INCEPTION, FeatureExtractor, load_inception
from mvar_core.progress import Progress, stage

Network = str | Path | FeatureExtractor
"""inception; demo, or a demo classifier's file (.safetensors); auto, which is demo for digits and else inception; or an
extractor of your own. No other file is accepted: programs from torch.export, TorchScript archives and pickles run code
when they are loaded."""


class ExtractorChoice:
    """A network that is known to exist before the slow work, and loaded when it is needed.

    `reference` decides "auto"; the Inception weights are where `WeightsFile.find` looks, or are downloaded if
    that is allowed. ConfigError for an unknown network, DataError where the weights are absent or others.
    """

    def __init__(
        self,
        network: Network,
        reference: str,
        inception_weights: str | Path | None = None,
        download: bool = False,
        progress: Progress | None = None,
    ):
        self._extractor = None if isinstance(network, (str, Path)) else network
        self._file: Path | None = None
        self.name = str(network) if self._extractor is None else getattr(network, "name", "")
        if self._extractor is not None:
            about: list[Any] = [getattr(network, name, None) for name in ("name", "weights_hash", "dim")]
            if [type(value) for value in about] != [str, str, int] or about[2] < 1:
                raise ConfigError(
                    f"features={type(network).__name__} has name, weights_hash and dim {about!r:.80};"
                    " expected two texts and a whole number."
                )
            return
        if self.name == "auto":
            self.name = "demo" if split_name(reference)[0] == "digits" else "inception"
        if self.name == "inception":

            def find() -> Path:
                try:
                    return INCEPTION.find(inception_weights)
                except DataError:
                    if not download or inception_weights is not None:
                        raise
                    return INCEPTION.download(stage(progress, "Inception weights", "bytes"))

            self._file = world().run_on_rank_zero(find)
        elif self.name.lower().endswith(".safetensors"):
            self._file, self.name = Path(self.name).expanduser(), "demo"
        elif self.name != "demo":
            raise ConfigError(
                f"--features {self.name!r} is not known. {nearest(self.name, ('inception', 'demo'))}",
                "A network of your own is passed from Python: mvar_core.evaluate(features=...).",
            )

    def load(self, image_shape: tuple[int, int], device: torch.device, nearby: Sequence[Path] = ()) -> FeatureExtractor:
        """The network; of demo classifiers the one for this size, also from a directory `nearby`."""
        if self._extractor is not None:
            return self._extractor
        if self.name == "inception":
            return load_inception(self._file, torch.device("cpu") if device.type == "mps" else device)  # needs float64
        if self._file is not None:
            classifier = DemoClassifier.load(self._file)
        else:
            # Rank 0 alone trains the classifier that is not there yet.
            world().run_on_rank_zero(lambda: find_classifier(nearby, image_shape) is None)
            classifier = find_classifier(nearby, image_shape)
        classifier.check_shape(image_shape)
        return DemoExtractor(classifier)
