"""Features of networks other than Inception: exported programs, and what torch-fidelity has registered.

Letters: B batch, H, W height and width in pixels, F features.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from mvar_core.errors import CheckpointError, ConfigError, DataError, nearest, one_line
from mvar_core.evaluation.features import Features, check_images, exact_matmul
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.io.files import sha256_of_file

OWN_NAMES = ("inception", "demo")
"""Names of features that a file must not claim."""

INCEPTION_NAME = "inception-v3-compat"

HOW_TO_EXPORT = (
    "Export one that takes uint8 (B, 3, H, W) and returns float (B, F): torch.export.save(torch.export.export("
    "network.eval(), (images,), dynamic_shapes=({0: torch.export.Dim('batch')},)), path)."
)


class ExportedExtractor:
    """Features of a program that torch.export.save wrote: uint8 (B, 3, H, W) in, float (B, F) out.

    The program is code: load only files that you trust. The stem of the .pt2 file names the features.

    Raises:
        DataError: Not such a file, or a program with other inputs or outputs.
    """

    comparable_to_papers = False

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        self._path = path
        self._device = torch.device(device)
        program = _load_program(path)
        self._shape, self.dim = _check_signature(path, program)
        self.name = path.name if path.stem in OWN_NAMES else path.stem
        self.weights_hash = sha256_of_file(path)
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        self._network = program.module()

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> Features:
        """Features of images; DataError where they are not uint8 images of the program's size, or where it fails."""
        check_images(images)
        height, width = images.shape[2:]
        if self._shape[0] not in (None, height) or self._shape[1] not in (None, width):
            expected = "×".join("?" if side is None else str(side) for side in self._shape)
            raise DataError(
                f"{self._path} was exported for images of {expected} pixels, found {height}×{width}.",
                "Export it with a dynamic height and width, or put the resize into the program.",
            )
        try:
            with exact_matmul():
                features = self._network(images.to(self._device))
        except (AssertionError, RuntimeError) as error:
            raise DataError(
                f"{self._path} fails on {len(images)} images of {height}×{width}: {one_line(error)[:300]}."
            ) from error
        return Features(_checked(features, self.name, len(images), self.dim))


class RegisteredExtractor:
    """Features of an extractor that torch-fidelity knows by name, such as dinov2-vit-b-14 or clip-vit-b-32.

    Its weights are fetched by torch-fidelity where they are not on the machine. The layer is the one that
    torch-fidelity measures FID on.

    Raises:
        ConfigError: No such name, or the name of the Inception network, whose weights are checked elsewhere.
        CheckpointError: The extractor cannot be built, for example for lack of its weights.
    """

    comparable_to_papers = False

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        names = registered_names()
        if name == INCEPTION_NAME:
            raise ConfigError(f"{name} is the network that FID is defined by.", "Use --features inception.")
        if name not in names:
            raise ConfigError(f"torch-fidelity knows no features {name!r}. {nearest(name, names)}")
        self.name = name
        self._device = torch.device(device)
        kind = fidelity_module("registry").FEATURE_EXTRACTORS_REGISTRY[name]
        try:
            layer = kind.get_default_feature_layer_for_metric("fid")
            # Building advances the global generator, and some networks print while they load.
            with torch.random.fork_rng(devices=[]), redirect_stdout(StringIO()):
                network = fidelity_module("utils").create_feature_extractor(name, [layer], cuda=False, verbose=False)
        except (OSError, RuntimeError, ValueError, ImportError, AssertionError) as error:
            raise CheckpointError(
                f"torch-fidelity cannot build {name}: {one_line(error)[:300]}.",
                "Its weights are fetched when they are first needed; on a machine without a network, copy torch's"
                " cache of downloads there.",
            ) from error
        self._network: nn.Module = network.to(self._device)
        self.weights_hash = _hash_of(network)
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
        features = _checked(outputs[0] if isinstance(outputs, tuple) else outputs, self.name, len(images), self._dim)
        self._dim = features.shape[1]
        return Features(features)


def registered_names() -> tuple[str, ...]:
    """Names under which torch-fidelity has feature extractors, Inception's aside."""
    return tuple(name for name in fidelity_module("registry").FEATURE_EXTRACTORS_REGISTRY if name != INCEPTION_NAME)


def _checked(features: Any, name: str, count: int, dim: int | None) -> Tensor:
    """A network's output as float32 features on the CPU, if that is what it is."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != count or features.shape[1] == 0:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise DataError(f"{name} returns {found} for {count} images; expected features ({count}, F).")
    if dim is not None and features.shape[1] != dim:
        raise DataError(f"{name} returns {features.shape[1]} features; expected {dim}.")
    return features.float().cpu()


def _load_program(path: Path) -> torch.export.ExportedProgram:
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []
    if not any(name.endswith("archive_format") for name in names):
        is_torchscript = any("/code/" in name for name in names)
        kind = "a TorchScript file, which torch no longer supports" if is_torchscript else "not one"
        raise DataError(f"{path} should be a program that torch.export.save wrote, but is {kind}.", HOW_TO_EXPORT)
    try:
        with _quiet_export():
            return torch.export.load(path)
    except Exception as error:  # whatever a damaged archive makes torch's readers raise
        raise DataError(
            f"{path} cannot be loaded as an exported program by torch {torch.__version__}: {one_line(error)[:300]}.",
            "Export it again, with this version of torch.",
        ) from error


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Without the trace that torch.export logs before it raises."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_signature(path: Path, program: torch.export.ExportedProgram) -> tuple[tuple[int | None, int | None], int]:
    """Height and width that the program is for, None where any will do, and its number of features."""
    names = program.graph_signature.user_inputs
    inputs = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(names) != 1 or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise DataError(f"{path} takes {len(names)} inputs; expected one, the images.", HOW_TO_EXPORT)
    images = inputs[0]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        dtype = str(images.dtype).removeprefix("torch.")
        raise DataError(f"{path} takes {dtype} {_shape(images)}; expected uint8 (B, 3, H, W).", HOW_TO_EXPORT)
    if _fixed(images.shape[0]) is not None:
        raise DataError(f"{path} was exported for batches of {images.shape[0]} images only.", HOW_TO_EXPORT)
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    results = [getattr(value, "meta", {}).get("val") for value in output.args[0]]
    kept = results[-len(program.graph_signature.user_outputs) :]
    if len(kept) != 1 or not isinstance(kept[0], Tensor) or kept[0].ndim != 2 or not kept[0].is_floating_point():
        found = ", ".join(_shape(value) if isinstance(value, Tensor) else type(value).__name__ for value in kept)
        raise DataError(f"{path} returns {found or 'nothing'}; expected floats (B, F).", HOW_TO_EXPORT)
    dim = _fixed(kept[0].shape[1])
    if dim is None:
        raise DataError(f"{path} returns {_shape(kept[0])}, any number of features; expected a fixed number.")
    return (_fixed(images.shape[2]), _fixed(images.shape[3])), dim


def _fixed(side: Any) -> int | None:
    """A side of an exported shape; None for one that may vary."""
    return side if isinstance(side, int) else None


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(str(side) if isinstance(side, int) else '?' for side in tensor.shape)})"


def _hash_of(network: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
