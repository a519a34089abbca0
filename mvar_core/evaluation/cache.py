"""A folder of features that were measured before, so that the same images need not be measured again."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from pathlib import Path
from zipfile import BadZipFile

from mvar_core.evaluation.features import FeatureExtractor
from mvar_core.evaluation.references import FORMAT, read_features, write_features
from mvar_core.evaluation.statistics import FeatureSet

logger = logging.getLogger("mvar")


def feature_key(extractor: FeatureExtractor, content: str, count: int) -> str:
    """The name of these images' features in a cache: a SHA-256 of all that they depend on.

    Args:
        extractor: What measures the images: its name and weights are part of the key.
        content: A fingerprint of the images, as they are given to the extractor.
        count: How many of them are measured.
    """
    parts = [FORMAT, extractor.name, extractor.weights_hash, content, count]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class FeatureCache:
    """Features by key, one npz file each; a file that cannot be used counts as absent.

    Args:
        directory: Where the files are; made when the first is saved.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.directory / f"{key}.npz"

    def load(self, key: str, *, features: bool = False) -> FeatureSet | None:
        """The features of a key; None where there are none.

        Args:
            key: From `feature_key`.
            features: Whether the features themselves are needed, not only their statistics.
        """
        path = self.path(key)
        try:
            content = read_features(path)
            if content is None or content[1] != {"key": key}:
                raise ValueError("it is not a cache of these features")
        except FileNotFoundError:
            return None
        except (OSError, EOFError, BadZipFile, zlib.error, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s cannot be used and is measured again: %s.", path, reason)
            return None
        return None if features and content[0].features is None else content[0]

    def save(self, key: str, features: FeatureSet) -> None:
        """Keep features under a key; the file is written whole or not at all."""
        write_features(self.path(key), features, {"key": key})
