"""The perceptual loss of tokenizers: LPIPS with VGG16 (Zhang et al., arXiv 1801.03924), from local files of weights.

torch-fidelity's class, which the tests compare with, downloads weights when it is built, takes images in [0, 255] and
has no gradient where all channels are zero.
"""

# Shape suffixes: B batch, C channels, H W pixels.

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mvar_core.errors import CheckpointError
from mvar_core.io.files import sha256_of_file
from mvar_core.io.weights import WeightsFile, read_weights

_STAGES = (((0, 2), 64), ((5, 7), 128), ((10, 12, 14), 256), ((17, 19, 21), 512), ((24, 26, 28), 512))
"""Positions of VGG16's convolutions in torchvision's `features`, and their width, by resolution; pooling between."""
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
SMALLEST_SIDE = 16
"""Below this, the last stage has no pixel left."""

logger = logging.getLogger("mvar")


_WITHOUT = "or train without: --set train_tokenizer.perceptual.weight=0"
VGG16 = WeightsFile(
    what="VGG16's weights for the perceptual loss",
    option="--vgg-weights",
    variable="MVAR_VGG_WEIGHTS",
    names=("vgg16-397923af.pth",),
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    otherwise=_WITHOUT,
)
LPIPS = WeightsFile(
    what="LPIPS' weights for the perceptual loss",
    option="--lpips-weights",
    variable="MVAR_LPIPS_WEIGHTS",
    names=("weights-vgg16-lpips.pth", "vgg.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    otherwise=_WITHOUT,
)


class PerceptualLoss(nn.Module):
    """LPIPS: weighted squared differences of VGG16's features, normalised over channels, averaged over positions.

    Features are those after the last ReLU of each of the five resolutions. Weights are frozen.
    """

    shift_11: Tensor
    scale_11: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict()
        channels = 3
        for positions, width in _STAGES:
            for position in positions:
                self.convolutions[str(position)] = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
        self.weights = nn.ParameterList(torch.ones(width) / width for _, width in _STAGES)
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
        found: list[Tensor] = []
        for positions, _ in _STAGES:
            if found:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
            for position in positions:
                x_BCHW = F.relu(self.convolutions[str(position)](x_BCHW))
            found.append(x_BCHW)
        return found

    def load_published(self, vgg: Mapping[str, Tensor], lpips: Mapping[str, Tensor]) -> None:
        """Load torchvision's VGG16 without its classifier, and LPIPS' weights of channels (`lin0.model.1.weight` …).

        CheckpointError where a tensor is missing or has another shape.
        """
        state = {}
        for name, expected in self.state_dict().items():
            kind, _, rest = name.partition(".")
            file, tensors, published = "VGG16", vgg, f"features.{rest}"
            if kind == "weights":
                file, tensors, published = "LPIPS", lpips, f"lin{rest}.model.1.weight"
            found = tensors.get(published)
            if found is None or found.numel() != expected.numel():
                what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                raise CheckpointError(
                    f"These are not the {file} weights: {published} {what}, expected {tuple(expected.shape)}.",
                    f"The loss reads {(LPIPS if tensors is lpips else VGG16).url}",
                )
            state[name] = found.float().reshape(expected.shape)
        self.load_state_dict(state)


def load_perceptual_loss(
    vgg: Path | str | None = None, lpips: Path | str | None = None
) -> tuple[PerceptualLoss, dict[str, str]]:
    """The loss with weights from files that `WeightsFile.find` finds, and the SHA-256 of each file by its name.

    DataError where a file is absent or damaged, CheckpointError where it does not hold these weights.
    """
    hashes, contents = {}, []
    for file, path in ((VGG16, VGG16.find(vgg)), (LPIPS, LPIPS.find(lpips))):
        found = hashes[path.name] = sha256_of_file(path)
        if found != file.sha256:
            logger.warning("%s is not the published %s: the loss is not the LPIPS of papers.", path, file.names[0])
        contents.append(read_weights(path))
    loss = PerceptualLoss()
    loss.load_published(*contents)
    return loss, hashes


def _normalised(features_BCHW: Tensor) -> Tensor:
    # vector_norm, unlike the root of a sum of squares, has a gradient where all channels are zero.
    features_BCHW = features_BCHW.float()
    return features_BCHW / (torch.linalg.vector_norm(features_BCHW, dim=1, keepdim=True) + 1e-10)
