"""The steps that the training commands and the quickstart share: each takes what it needs and reports to a console."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mvar_cli.launch import Worker
from mvar_cli.old_console import Console, Progress, format_bytes, format_count
from mvar_core.config import ModelConfig, RunConfig
from mvar_core.data.images import ImageSource, open_images, split_name
from mvar_core.data.tokens import TokenCache
from mvar_core.errors import ConfigError, DataError
from mvar_core.io.files import require_new_directory, write_json
from mvar_core.models.directory import load_tokenizer, read_model_config, tokenizer_hash
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import ScalePyramid
from mvar_core.runtime import generator, resolve_device, resolve_dtype
from mvar_core.training.finetune import Classes, describe_reports, load_pretrained
from mvar_core.training.loop import TrainResult, train_transformer
from mvar_core.training.objective import PICTURES, OnSample
from mvar_core.training.record import StepReport

_PICTURED_CLASSES = 8
START_REPORT = "started-from.json"
RUN_FILES = ("config.yaml", "checkpoints", "tokens", START_REPORT)
"""Any of these in a directory says that a run was begun there."""


def prepare_run(out: Path, resume: bool, overwrite: bool) -> bool:
    """Whether a run in `out` goes on from what is there, after checking that it may.

    Raises:
        DataError: `out` holds something that is not a run, or a run that is neither resumed nor overwritten.
    """
    if overwrite:
        require_new_directory(out, overwrite=True)
        return False
    if resume and any((out / name).exists() for name in RUN_FILES):
        return True
    require_new_directory(out, overwrite=False)
    return True


def held_out(data: str) -> ImageSource | None:
    """The test images of a data set, where it has some of its own."""
    name, split = split_name(data)
    if split != "train":
        return None
    try:
        return open_images(name, "test")
    except DataError:
        return None


def seeded(build: Callable[[], torch.nn.Module], *seed: int | str) -> Any:
    """A module whose first weights depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*seed).initial_seed())
        return build()


def step_display(progress: Progress) -> Callable[[StepReport], None]:
    """Show training steps on a progress bar."""

    def show(report: StepReport) -> None:
        note = (
            f"loss {report.loss:.4g}, {format_count(report.images_per_second)} images/s,"
            f" {format_count(report.tokens_per_second)} tokens/s, {format_bytes(report.peak_memory_bytes)}"
        )
        progress(report.step, report.total_steps, note + (f", {report.skipped} skipped" if report.skipped else ""))

    return show


def fit_to_tokens(config: RunConfig, tokenizer: ModelConfig, class_names: tuple[str, ...]) -> RunConfig:
    """The configuration of a model for this tokenizer and these classes.

    Raises:
        ConfigError: The tokenizer does not fit the preset's image size and pyramid.
    """
    if config.transformer is None:
        raise ConfigError(f"{config.name} is a tokenizer's preset; training needs a transformer section.")
    transformer = config.transformer.model_copy(update={"num_classes": len(class_names)})
    update = {"tokenizer": tokenizer.tokenizer, "transformer": transformer, "class_names": class_names}
    latent, downsample = config.pyramid.latent_grid, tokenizer.tokenizer.downsample
    if (latent.height * downsample, latent.width * downsample) != config.image_shape:
        raise ConfigError(
            f"The tokenizer makes one token of {downsample}×{downsample} pixels; {config.name} has {latent} tokens for"
            f" {config.image_shape[0]}×{config.image_shape[1]} pixels.",
            "Choose the preset that the tokenizer was trained with, or set image_size and patch_sizes to fit.",
        )
    top_k = min(config.sampling.top_k, tokenizer.tokenizer.codebook_size)
    return config.model_copy(update={**update, "sampling": config.sampling.model_copy(update={"top_k": top_k})})


