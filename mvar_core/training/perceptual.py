"""The perceptual loss of tokenizers: LPIPS with VGG16 (Zhang et al., arXiv 1801.03924), from local files of weights.

The network is plain torch, for torch-fidelity's own class (which the tests compare with) fetches weights from the
network when it is built.
"""

# Shape suffixes: B batch, C channels, H W pixels.

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mvar_core.errors import CheckpointError, DataError
from mvar_core.io.files import sha256_of_file

_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Positions of VGG16's convolutions in torchvision's `features`, by resolution; pooling stands between the stages."""
_WIDTHS = (64, 128, 256, 512, 512)
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
SMALLEST_SIDE = 16
"""Below this, the last stage has no pixel left."""

logger = logging.getLogger("mvar")


@dataclass(frozen=True)
class WeightsFile:
    """A published file that the loss needs.

    Attributes:
        option: The command line's option that names it.
        variable: The environment variable that names it.
        names: Under which names it lies in torch's cache of downloads.
        url: Where it is published.
        sha256: Of the published file.
    """

    option: str
    variable: str
    names: tuple[str, ...]
    url: str
    sha256: str


VGG16 = WeightsFile(
    option="--vgg-weights",
    variable="MVAR_VGG_WEIGHTS",
    names=("vgg16-397923af.pth",),
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
LPIPS = WeightsFile(
    option="--lpips-weights",
    variable="MVAR_LPIPS_WEIGHTS",
    names=("weights-vgg16-lpips.pth", "vgg.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


class PerceptualLoss(nn.Module):
    """LPIPS: weighted squared differences of VGG16's features, normalised over channels, averaged over positions.

    Features are those after the last ReLU of each of the five resolutions. Weights are frozen.
    """

    shift_11: Tensor
    scale_11: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        channels = 3
        for stage, width in zip(_STAGES, _WIDTHS, strict=True):
            inputs = [channels] + [width] * (len(stage) - 1)
            self.stages.append(nn.ModuleList(nn.Conv2d(count, width, 3, padding=1) for count in inputs))
            channels = width
        self.weights = nn.ParameterList(torch.ones(width) / width for width in _WIDTHS)
        self.register_buffer("shift_11", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale_11", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(
        self, images_BCHW: Float[Tensor, "B 3 H W"], targets_BCHW: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, " B"]:
        """Distance of each image from its target, both in [-1, 1]; only the images get gradients."""
        with torch.no_grad():
            targets = self.features(targets_BCHW)
        distances_B = images_BCHW.new_zeros(len(images_BCHW), dtype=torch.float32)
        for found, wanted, weights_C in zip(self.features(images_BCHW), targets, self.weights, strict=True):
            squares_BCHW = (_normalised(found) - _normalised(wanted)).square()
            distances_B = distances_B + torch.einsum("bchw,c->bhw", squares_BCHW, weights_C).mean(dim=(1, 2))
        return distances_B

    def features(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Features at five resolutions of images in [-1, 1]."""
        x_BCHW = (images_BCHW - self.shift_11) / self.scale_11
        found = []
        for index, stage in enumerate(self.stages):
            if index:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
            for convolution in stage:  # type: ignore[attr-defined]
                x_BCHW = F.relu(convolution(x_BCHW))
            found.append(x_BCHW)
        return found

    def load_published(self, vgg: Mapping[str, Tensor], lpips: Mapping[str, Tensor]) -> None:
        """Take weights by their published names.

        Args:
            vgg: torchvision's VGG16; its classifier is left out.
            lpips: The weights of the channels, `lin0.model.1.weight` … `lin4.model.1.weight`.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
        """
        sources: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        for index, stage in enumerate(_STAGES):
            for number, position in enumerate(stage):
                for kind in ("weight", "bias"):
                    sources[f"stages.{index}.{number}.{kind}"] = (vgg, f"features.{position}.{kind}")
            sources[f"weights.{index}"] = (lpips, f"lin{index}.model.1.weight")
        state = {}
        for name, expected in self.state_dict().items():
            tensors, published = sources[name]
            found = tensors.get(published)
            if found is None or found.numel() != expected.numel():
                what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                file, wanted = ("LPIPS", LPIPS.url) if tensors is lpips else ("VGG16", VGG16.url)
                raise CheckpointError(
                    f"These are not the {file} weights: {published} {what}, expected {tuple(expected.shape)}.",
                    f"The loss reads {wanted}",
                )
            state[name] = found.float().reshape(expected.shape)
        self.load_state_dict(state)


def find_weights(file: WeightsFile, path: Path | str | None = None) -> Path:
    """A file of weights on this machine: `path`, or the environment variable's, or one in torch's cache of downloads.

    A file that the user names may hold other weights than the published ones, which is said; one in the cache may not.

    Args:
        file: Which file.
        path: Where the user says it is.

    Raises:
        DataError: No such file, or a damaged one; says where to get it and where to put it.
    """
    named = str(path) if path is not None else os.environ.get(file.variable)
    if named:
        candidate = Path(named).expanduser()
        if not candidate.is_file():
            said = file.option if path is not None else f"${file.variable}"
            raise DataError(f"{said}: {candidate} does not exist.", how_to_get(file))
        return candidate
    for name in file.names:
        candidate = _download_cache() / name
        if candidate.is_file():
            found = sha256_of_file(candidate)
            if found != file.sha256:
                raise DataError(
                    f"{candidate} is damaged: its SHA-256 is {found}, expected {file.sha256}.",
                    f"Delete it. {how_to_get(file)}",
                )
            return candidate
    raise DataError(f"The perceptual loss needs {file.names[0]}, which is not on this machine.", how_to_get(file))


def load_perceptual_loss(
    vgg: Path | str | None = None, lpips: Path | str | None = None
) -> tuple[PerceptualLoss, dict[str, str]]:
    """The loss with weights from files on this machine, and the SHA-256 of each file.

    Args:
        vgg: File of VGG16; None looks where `find_weights` looks.
        lpips: File of LPIPS; likewise.

    Raises:
        DataError: A file is absent or damaged.
        CheckpointError: A file cannot be read, or does not hold these weights.
    """
    paths = [find_weights(VGG16, vgg), find_weights(LPIPS, lpips)]
    hashes = {}
    for file, path in zip((VGG16, LPIPS), paths, strict=True):
        found = sha256_of_file(path)
        hashes[path.name] = found
        if found != file.sha256:
            logger.warning("%s is not the published %s: the loss is not the LPIPS of papers.", path, file.names[0])
    loss = PerceptualLoss()
    loss.load_published(*(_read(path) for path in paths))
    return loss, hashes


def how_to_get(file: WeightsFile) -> str:
    """What to do about a missing file."""
    return (
        f"Download {file.url} (SHA-256 {file.sha256}) to {_download_cache() / file.names[0]}, or name the file with"
        f" {file.option} or ${file.variable}; or train without: --set train_tokenizer.perceptual.weight=0"
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read as weights: {reason[:300]}.") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a state dict.")
    return content


def _normalised(features_BCHW: Tensor) -> Tensor:
    # vector_norm, unlike the root of a sum of squares, has a gradient where all channels are zero.
    features_BCHW = features_BCHW.float()
    return features_BCHW / (torch.linalg.vector_norm(features_BCHW, dim=1, keepdim=True) + 1e-10)


def _download_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"
