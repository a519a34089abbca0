"""What images are compared by: the features of a network, one pass per image.

Letters: B batch, H, W height and width in pixels, F features, K classes of the network, P spatial features.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mvar_core.errors import CheckpointError, DataError, one_line
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.io.weights import WeightsFile, read_weights

INCEPTION = WeightsFile(
    what="the Inception weights",
    option="--inception-weights",
    variable="MVAR_INCEPTION_WEIGHTS",
    names=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size=95_628_359,
    exact=True,
)
"""torch-fidelity and pytorch-fid leave the same file in torch's cache, under different names."""

SPATIAL_CHANNELS = 7


class Features(NamedTuple):
    """What an extractor computes for a batch of images; on the CPU, in float32.

    FID, precision, recall and KID compare `pool`; the inception score reads `logits`, None where the network does not
    classify; sFID compares `spatial`, None where it has no such features.
    """

    pool: Float[Tensor, "B F"]
    logits: Float[Tensor, "B K"] | None = None
    spatial: Float[Tensor, "B P"] | None = None


@runtime_checkable
class FeatureExtractor(Protocol):
    """A network that turns images into `dim` features; `weights_hash` is a SHA-256 that identifies its weights.

    `comparable_to_papers` says whether published figures were measured with these very features.
    """

    name: str
    dim: int
    comparable_to_papers: bool
    weights_hash: str

    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> Features: ...  # noqa: D102


def described(value: Any) -> str:
    """What a message calls something that should have been a tensor of another kind: "uint8 (4, 3)", or its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")


def is_dense(value: Any, ndim: int) -> bool:
    """Whether something is an ordinary tensor with that many dimensions, and values in memory."""
    return isinstance(value, Tensor) and value.ndim == ndim and value.layout == torch.strided and not value.is_meta


def check_images(images: Tensor) -> None:
    """Raise DataError for what is not a batch of uint8 RGB images."""
    if not is_dense(images, 4) or images.dtype != torch.uint8 or images.shape[1] != 3 or 0 in images.shape[1:]:
        raise DataError(f"Features are measured on uint8 images (B, 3, H, W), found {described(images)}.")


def check_labels(images: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    """Raise DataError for labels that are not a whole number from 0 for each image, and for no images at all."""
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise DataError(f"Labels are a tensor of whole numbers, found {described(labels)}.")
    if len(images) == 0 or labels.shape != images.shape[:1]:
        count = len(labels) if labels.ndim == 1 else tuple(labels.shape)
        raise DataError(f"Found {len(images)} images and {count} labels; expected one label per image, and some.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        expected = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise DataError(f"Labels run from {low} to {high}; expected {expected}.")


def check_features(found: Any, extractor: FeatureExtractor, images: int) -> None:
    """Raise DataError for what is not `Features` of that many images."""
    for index, values in enumerate(found if isinstance(found, Features) else [found]):
        if index and values is None:
            continue
        fits = is_dense(values, 2) and len(values) == images and values.is_floating_point()
        if not fits or not (index or (isinstance(found, Features) and values.shape[1] == extractor.dim)):
            raise DataError(
                f"The network {extractor.name} returns {described(values)} for {images} images; expected Features whose"
                f" pool is float ({images}, {extractor.dim}), logits and spatial float ({images}, any) or None."
            )


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Measure in true float32: no TensorFloat-32 in CUDA's matrix products and convolutions inside the block.

    TensorFloat-32 changes features by more than other machines' rounding does. The caller's settings are restored.
    """
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    # torch has two interfaces to these settings, and raises on reading the older where the newer contradict it.
    try:
        matmul, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        matmul, convolutions = None, None
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
            cudnn.allow_tf32 = False
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
            cudnn.allow_tf32 = convolutions
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class InceptionExtractor:
    """The Inception network of 2015-12-05 that FID was defined with, as torch-fidelity's inception-v3-compat.

    uint8 images, TensorFlow 1's bilinear resize to 299×299, (x - 128) / 128; pool3 (2048), pool3·W without bias (1008),
    and the first 7 channels of mixed_6/conv (Mixed_6d.branch1x1), 17×17×7 = 2023 values in N, H, W, C order, as in the
    ADM evaluator. `load_inception` reads and checks the published weights; CheckpointError for those of other networks.
    """

    name = "inception"
    dim = 2048

    def __init__(self, state_dict: Mapping[str, Tensor], weights_hash: str, device: torch.device | str = "cpu"):
        module = fidelity_module("feature_extractor_inceptionv3")
        self.weights_hash = weights_hash
        self.comparable_to_papers = weights_hash == INCEPTION.sha256
        self._device = torch.device(device)
        # The class reads weights from a file only, and unpickles whatever that holds; so it gets a file in memory,
        # written here from tensors.
        file = io.BytesIO()
        torch.save(dict(state_dict), file)
        file.seek(0)
        try:
            with torch.random.fork_rng(devices=[]):  # building the layers would advance the global generator
                network = module.FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
                )
        except RuntimeError as error:
            message = f"These weights do not fit the Inception network: {one_line(error)[:300]}."
            raise CheckpointError(message) from error
        self._network: torch.nn.Module = network.to(self._device)
        self._branch: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, output: self._branch.append(output))

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> Features:
        """Features of uint8 images; DataError for others."""
        check_images(images)
        with exact_matmul():
            pool, logits = self._network(images.to(self._device))
        spatial = self._branch.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool.cpu(), logits.cpu(), spatial.cpu())


def load_inception(path: Path | str | None = None, device: torch.device | str = "cpu") -> InceptionExtractor:
    """The extractor that published figures were measured with, from the published file of weights."""
    state_dict = read_weights(INCEPTION.find(path), buffers=lambda name: name.endswith("num_batches_tracked"))
    return InceptionExtractor(state_dict, INCEPTION.sha256, device)