def train_run(
    console: Console,
    config: RunConfig,
    tokens: TokenCache,
    checkpoint: Path,
    out: Path,
    *,
    device: str,
    dtype: str,
    attention: str,
    resume: bool,
    fsdp: bool = False,
    validation: TokenCache | None = None,
    start: Start | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train a transformer on a token cache.

    Args:
        console: Where to report.
        config: From `fit_to_tokens`.
        tokens: The token cache.
        checkpoint: Model directory with the tokenizer that made it.
        out: The run directory.
        device: Where to compute.
        dtype: What autocast computes in.
        attention: Attention backend.
        resume: Go on from a checkpoint in `out`.
        fsdp: Slice the model over the processes.
        validation: Held-out tokens.
        start: What gives the first weights.
        provenance: Further facts for config.json.

    Raises:
        MvarError: Tokens, tokenizer, weights or checkpoint do not fit.
    """
    config = _naming_the_encoder(config, tokens)
    digest = tokenizer_hash(checkpoint)
    for cache in (tokens, validation):
        if cache is not None:
            cache.check(digest, config.pyramid)
    target = resolve_device(device)
    model = config.model
    tokenizer = load_tokenizer(checkpoint, model, target)
    transformer: Transformer = seeded(lambda: Transformer(model), "transformer", config.seed)
    if start is not None:
        _load_start(console, transformer, config, start, out)
    with console.progress("training", "steps") as progress:
        return train_transformer(
            transformer,
            tokenizer.quantizer,
            tokens.conditioned(config.conditioning),
            config,
            out,
            device=target,
            dtype=resolve_dtype(dtype, target),
            attention=attention,
            resume=resume,
            fsdp=fsdp,
            validation=validation.conditioned(config.conditioning) if validation is not None else None,
            tokenizer_state=tokenizer.state_dict(),
            provenance={"data": tokens.manifest.source, "images": tokens.num_images, **(provenance or {})},
            on_step=step_display(progress),
            on_sample=sample_pictures(config, tokenizer, transformer, out) if config.train.sample_every else None,
        )


def _naming_the_encoder(config: RunConfig, tokens: TokenCache) -> RunConfig:
    """The configuration, which says what made the tokens' vectors, so that one knows what to sample by."""
    vectors, conditioning = tokens.manifest.vectors, config.conditioning
    if conditioning.dim is None or vectors is None or conditioning.encoder is not None:
        return config
    named = conditioning.model_copy(update={"encoder": vectors.encoder})
    return config.model_copy(update={"conditioning": named})


def sample_pictures(config: RunConfig, tokenizer: VQVAE, transformer: Transformer, out: Path) -> OnSample:
    """Draw the same few samples with the model as it is, write them under `out`/samples, and return them as a grid.

    Two samples, one below the other, of up to eight classes that are spread over all of them.
    """
    classes = config.transformer.num_classes if config.transformer is not None else 1
    labels = sorted({round(place) for place in np.linspace(0, classes - 1, _PICTURED_CLASSES)})

    def draw(step: int) -> np.ndarray:
        from mvar_core.io.pictures import make_grid, save_png
        from mvar_core.pipeline import Pipeline
        from mvar_core.sampling.conditions import by_labels

        pipeline = Pipeline(config.model, tokenizer, transformer)
        drawn = pipeline.sample(**by_labels(config, labels * 2), seed=config.seed)
        grid = make_grid(drawn.images, columns=len(labels))
        save_png(grid, out / PICTURES / f"step-{step:08d}.png")
        return grid

    return draw


@dataclass(frozen=True)
class Start:
    """What gives a transformer its first weights.

    Attributes:
        directory: A model directory.
        file: The published file that it was made from.
        classes: What becomes of the class table (mvar_core.training.finetune.Classes).
    """

    directory: Path
    file: Path | None = None
    classes: str = "auto"


def _load_start(console: Console, transformer: Transformer, config: ModelConfig, start: Start, out: Path) -> None:
    """Take the weights over; say what became of each, in a table and in a file of the run."""
    from mvar_core.models import official
    from mvar_core.models.directory import load_transformer

    source = read_model_config(start.directory)
    weights = load_transformer(start.directory, source).state_dict()
    reports = load_pretrained(
        transformer,
        weights,
        ScalePyramid(source.pyramid.grids),
        classes=cast("Classes", start.classes),
        source_names=source.class_names,
        target_names=config.class_names,
    )
    ignored = [name for name in official.read_official(start.file) if official.is_buffer(name)] if start.file else []
    origin = start.file or start.directory
    if Worker.here().rank == 0:
        write_json(out / START_REPORT, describe_reports(str(origin), reports, ignored))
    changed = [report for report in reports if report.action != "loaded"]
    console.note(f"{origin}: {len(reports) - len(changed)} of {len(reports)} parameters loaded as they are.")
    for report in changed:
        console.note(f"  {report.name}: {report.action}, {report.note}")
    numbers = {name: tensor.numel() for name, tensor in transformer.state_dict().items()}
    rows = []
    for action in ("loaded", "resized", "interpolated", "initialised"):
        names = [report.name for report in reports if report.action == action]
        if names:
            rows.append((action, len(names), format_count(sum(numbers[name] for name in names))))
    rows += [("ignored", len(ignored), "masks and the like, which follow from the configuration")] if ignored else []
    console.table(f"weights of {origin}", ("what became of them", "tensors", "numbers"), rows)
    console.say(f"Each of them: {out / START_REPORT}")
