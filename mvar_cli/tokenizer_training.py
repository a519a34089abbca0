"""Training of a tokenizer as the commands run it: images and crops, first weights, the perceptual loss's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mvar_cli.old_console import Console
from mvar_cli.training import held_out, seeded, step_display
from mvar_core.config import ModelConfig, RunConfig
from mvar_core.data.images import ImageRows, ImageSource, RandomCrops, Views, open_images
from mvar_core.errors import ConfigError
from mvar_core.io.files import sha256_of_file
from mvar_core.models.directory import load_tokenizer, read_model_config, tokenizer_hash
from mvar_core.models.vqvae import VQVAE
from mvar_core.runtime import resolve_device, resolve_dtype
from mvar_core.training.perceptual import load_perceptual_loss
from mvar_core.training.tokenizer import TokenizerTrainResult, train_tokenizer
from mvar_core.training.tokenizer_measures import ImageBatchSource


class ImagesAlone:
    """Images without their labels, which the training of a tokenizer has no use for."""

    def __init__(self, rows: ImageRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: np.ndarray, step: int = 0) -> Tensor:
        """The images of some rows; the same at every step."""
        return self.rows.batch(rows)[0]


@dataclass(frozen=True)
class TokenizerFiles:
    """Files that the training of a tokenizer may read beside its images.

    Attributes:
        start: A model directory, or a published .pth file, whose tokenizer gives the first weights.
        new_codebook: Do not take its codebook, which may then have another size.
        vgg: Weights of the perceptual loss's network.
        lpips: Weights of the perceptual loss itself.
    """

    start: Path | None = None
    new_codebook: bool = False
    vgg: Path | None = None
    lpips: Path | None = None


def train_tokenizer_run(
    console: Console,
    config: RunConfig,
    data: str,
    out: Path,
    *,
    device: str,
    dtype: str,
    resume: bool,
    files: TokenizerFiles | None = None,
) -> TokenizerTrainResult:
    """Train a tokenizer on the images that `data` names.

    Raises:
        MvarError: Images, configuration, files or checkpoint do not fit.
    """
    files = files or TokenizerFiles()
    source = open_images(data)
    target = resolve_device(device)
    test = held_out(data)
    vqvae: VQVAE = seeded(lambda: VQVAE(config.tokenizer, config.pyramid), "tokenizer", config.seed)
    origins: dict[str, Any] = {}
    provenance: dict[str, Any] = {"data": data, "images": len(source)}
    if files.start is not None:
        digest = load_start(console, vqvae, config, files.start, files.new_codebook)
        provenance["start"] = str(files.start)
        origins["start"] = {"tokenizer": digest, "new_codebook": files.new_codebook}
    perceptual = None
    if config.train_tokenizer.perceptual.weight:
        perceptual, origins["perceptual"] = load_perceptual_loss(files.vgg, files.lpips)
    with console.progress("tokenizer", "steps") as progress:
        return train_tokenizer(
            vqvae,
            training_images(source, config),
            config,
            out,
            device=target,
            dtype=resolve_dtype(dtype, target),
            resume=resume,
            validation=ImagesAlone(ImageRows(test, config.image_shape)) if test else None,
            provenance=provenance,
            on_step=step_display(progress),
            perceptual=perceptual,
            started_from=origins,
            keep_codebook=files.start is not None and not files.new_codebook,
        )


def training_images(source: ImageSource, config: RunConfig) -> ImageBatchSource:
    """The images of a source as the configuration says: views of the centre crops, or random crops."""
    if config.data.crop == "random":
        return RandomCrops(source, config.image_shape, config.data, config.seed)
    return ImagesAlone(ImageRows(source, config.image_shape, Views(config.data, config.seed)))


def load_start(console: Console, vqvae: VQVAE, config: RunConfig, start: Path, new_codebook: bool) -> str:
    """Fill a tokenizer with the weights of another one, which may have another pyramid and image size.

    Args:
        console: Where to say what was loaded.
        vqvae: Is filled.
        config: What `vqvae` was built from.
        start: A model directory or a published .pth file.
        new_codebook: Leave the codebook as it is.

    Returns:
        SHA-256 of the weights.

    Raises:
        ConfigError: The networks differ, or the codebooks do and `new_codebook` was not said.
        CheckpointError: The file or directory cannot be read.
    """
    source, state = read_start(start)
    theirs, ours = source.tokenizer.model_dump(), config.tokenizer.model_dump()
    differing = [name for name in ours if ours[name] != theirs[name] and name != "codebook_size"]
    if differing:
        shown = ", ".join(f"{name} is {theirs[name]} there and {ours[name]} here" for name in differing[:4])
        settings = " ".join(f"--set tokenizer.{name}={_as_setting(theirs[name])}" for name in differing[:4])
        raise ConfigError(f"The tokenizer of {start} is another network: {shown}.", f"Take its: {settings}")
    if ours["codebook_size"] != theirs["codebook_size"] and not new_codebook:
        raise ConfigError(
            f"The codebook of {start} has {theirs['codebook_size']} entries; this one has {ours['codebook_size']}.",
            f"Add --new-codebook to start it anew, or --set tokenizer.codebook_size={theirs['codebook_size']}.",
        )
    if new_codebook:
        state = {**state, "quantizer.codebook": vqvae.quantizer.codebook.detach()}
    vqvae.load_state_dict(state)
    kept = "a new codebook" if new_codebook else "its codebook"
    sizes = "" if source.pyramid == config.pyramid else f"; its scales were {source.pyramid}, here {config.pyramid}"
    console.note(f"Starting from the tokenizer of {start} with {kept}{sizes}.")
    return sha256_of_file(start) if start.is_file() else tokenizer_hash(start)


def read_start(start: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights of the tokenizer in a model directory or a published .pth file."""
    if start.is_file():
        from mvar_core.models.official import convert

        converted = convert(None, start)
        return converted.config, dict(converted.tokenizer)
    source = read_model_config(start)
    return source, dict(load_tokenizer(start, source).state_dict())


def _as_setting(value: object) -> str:
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)
