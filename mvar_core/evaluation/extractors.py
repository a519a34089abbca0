"""Which network measures images: chosen by name, by file, or by what the images are compared with.

Letters: B batch, H, W height and width in pixels, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from mvar_core.data.images import split_name
from mvar_core.distributed import world
from mvar_core.errors import CheckpointError, ConfigError, DataError, nearest, one_line
from mvar_core.evaluation.demo import DemoClassifier, DemoExtractor, find_classifier
from mvar_core.evaluation.features import (
    FeatureExtractor,
    Features,
    check_images,
    download_inception,
    exact_matmul,
    find_inception_weights,
    load_inception,
)
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.progress import Progress, stage

CLASSIFIER_SUFFIX = ".safetensors"
OWN_NAMES = ("inception", "demo")
INCEPTION_NAME = "inception-v3-compat"

Network = str | Path | FeatureExtractor
"""inception; demo, or a demo classifier's file (.safetensors); a name that torch-fidelity has registered; auto, which
is demo for digits and else inception; or an extractor of your own. No other file is accepted: programs from
torch.export, TorchScript archives and pickles run code when they are loaded."""


class ExtractorChoice:
    """A network that is known to exist before the slow work, and loaded when it is needed.

    `reference` decides "auto"; the Inception weights are where `find_inception_weights` looks, or are downloaded if
    that is allowed.

    Raises:
        ConfigError: No such network, or one of torch-fidelity's without `download`.
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
        self.name = str(network)
        if self.name == "auto":
            self.name = "demo" if split_name(reference)[0] == "digits" else "inception"
        if self.name == "inception":

            def find() -> Path:
                try:
                    return find_inception_weights(inception_weights)
                except DataError:
                    if not download or inception_weights is not None:
                        raise
                    return download_inception(stage(progress, "Inception weights", "bytes"))

            self._file = world().run_on_rank_zero(find)
        elif self.name.lower().endswith(CLASSIFIER_SUFFIX):
            self._file, self.name = Path(self.name).expanduser(), "demo"
        elif self.name in registered_names():
            if not download:
                raise ConfigError(
                    f"torch-fidelity fetches {self.name}, weights and for some networks code, where they are not on"
                    " this machine, and does not check them.",
                    "Allow it with --download.",
                )
        elif self.name not in OWN_NAMES:
            raise ConfigError(
                f"--features {self.name!r} is not known. {nearest(self.name, [*OWN_NAMES, *registered_names()])}",
                "A network of your own is passed from Python: mvar_core.evaluate(features=...).",
            )

    def load(self, image_shape: tuple[int, int], device: torch.device, nearby: Sequence[Path] = ()) -> FeatureExtractor:
        """The network; of demo classifiers the one for this size, also from a directory `nearby`.

        Raises:
            MvarError: Its file cannot be used.
        """
        if self._extractor is not None:
            return self._extractor
        device = torch.device("cpu") if device.type == "mps" else device  # float64 is unknown there
        if self.name == "inception":
            return load_inception(self._file, device)
        if self.name != "demo":
            return RegisteredExtractor(self.name, device)
        if self._file is not None:
            return DemoExtractor(DemoClassifier.load(self._file))
        # Rank 0 alone trains the classifier that is not there yet.
        world().run_on_rank_zero(lambda: find_classifier(nearby, image_shape) is None)
        return DemoExtractor(find_classifier(nearby, image_shape))


class RegisteredExtractor:
    """Features of an extractor that torch-fidelity knows by name, such as dinov2-vit-b-14 or clip-vit-b-32.

    Its weights, and for some networks their code, are fetched by torch-fidelity where they are not on the machine. The
    layer is the one that torch-fidelity measures FID on.

    Raises:
        ConfigError: No such name, or the name of the Inception network, whose weights are checked elsewhere.
        CheckpointError: The extractor cannot be built, for example for lack of its weights.
    """

    comparable_to_papers = False

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        if name not in registered_names():
            raise ConfigError(f"torch-fidelity knows no features {name!r}. {nearest(name, registered_names())}")
        self.name = name
        self._device = torch.device(device)
        kind = fidelity_module("registry").FEATURE_EXTRACTORS_REGISTRY[name]
        try:
            layer = kind.get_default_feature_layer_for_metric("fid")
            # Building would advance the global generator, and some networks print while they load.
            with torch.random.fork_rng(devices=[]), redirect_stdout(StringIO()):
                network = fidelity_module("utils").create_feature_extractor(name, [layer], cuda=False, verbose=False)
        except (OSError, RuntimeError, ValueError, ImportError, AssertionError) as error:
            raise CheckpointError(
                f"torch-fidelity cannot build {name}: {one_line(error)[:300]}.",
                "Its weights are fetched when they are first needed; on a machine without a network, copy torch's"
                " cache of downloads there.",
            ) from error
        self._network: nn.Module = network.to(self._device)
        digest = hashlib.sha256()
        for key, tensor in sorted(network.state_dict().items()):
            digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.weights_hash = digest.hexdigest()
        self._dim: int | None = None

    @property
    def dim(self) -> int:
        """Number of features; known by measuring one image the first time it is asked for."""
        if self._dim is None:
            try:
                shape = tuple(self._network.get_dummy_input_for_compile().shape)  # type: ignore[operator]
            except NotImplementedError:
                shape = (1, 3, 32, 32)
            self(torch.zeros(shape, dtype=torch.uint8))
        assert self._dim is not None
        return self._dim

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> Features:
        """Features of images; DataError where they are not uint8 images, or where it does not return (B, F)."""
        check_images(images)
        try:
            with exact_matmul():
                outputs = self._network(images.to(self._device))
        except (AssertionError, RuntimeError, ValueError) as error:
            shape = tuple(images.shape[2:])
            raise DataError(f"{self.name} fails on images of {shape}: {one_line(error)[:300]}.") from error
        features = outputs[0] if isinstance(outputs, tuple) else outputs
        found = tuple(features.shape) if isinstance(features, Tensor) else ()
        if len(found) != 2 or found[0] != len(images) or found[1] != (self._dim or max(1, found[1])):
            expected = f"({len(images)}, {self._dim or 'F'})"
            raise DataError(f"{self.name} returns {found} for {len(images)} images; expected features {expected}.")
        self._dim = features.shape[1]
        return Features(features.float().cpu())


def registered_names() -> tuple[str, ...]:
    """Names under which torch-fidelity has feature extractors, except for Inception's."""
    return tuple(name for name in fidelity_module("registry").FEATURE_EXTRACTORS_REGISTRY if name != INCEPTION_NAME)
