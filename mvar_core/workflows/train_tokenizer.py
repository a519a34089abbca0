"""Training of a tokenizer on images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine, ModelConfig, RunConfig
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
from mvar_core.results import DryRun, Result
from mvar_core.runtime import peak_memory_bytes, resolve_device, resolve_dtype
from mvar_core.training import tokenizer as training
from mvar_core.training.perceptual import load_perceptual_loss
from mvar_core.workflows.runs import (
    TokenizerLoopSettings,
    held_out,
    prepare_run,
    seeded,
    step_progress,
)

DEFAULT_PRESET = "tokenizer-64"

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerResult(Result):
    """How the training of a tokenizer ended.

    Attributes:
        steps: Steps done.
        loss: Training loss, averaged over the last line of metrics.jsonl.
        model: The run directory, which is also a model directory without a transformer.
        seconds: Time spent, over all sessions of the run.
        images_per_second: Throughput over that time.
        peak_memory_bytes: Highest memory of this process.
        psnr: In dB, on the data's test images where it has some; nan where the run was interrupted.
        code_usage: Fraction of the codebook that some scale uses.
        usage_per_scale: Fraction of the codebook that each scale uses.
        interrupted: Whether Ctrl-C or SIGTERM ended it early; the same call resumes it.
        processes: How many processes shared the work.
    """

    steps: int
    loss: float
    model: Path
    seconds: float
    images_per_second: float = 0.0
    peak_memory_bytes: int = 0
    psnr: float = float("nan")
    code_usage: float = float("nan")
    usage_per_scale: tuple[float, ...] = ()
    interrupted: bool = False
    processes: int = 1


@dataclass(frozen=True)
class TokenizerFiles:
    """Files that the training of a tokenizer may read next to its images.

    Attributes:
        start: A model directory, or a published .pth file, whose tokenizer gives the first weights.
        new_codebook: Do not copy its codebook, which may then have another size.
        vgg: Weights of the perceptual loss's network.
        lpips: Weights of the perceptual loss itself.
    """

    start: Path | None = None
    new_codebook: bool = False
    vgg: Path | None = None
    lpips: Path | None = None


def train_tokenizer(
    *,
    data: Path | str,
    out: Path | str,
    preset: str | None = None,
    settings: Sequence[str] = (),
    image_size: PatchSize | str | None = None,
    seed: int | None = None,
    start: Path | str | None = None,
    new_codebook: bool = False,
    vgg_weights: Path | str | None = None,
    lpips_weights: Path | str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
    **loop: Unpack[TokenizerLoopSettings],
) -> TrainTokenizerResult:
    """Train a multi-scale residual VQVAE on images.

    Running it again in the same `out` resumes. Under torchrun the processes share every batch.

        tok = mvar.train_tokenizer(data="digits", out="runs/tok", preset="digits", steps=200)

    Args:
        data: `digits`, `photographs`, a folder of images, tar shards, or parquet or arrow files.
        out: The run directory, which is also a model directory.
        preset: Name of a preset or a YAML file; by default tokenizer-64.
        settings: Changes to single keys, as "tokenizer.codebook_size=256".
        image_size: Side, or (height, width), also as "256x384"; the pyramid follows.
        seed: Of everything random.
        start: Tokenizer that gives the first weights: a model directory or a published .pth file.
        new_codebook: With `start`: train a codebook from scratch, of any size.
        vgg_weights: File of VGG16, for the perceptual loss.
        lpips_weights: File of LPIPS' weights, likewise.
        resume: Whether to resume what is in `out`; otherwise a run there is refused.
        overwrite: Start over where a run is in `out`.
        dry_run: Report what would be done, and do nothing.
        machine: Device and dtype; dtype auto is float32.
        progress: Called after every step.
        **loop: steps, batch_size, micro_batch, ema and checkpoint_every, as in the preset's `train_tokenizer` section.

    Raises:
        MvarError: Configuration, images, files or the run in `out` do not fit.
    """
    if new_codebook and start is None:
        raise ConfigError("--new-codebook goes with --start.", "Without --start the codebook is new anyway.")
    flags = {"seed": seed, "image_size": image_size, "train_tokenizer": dict(loop)}
    config = load_config(preset or DEFAULT_PRESET, settings, flags).model_copy(update={"transformer": None})
    data, out = str(data), Path(out)
    files = TokenizerFiles(_path(start), new_codebook, _path(vgg_weights), _path(lpips_weights))
    source = open_images(data)
    if dry_run:
        return _plan(config, source, out, files, machine)
    with connect(machine.device) as world:
        own = machine.model_copy(update={"device": world.device(machine.device)})
        resume = world.run_on_rank_zero(lambda: prepare_run(out, resume, overwrite))
        source.check()
        return train_on_images(
            config, data, out, machine=own, world=world, resume=resume, files=files, progress=progress
        )


def train_on_images(
    config: RunConfig,
    data: str,
    out: Path,
    *,
    machine: Machine = Machine(),
    world: World | None = None,
    resume: bool = True,
    files: TokenizerFiles | None = None,
    progress: Progress | None = None,
) -> TrainTokenizerResult:
    """Train a tokenizer with a configuration that is ready; `train_tokenizer` and what does more stand on this.

    Args:
        config: The configuration; its `train_tokenizer` section specifies the training.
        data: Names the images.
        out: The run directory.
        machine: This process's device and dtype.
        world: The processes.
        resume: Resume from a checkpoint in `out`.
        files: First weights, and those of the perceptual loss.
        progress: Called after every step.

    Raises:
        MvarError: Images, configuration, files or checkpoint do not fit.
    """
    files = files or TokenizerFiles()
    source, test = open_images(data), held_out(data)
    device = resolve_device(machine.device)
    vqvae: VQVAE = seeded(lambda: VQVAE(config.tokenizer, config.pyramid), "tokenizer", config.seed)
    origins: dict[str, Any] = {}
    provenance: dict[str, Any] = {"data": data, "images": len(source)}
    if files.start is not None:
        digest = load_start(vqvae, config, files.start, files.new_codebook)
        provenance["start"] = str(files.start)
        origins["start"] = {"tokenizer": digest, "new_codebook": files.new_codebook}
    perceptual = None
    if config.train_tokenizer.perceptual.weight:
        perceptual, origins["perceptual"] = load_perceptual_loss(files.vgg, files.lpips)
    outcome = training.train_tokenizer(
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
        keep_codebook=files.start is not None and not files.new_codebook,
    )
    return TrainTokenizerResult(
        steps=outcome.steps,
        loss=outcome.loss,
        model=out,
        seconds=outcome.seconds,
        images_per_second=outcome.steps * config.train_tokenizer.batch_size / max(outcome.seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(device),
        psnr=outcome.psnr,
        code_usage=outcome.code_usage,
        usage_per_scale=outcome.usage_per_scale,
        interrupted=outcome.interrupted,
        processes=world.world_size if world is not None else 1,
    )


class ImagesAlone:
    """Images without their labels, which the training of a tokenizer has no use for."""

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


def load_start(vqvae: VQVAE, config: RunConfig, start: Path, new_codebook: bool) -> str:
    """Fill a tokenizer with the weights of another one, which may have another pyramid and image size.

    Args:
        vqvae: Is filled.
        config: What `vqvae` was built from.
        start: A model directory or a published .pth file.
        new_codebook: Leave the codebook as it is.

    Returns:
        SHA-256 of the weights.

    Raises:
        ConfigError: The networks differ, or the codebooks do and `new_codebook` is not set.
        CheckpointError: The file or directory cannot be read.
    """
    source, state = _read_start(start)
    theirs, ours = source.tokenizer.model_dump(), config.tokenizer.model_dump()
    differing = [name for name in ours if ours[name] != theirs[name] and name != "codebook_size"]
    if differing:
        shown = ", ".join(f"{name} is {theirs[name]} there and {ours[name]} here" for name in differing[:4])
        changes = " ".join(f"--set tokenizer.{name}={_as_setting(theirs[name])}" for name in differing[:4])
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


def _read_start(start: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights of the tokenizer in a model directory or a published .pth file."""
    if start.is_file():
        converted = official.convert(None, start)
        return converted.config, dict(converted.tokenizer)
    source = read_model_config(start)
    return source, dict(load_tokenizer(start, source).state_dict())


def _plan(
    config: RunConfig, source: ImageSource, out: Path, files: TokenizerFiles, machine: Machine
) -> TrainTokenizerResult:
    """What would be done."""
    chosen = config.train_tokenizer
    steps = [f"train {chosen.steps} steps of {chosen.batch_size} of {len(source)} images", f"write {out}"]
    if files.start is not None:
        codebook = " with a new codebook" if files.new_codebook else ""
        steps.insert(0, f"start from the tokenizer of {files.start}{codebook}")
    dry_run = DryRun(
        configuration=config.model_dump(mode="json", exclude_none=True),
        steps=tuple(steps),
        cost=cost_of(config, machine),
        facts={"images": len(source)},
    )
    return TrainTokenizerResult(steps=chosen.steps, loss=float("nan"), model=out, seconds=0.0, dry_run=dry_run)


def _path(value: Path | str | None) -> Path | None:
    return Path(value) if value is not None else None


def _as_setting(value: object) -> str:
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)
