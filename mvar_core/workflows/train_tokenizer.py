"""Training of a tokenizer on images."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from mvar_core.config import Machine, RunConfig
from mvar_core.config.presets import load_config
from mvar_core.data.images import ImageRows, ImageSource, RandomCrops, Views, open_images
from mvar_core.distributed import World, connect
from mvar_core.errors import ConfigError
from mvar_core.io.files import sha256_of_file
from mvar_core.models import official
from mvar_core.models.directory import load_tokenizer, read_model_config, tokenizer_hash
from mvar_core.models.vqvae import VQVAE
from mvar_core.progress import Progress
from mvar_core.pyramid import PatchSize
from mvar_core.runtime import resolve_device, resolve_dtype
from mvar_core.training import tokenizer as training
from mvar_core.training.perceptual import load_perceptual_loss
from mvar_core.workflows import recipes
from mvar_core.workflows.runs import (
    TrainingResult,
    TrainTokenizerOptions,
    ended,
    held_out,
    planned,
    run_directory,
    seeded,
    step_progress,
)

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerResult(TrainingResult):
    """How the training of a tokenizer ended; also what `mvar_core.workflows.runs.TrainingResult` says.

    `psnr` is in dB, on the data's test images where it has some; nan where the run was interrupted. Usage is the
    fraction of the codebook that some scale, and that each scale uses.
    """

    psnr: float = float("nan")
    code_usage: float = float("nan")
    usage_per_scale: tuple[float, ...] = ()


def train_tokenizer(
    *,
    data: Path | str | ImageSource,
    out: Path | str,
    image_size: PatchSize | str | None = None,
    start: Path | str | None = None,
    new_codebook: bool = False,
    vgg_weights: Path | str | None = None,
    lpips_weights: Path | str | None = None,
    machine: Machine = Machine(),
    progress: Progress | None = None,
    **options: Unpack[TrainTokenizerOptions],
) -> TrainTokenizerResult:
    """Train a multi-scale residual VQVAE on images.

    Running it again in the same `out` resumes. Under torchrun the processes share every batch.

        tok = mvar.train_tokenizer(data="digits", out="runs/tok", preset="digits", steps=200)

    Args:
        data: `digits`, `photographs`, a folder of images, tar shards, or parquet or arrow files.
        out: The run directory, which is also a model directory.
        image_size: Side, or (height, width), also as "256x384"; the pyramid follows. Without a preset it is by default
            that of the images where they all have one of at most 128 px, else 64, or 32 where most are smaller.
        start: Tokenizer that gives the first weights: a model directory or a published .pth file.
        new_codebook: With `start`: train a codebook from scratch, of any size.
        vgg_weights: File of VGG16, for the perceptual loss.
        lpips_weights: File of LPIPS' weights, likewise.
        machine: Device and dtype; dtype auto is float32.
        progress: Called after every step.
        **options: preset, without which width, codebook and steps suit the number of images; settings, seed, resume,
            overwrite and dry_run as of `train`; steps, batch_size, micro_batch, ema and checkpoint_every as in the
            preset's `train_tokenizer` section.

    Raises:
        MvarError: Configuration, images, files or the run in `out` do not fit.
    """
    if new_codebook and start is None:
        raise ConfigError("--new-codebook goes with --start.", "Without --start the codebook is new anyway.")
    loop: dict[str, Any] = dict(options)
    preset, settings, seed = (loop.pop(name, None) for name in ("preset", "settings", "seed"))
    resume, overwrite, dry_run = (loop.pop(name, name == "resume") for name in ("resume", "overwrite", "dry_run"))
    data = data if isinstance(data, ImageSource) else str(data)
    out, settings = Path(out), list(settings or ())
    source, suited, why = open_images(data, max_pixels=machine.max_pixels), list[str](), "as set"
    start, vgg, lpips = (None if path is None else Path(path) for path in (start, vgg_weights, lpips_weights))
    if preset is None and resume and not overwrite and (out / "config.yaml").is_file():
        preset = str(out / "config.yaml")  # a run that was begun continues as it began
    elif preset is None:
        suited, why = recipes.tokenizer_settings(source, image_size, settings)
    settings = [*suited, *settings]
    flags = {"seed": seed, "image_size": image_size, "train_tokenizer": loop}
    config = load_config(preset or "tokenizer-64", settings, flags).model_copy(update={"transformer": None})
    chosen, network = config.train_tokenizer, config.tokenizer
    plan = [
        f"train {chosen.steps} steps of {chosen.batch_size} of {len(source)} images at {config.image_shape[0]}×"
        f"{config.image_shape[1]} pixels ({why}): {network.base_channels} channels, {network.codebook_size} codes,"
        f" scales {config.pyramid}"
    ]
    if start is not None:
        plan.insert(0, f"start from the tokenizer of {start}{' with a new codebook' if new_codebook else ''}")
    if dry_run:
        return planned(TrainTokenizerResult, config, machine, out, chosen.steps, plan, images=len(source))
    with connect(machine.device) as world:
        own = machine.model_copy(update={"device": world.device(machine.device)})
        with run_directory(out, world, resume, overwrite) as resume:
            source.check()
            if suited:
                logger.info("To %s.", "; ".join(plan))
            return train_on_images(
                config, data, out, machine=own, world=world, resume=resume, start=start, new_codebook=new_codebook,
                vgg=vgg, lpips=lpips, progress=progress,
            )  # fmt: skip


def train_on_images(
    config: RunConfig,
    data: str | ImageSource,
    out: Path,
    *,
    machine: Machine = Machine(),
    world: World | None = None,
    resume: bool = True,
    start: Path | None = None,
    new_codebook: bool = False,
    vgg: Path | None = None,
    lpips: Path | None = None,
    progress: Progress | None = None,
) -> TrainTokenizerResult:
    """Train a tokenizer with a configuration that is complete; `train_tokenizer` and `quickstart` use it.

    First weights are those of `start`, a model directory or a published .pth file, without its codebook where
    `new_codebook` is set; `vgg` and `lpips` are files of the perceptual loss.
    """
    source = open_images(data, max_pixels=machine.max_pixels)
    test = held_out(source)
    device = resolve_device(machine.device)
    vqvae: VQVAE = seeded(lambda: VQVAE(config.tokenizer, config.pyramid), "tokenizer", config.seed)
    origins: dict[str, Any] = {}
    provenance: dict[str, Any] = {"data": str(data), "images": len(source)}
    if start is not None:
        provenance["start"] = str(start)
        digest = load_start(vqvae, config, start, new_codebook, machine.verify)
        origins["start"] = {"tokenizer": digest, "new_codebook": new_codebook}
    perceptual = None
    if config.train_tokenizer.perceptual.weight:
        perceptual, origins["perceptual"] = load_perceptual_loss(vgg, lpips)
    outcome, measures = training.train_tokenizer(
        vqvae,
        training_images(source, config),
        config,
        out,
        device=device,
        dtype=resolve_dtype("float32" if machine.dtype == "auto" else machine.dtype, device),
        resume=resume,
        validation=ImagesAlone(ImageRows(test, config.image_shape)) if test else None,
        provenance=provenance,
        on_step=step_progress(progress, "tokenizer"),
        perceptual=perceptual,
        started_from=origins,
        keep_codebook=start is not None and not new_codebook,
    )
    return TrainTokenizerResult(
        **ended(outcome, out, config.train_tokenizer.batch_size, device, world.world_size if world is not None else 1),
        psnr=measures.psnr,
        code_usage=measures.code_usage,
        usage_per_scale=measures.usage_per_scale,
    )


class ImagesAlone:
    """Images without their labels, which a tokenizer's training does not need."""

    def __init__(self, rows: ImageRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: np.ndarray, step: int = 0) -> Tensor:
        """The images of some rows; the same at every step."""
        return self.rows.batch(rows)[0]


