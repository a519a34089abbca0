"""What images are compared by: the features of a network, one pass per image.

Letters: B batch, H, W height and width in pixels, F features, K classes of the network, P spatial features.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mvar_core.errors import CheckpointError, DataError
from mvar_core.files import sha256_of_file
from mvar_core.metrics.fidelity import fidelity_module

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_BYTES = 95_628_359
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""Names under which torch-fidelity and pytorch-fid leave the same file in torch's cache."""

INCEPTION_VARIABLE = "MVAR_INCEPTION_WEIGHTS"

SPATIAL_CHANNELS = 7


class Features(NamedTuple):
    """What an extractor says of a batch of images; on the CPU, in float32.

    Attributes:
        pool: (B, F), compared by FID, precision, recall and KID.
        logits: (B, K), read by the inception score; None where the network does not classify.
        spatial: (B, P), compared by sFID; None where the network has no such features.
    """

    pool: Float[Tensor, "B F"]
    logits: Float[Tensor, "B K"] | None = None
    spatial: Float[Tensor, "B P"] | None = None


@runtime_checkable
class FeatureExtractor(Protocol):
    """A network that turns images into features.

    Attributes:
        name: What tables call the features.
        dim: Number of features, F.
        comparable_to_papers: Whether published figures were measured with these very features.
        weights_hash: SHA-256 that identifies the network's weights.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def dim(self) -> int: ...  # noqa: D102

    @property
    def comparable_to_papers(self) -> bool: ...  # noqa: D102

    @property
    def weights_hash(self) -> str: ...  # noqa: D102

    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> Features: ...  # noqa: D102


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of uint8 RGB images.

    Raises:
        DataError: Another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"Features are measured on uint8 images (B, 3, H, W), found {str(images.dtype).removeprefix('torch.')}"
            f" {tuple(images.shape)}."
        )


class InceptionExtractor:
    """The Inception network of 2015-12-05 that FID was defined with, as torch-fidelity's inception-v3-compat.

    uint8 images, TensorFlow 1's bilinear resize to 299×299, (x - 128) / 128; pool3 (2048), pool3·W without bias (1008),
    and the first 7 channels of mixed_6/conv (Mixed_6d.branch1x1), 17×17×7 = 2023 numbers in N, H, W, C order, as in the
    ADM evaluator.

    Args:
        state_dict: The network's weights; `load_inception` reads and checks the published file.
        weights_hash: SHA-256 of the file they came from.
        device: Where it runs.

    Raises:
        CheckpointError: The weights do not fit the network.
    """

    name = "inception"
    dim = 2048

    def __init__(self, state_dict: Mapping[str, Tensor], weights_hash: str, device: torch.device | str = "cpu"):
        module = fidelity_module("feature_extractor_inceptionv3")
        self.weights_hash = weights_hash
        self.comparable_to_papers = weights_hash == INCEPTION_SHA256
        self._device = torch.device(device)
        # The class reads weights only from a file, and then without torch's protection against pickled code; so it
        # is handed tensors that are already in memory, in a file that was written here.
        file = io.BytesIO()
        torch.save(dict(state_dict), file)
        file.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):  # building the layers draws from the global generator
                network = module.FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
                )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"These weights do not fit the Inception network: {reason[:300]}.") from error
        self._network: torch.nn.Module = network.to(self._device)
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, _module: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> Features:
        """Features of a batch of images.

        Raises:
            DataError: Not uint8 images.
        """
        check_images(images)
        # TensorFloat-32 convolutions move the features by more than other machines' rounding does.
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            pool, logits = self._network(images.to(self._device))
        spatial, self._spatial = self._spatial, None
        assert spatial is not None
        return Features(pool.cpu(), logits.cpu(), spatial.cpu())


def find_inception_weights(path: Path | str | None = None) -> Path:
    """The verified file of Inception weights: `path`, or $MVAR_INCEPTION_WEIGHTS, or torch's cache of downloads.

    Args:
        path: Where the user says it is.

    Raises:
        DataError: No such file, or a file of another size or SHA-256; says where to get it and where to put it.
    """
    named = str(path) if path is not None else os.environ.get(INCEPTION_VARIABLE)
    if named:
        source = "--inception-weights" if path is not None else f"${INCEPTION_VARIABLE}"
        candidate = Path(named).expanduser()
        if not candidate.is_file():
            raise DataError(f"{source}: {candidate} does not exist.", _how_to_get_weights())
        _verify(candidate)
        return candidate
    for name in INCEPTION_FILES:
        candidate = _download_cache() / name
        if candidate.is_file():
            _verify(candidate)
            return candidate
    raise DataError("The Inception weights are not on this machine.", _how_to_get_weights())


def load_inception(path: Path | str | None = None, device: torch.device | str = "cpu") -> InceptionExtractor:
    """The extractor that published figures were measured with, from the verified file of weights.

    Args:
        path: The file; None looks where `find_inception_weights` looks.
        device: Where it runs.

    Raises:
        DataError: The file is absent or is another file.
        CheckpointError: The file cannot be read.
    """
    file = find_inception_weights(path)
    try:
        state_dict = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} cannot be read as weights: {reason[:300]}.") from error
    return InceptionExtractor(state_dict, INCEPTION_SHA256, device)


def _download_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _how_to_get_weights() -> str:
    return (
        f"Download {INCEPTION_URL} ({INCEPTION_BYTES:,} bytes, SHA-256 {INCEPTION_SHA256}) to"
        f" {_download_cache() / INCEPTION_FILES[0]}, or name the file with --inception-weights or"
        f" ${INCEPTION_VARIABLE}."
    )


def _verify(path: Path) -> None:
    size = path.stat().st_size
    if size != INCEPTION_BYTES:
        raise DataError(
            f"{path} is not the Inception weights: it has {size:,} bytes, expected {INCEPTION_BYTES:,}.",
            f"Delete it or name another file. {_how_to_get_weights()}",
        )
    found = sha256_of_file(path)
    if found != INCEPTION_SHA256:
        raise DataError(
            f"{path} is not the Inception weights: its SHA-256 is {found}, expected {INCEPTION_SHA256}.",
            f"Delete it or name another file. {_how_to_get_weights()}",
        )