def training_images(source: ImageSource, config: RunConfig) -> training.ImageBatchSource:
    """The images of a source as the configuration specifies them: views of the centre crops, or random crops."""
    if config.data.crop == "random":
        return RandomCrops(source, config.image_shape, config.data, config.seed)
    return ImagesAlone(ImageRows(source, config.image_shape, Views(config.data, config.seed)))


def load_start(vqvae: VQVAE, config: RunConfig, start: Path, new_codebook: bool, verify: bool = True) -> str:
    """Load the weights of another tokenizer, which may have another pyramid and image size; returns their SHA-256.

    ConfigError where the networks differ, or the codebooks without `new_codebook`.
    """
    if start.is_file():
        converted = official.convert(None, start)
        source, state = converted.config, dict(converted.tokenizer)
    else:
        source = read_model_config(start)
        state = dict(load_tokenizer(start, source, verify=verify).state_dict())
    theirs, ours = source.tokenizer.model_dump(), config.tokenizer.model_dump()
    differing = [name for name in ours if ours[name] != theirs[name] and name != "codebook_size"]
    if differing:
        shown = ", ".join(f"{name} is {theirs[name]} there and {ours[name]} here" for name in differing[:4])
        values = {name: json.dumps(theirs[name], separators=(",", ":")) for name in differing[:4]}
        changes = " ".join(f"--set tokenizer.{name}={value}" for name, value in values.items())
        raise ConfigError(f"The tokenizer of {start} is another network: {shown}.", f"Use its sizes: {changes}")
    if ours["codebook_size"] != theirs["codebook_size"] and not new_codebook:
        raise ConfigError(
            f"The codebook of {start} has {theirs['codebook_size']} entries; this one has {ours['codebook_size']}.",
            f"Add --new-codebook to train a new one, or --set tokenizer.codebook_size={theirs['codebook_size']}.",
        )
    if new_codebook:
        state = {**state, "quantizer.codebook": vqvae.quantizer.codebook.detach()}
    vqvae.load_state_dict(state)
    kept = "a new codebook" if new_codebook else "its codebook"
    sizes = "" if source.pyramid == config.pyramid else f"; its scales were {source.pyramid}, here {config.pyramid}"
    logger.info("Starting from the tokenizer of %s with %s%s.", start, kept, sizes)
    return sha256_of_file(start) if start.is_file() else tokenizer_hash(start)
