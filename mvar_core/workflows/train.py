"""Training of a VAR or MVAR on a token cache, from scratch or from the weights of a VAR."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from typing_extensions import Unpack

from mvar_core.classes import Classes, align
from mvar_core.config import Machine, ModelConfig, RunConfig
from mvar_core.config.presets import load_config, parse_setting
from mvar_core.config.training import DataConfig
from mvar_core.data.images import Views, open_images
from mvar_core.data.tokens import MANIFEST, PARTIAL, TokenCache
from mvar_core.data.vectors import ENCODER
from mvar_core.distributed import connect, world
from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.io.files import write_json
from mvar_core.io.pixels import make_grid, save_png
from mvar_core.kernels import check_backend
from mvar_core.models import official
from mvar_core.models.directory import load_tokenizer, load_transformer, read_model_config, tokenizer_hash
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress
from mvar_core.pyramid import PatchSize, mvar_windows
from mvar_core.runtime import resolve_device, resolve_dtype
from mvar_core.sampling.conditions import by_labels
from mvar_core.training.finetune import (
    START_REPORT,
    ClassRows,
    check_start,
    describe_reports,
    load_pretrained,
    match_classes,
)
from mvar_core.training.metrics import check_trackers
from mvar_core.training.trainer import PICTURES, Outcome, planned_steps
from mvar_core.training.transformer import train_transformer
from mvar_core.workflows import recipes
from mvar_core.workflows.convert import convert
from mvar_core.workflows.runs import (
    TrainingResult,
    TrainOptions,
    ended,
    planned,
    run_directory,
    seeded,
    step_progress,
)
from mvar_core.workflows.tokenize import write_tokens

FINETUNING_EPOCHS = 80
PICTURED_CLASSES = 8
LISTED_CLASSES = 16
"""Most classes that the command suggested at the end generates images of."""

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class TrainResult(TrainingResult):
    """How the training of a transformer ended; also what `mvar_core.workflows.runs.TrainingResult` says.

    Attributes:
        validation_loss: Loss on the validation tokens, where there are any.
        best_step: The step of the lowest validation loss, whose weights are in `model`/best.
        skipped: Steps that were left out because their loss or gradient was not finite.
        command: What to type next.
        classes: Where it started from other weights: how many classes were matched, new, and dropped.
    """

    validation_loss: float | None = None
    best_step: int | None = None
    skipped: int = 0
    classes: Mapping[str, int] | None = None
    command: str = field(default="", metadata={"hidden": True})


@dataclass(frozen=True)
class Start:
    """The model directory that a transformer starts from, and the published file that it was made of.

    `choice` says what becomes of the class table, and `classes` what that means for these classes.
    """

    directory: Path
    file: Path | None = None
    choice: str = "auto"
    classes: ClassRows | None = None

    @property
    def origin(self) -> str:
        """What the user calls it."""
        return str(self.file or self.directory)


def train(
    *,
    out: Path | str,
    depth: int | None = None,
    image_size: PatchSize | str | None = None,
    machine: Machine = Machine(),
    progress: Progress | None = None,
    **options: Unpack[TrainOptions],
) -> TrainResult:
    """Train a VAR or MVAR from scratch on a token cache, or on images that are tokenized first.

    Running it again in the same `out` resumes, also with another number of processes.

        run = mvar.train(tokens="runs/tokens", out="runs/mvar", depth=4, steps=300)

    Args:
        out: The run directory, which is also a model directory.
        depth: Number of blocks; the width is 64 · depth, with `depth` heads.
        image_size: Side, or (height, width), also as "256x384"; pyramid and windows follow.
        machine: Device, dtype, attention backend, compilation; whether hashes of weights and token shards are compared.
        progress: Called after every step.
        **options:
            tokens: Token cache.
            data: Images, where there is no cache; they are tokenized into `out`/tokens.
            tokenizer: Model directory with the tokenizer; by default the one that made `tokens`.
            preset: Name of a preset or a YAML file, laid over the pyramid, image size and codebook of `tokens`. Without
                one the model is an MVAR whose depth and training suit the number of images.
            settings: Changes to single keys, as "attention.scale_prefixes=2".
            seed: Of everything random.
            validation: Held-out images to measure on, as a token cache or as images, which are tokenized.
            resume: Whether to resume what is in `out` (the default); otherwise a run there is refused.
            overwrite: Start over where a run is in `out`.
            fsdp: Shard the model over the processes.
            dry_run: Report what would be done, and do nothing.
            steps, epochs, batch_size, micro_batch, ema, checkpoint_every, activation_checkpointing: As in the preset's
                `train` section.

    Raises:
        MvarError: Configuration, tokens, tokenizer or the run in `out` do not fit.
    """
    return _train(Path(out), None, machine, progress, depth=depth, image_size=image_size, **options)


def finetune_from_var(
    *,
    out: Path | str,
    var_checkpoint: Path | str,
    scale_prefixes: int | str | None = None,
    windows: int | Sequence[int] | str | None = None,
    classes: str = "auto",
    machine: Machine = Machine(),
    progress: Progress | None = None,
    **options: Unpack[TrainOptions],
) -> TrainResult:
    """Train an MVAR that starts from VAR weights; which token sees which follows from the arguments, never from a file.

    Without a preset, sizes and pyramid are read off the weights, a token sees its own scale alone, windows of 7 are on
    the last two scales (in large pyramids wherever they pay), and training is as published for fine-tuning. For another
    pyramid, from a preset or `settings`, positions are interpolated scale by scale.

        mvar.finetune_from_var(var_checkpoint="var_d16.pth", tokens="runs/tokens", out="runs/ft")

    Args:
        out: The run directory, which is also a model directory.
        var_checkpoint: Model directory, or a published .pth file. The pyramid of a file that is not a published one is
            that of `settings` ("patch_sizes=1,2,3x4").
        scale_prefixes: Scales that a token sees, its own included, or "all".
        windows: One odd number for the windowed scales, one per scale (0 = whole scale), or "auto".
        classes: What each class starts from: "auto" from the same class of the weights, which names decide, and numbers
            only where a side has no names; "by-number" from the class of its number; "new" from scratch.
        machine: Device, dtype, attention backend, compilation; whether hashes of weights and token shards are compared.
        progress: Called after every step.
        **options: As of `train`. `tokenizer` is by default the VAR's own; it may be the published file of it, by
            default the one next to `var_checkpoint`.

    Raises:
        MvarError: As of `train`, or weights that do not fit the configuration.
    """
    checkpoint, given, settings = Path(var_checkpoint), options.get("tokenizer"), options.get("settings", ())
    if options.get("preset") is None and any(text.startswith(("transformer.", "tokenizer.")) for text in settings):
        raise ConfigError("Without a preset, sizes are read off the weights.", "Leave out --set transformer.*.")
    attention = {"scale_prefixes": _number(scale_prefixes), "windows": _number(windows)}
    with ExitStack() as stack:
        start = Start(checkpoint, choice=classes)
        file = Path(given) if given is not None and Path(given).is_file() else None
        if checkpoint.is_file():
            directory = Path(out).parent / f"{Path(out).name}-start"
            if options.get("dry_run"):
                directory = Path(stack.enter_context(TemporaryDirectory())) / "start"
            world = stack.enter_context(connect(machine.device))
            world.run_on_rank_zero(lambda: _convert(checkpoint, file, directory, settings))
            start = Start(directory, checkpoint, classes)
        if given is None or file is not None:
            options["tokenizer"] = start.directory
        return _train(Path(out), start, machine, progress, attention=attention, **options)


def _train(
    out: Path,
    start: Start | None,
    machine: Machine,
    progress: Progress | None,
    *,
    depth: int | None = None,
    image_size: PatchSize | str | None = None,
    attention: Mapping[str, Any] | None = None,
    tokens: Path | str | None = None,
    data: Path | str | None = None,
    tokenizer: Path | str | None = None,
    preset: str | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    validation: Path | str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    fsdp: bool = False,
    dry_run: bool = False,
    **loop: Any,
) -> TrainResult:
    """Merge the configuration, tokenize where images were given, and train; every process does this."""
    if (tokens is None) == (data is None):
        raise ConfigError("Training needs tokens or images.", "Add --tokens CACHE or --data IMAGES, one of them.")
    if loop.get("steps") is not None and loop.get("epochs") is not None:
        raise ConfigError("--steps and --epochs both specify how long to train.", "Use one of them.")
    if preset is None and resume and not overwrite and (out / "config.yaml").is_file():
        preset = str(out / "config.yaml")  # a run that was begun continues as it began, whatever suits its images today
    verify = None if machine.verify else False
    cache = TokenCache.open(Path(tokens), verify) if tokens is not None else None
    directory = _tokenizer_of(cache, tokenizer, data, out)
    if os.path.realpath(out) == os.path.realpath(directory):
        raise DataError(f"--out {out} is the tokenizer's directory.", "Choose another --out.")
    made_by = read_model_config(directory)
    images = cache if cache is not None else open_images(str(data), max_pixels=machine.max_pixels)
    sizes: dict[str, Any] = made_by.model_dump(mode="json", include={"image_size", "patch_sizes", "tokenizer"})
    if cache is not None:
        sizes |= cache.manifest.model_dump(mode="json", include={"image_size", "patch_sizes"})
        # A preset for other sizes is laid over those of the cache, unless sizes are asked for by name.
        if image_size is None and not any(text.startswith(("image_size", "patch_sizes")) for text in settings):
            settings = [*(f"{key}={json.dumps(value)}" for key, value in sizes.items()), *settings]
    count = len(images.labels)
    if start is not None:
        base = _read_off(read_model_config(start.directory), count)
    else:
        base = {**sizes, **recipes.transformer_values(sizes["patch_sizes"], count, len(images) / count, depth)}
        if cache is not None and cache.manifest.vectors is not None:
            base["conditioning"] = {"kind": "vector", "dim": cache.manifest.vectors.dim}
    flags = {
        "seed": seed,
        "image_size": image_size,
        "attention": attention,
        "train": {**loop, "compile": machine.compile or None},
        "transformer": recipes.sized(depth) if depth is not None else None,
    }
    # Steps win over epochs wherever both are set; --epochs must be able to win over a preset's steps.
    settings = [*settings, *(["train.steps=null"] if loop.get("epochs") is not None else [])]
    config = load_config(preset, settings, flags, base=base)
    config = fit_to_tokens(config, made_by, images.class_names)
    if start is not None:
        source = read_model_config(start.directory)
        check_start(config, source, start.origin)
        if source.conditioning.kind == config.conditioning.kind == "class":
            theirs = replace(Classes.of_model(source), origin=start.origin)
            start = replace(start, classes=match_classes(theirs, images.classes, start.choice))
    rows = len(cache) if cache is not None else count * len(Views(config.data, config.seed))
    total, batch = planned_steps(config.train, rows), config.train.batch_size
    plan = [f"encode {count} images in {rows // count} views into {out / 'tokens'}"] if cache is None else []
    if start is not None:
        how = f": {start.classes.note()}" if start.classes is not None else ""
        plan.append(f"start from the transformer of {start.origin}{how}")
    assert config.transformer is not None
    plan.append(
        f"train {total} steps of {batch} of {rows} rows ({total * batch / max(rows, 1):.3g} epochs of {count} images):"
        f" depth {config.transformer.depth}, width {config.transformer.embed_dim}, scales {config.pyramid} for"
        f" {config.image_shape[0]}×{config.image_shape[1]} pixels"
    )
    if dry_run:
        return planned(TrainResult, config, machine, out, total, plan, steps=total, rows=rows)
    with connect(machine.device) as world:
        machine = machine.model_copy(update={"device": world.device(machine.device)})
        device = resolve_device(machine.device)
        dtype = resolve_dtype(machine.dtype, device)
        check_trackers(config.train)
        check_backend(machine.attention, config.patterns, device, dtype, needs_grad=True)
        with run_directory(out, world, resume, overwrite) as resume:
            if preset is None:
                logger.info("To %s (as suits the number of images, unless set).", "; ".join(plan))

            def encode(name: str, data: str, config: RunConfig) -> TokenCache:
                """The tokens of images, which are written into the run directory."""
                write_tokens(
                    out / name,
                    data=data,
                    tokenizer=directory,
                    config=config,
                    overwrite=overwrite,
                    machine=machine.model_copy(update={"dtype": "auto"}),
                    progress=progress,
                )
                return TokenCache.open(out / name)

            cache = cache if cache is not None else encode("tokens", str(data), config)
            held_out = None
            if validation is not None and any((Path(validation) / name).exists() for name in (MANIFEST, PARTIAL)):
                held_out = TokenCache.open(Path(validation), verify)
            elif validation is not None:
                held_out = encode("validation", str(validation), config.model_copy(update={"data": DataConfig()}))
            outcome = train_on_tokens(
                config,
                cache,
                directory,
                out,
                machine=machine,
                resume=resume,
                fsdp=fsdp,
                validation=held_out,
                start=start,
                progress=progress,
            )
    return TrainResult(
        **ended(outcome, out, config.train.batch_size, device, world.world_size),
        validation_loss=outcome.val_loss,
        best_step=outcome.best_step,
        skipped=outcome.skipped,
        classes=None if start is None or start.classes is None else start.classes.counts(),
        command=sample_command(out, config),
    )


def sample_command(model: Path, config: ModelConfig) -> str:
    """A command that shows what a model generates."""
    names = config.class_names or ()
    chosen = ["--class", "all" if len(names) <= LISTED_CLASSES else "#0,#1,#2,#3"]
    if config.conditioning.dim is not None:
        chosen = ["--words", names[0]] if names and config.conditioning.encoder == ENCODER else ["--vectors", "FILE"]
    out = ["--num", "4", "--out", str(model / "grid.png")]
    return shlex.join(["mvar", "sample", "--checkpoint", str(model), *chosen, *out])


def train_on_tokens(
    config: RunConfig,
    tokens: TokenCache,
    tokenizer: Path,
    out: Path,
    *,
    machine: Machine = Machine(),
    resume: bool = True,
    fsdp: bool = False,
    validation: TokenCache | None = None,
    start: Start | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stage: str = "training",
) -> Outcome:
    """Train a transformer with a configuration that is complete; `train`, `ablate` and `quickstart` use it.

    The configuration is from `fit_to_tokens`, `tokenizer` is a model directory, `provenance` holds further facts for
    config.json, and `stage` is what `progress` calls the training.
    """
    vectors, conditioning = tokens.manifest.vectors, config.conditioning
    if conditioning.dim is not None and vectors is not None and conditioning.encoder is None:
        # What made the tokens' vectors is recorded, so that one knows what to sample with.
        named = conditioning.model_copy(update={"encoder": vectors.encoder})
        config = config.model_copy(update={"conditioning": named})
    if validation is not None and conditioning.dim is None:
        used, hint = np.unique(validation.labels).tolist(), "Use --validation of the same classes, or leave it out."
        validation.labels = align(validation.classes, tokens.classes, used=used, hint=hint)[0][validation.labels]
    digest = tokenizer_hash(tokenizer)
    for cache in (tokens, validation):
        if cache is not None:
            cache.check(digest, config.pyramid, str(tokenizer))
    device = resolve_device(machine.device)
    vqvae = load_tokenizer(tokenizer, config.model, device, verify=machine.verify)
    transformer: Transformer = seeded(lambda: Transformer(config.model), "transformer", config.seed)
    facts = {"data": tokens.manifest.source, "images": tokens.num_images, **(provenance or {})}
    if start is not None:
        _load_start(transformer, config, start, out, machine.verify)
        facts["started_from"] = start.origin
    outcome = train_transformer(
        transformer,
        vqvae,
        tokens.conditioned(config.conditioning),
        config,
        out,
        device=device,
        dtype=resolve_dtype(machine.dtype, device),
        attention=machine.attention,
        resume=resume,
        fsdp=fsdp,
        validation=validation.conditioned(config.conditioning) if validation is not None else None,
        provenance=facts,
        on_step=step_progress(progress, stage),
        on_sample=_sample_pictures(config, vqvae, transformer, out) if config.train.sample_every else None,
    )
    for cache in (tokens, validation):
        if cache is not None and not outcome.interrupted:
            cache.verify()  # a short training ends before all hashes are compared
    return outcome


def fit_to_tokens(config: RunConfig, tokenizer: ModelConfig, class_names: tuple[str, ...]) -> RunConfig:
    """The configuration of a model for a tokenizer and classes; ConfigError where the tokenizer does not fit."""
    if config.transformer is None:
        raise ConfigError(f"{config.name} is a tokenizer's preset; training needs a transformer section.")
    latent, downsample = config.pyramid.latent_grid, tokenizer.tokenizer.downsample
    if (latent.height * downsample, latent.width * downsample) != config.image_shape:
        raise ConfigError(
            f"The tokenizer makes one token of {downsample}×{downsample} pixels; {config.name} has {latent} tokens for"
            f" {config.image_shape[0]}×{config.image_shape[1]} pixels.",
            "Choose the preset that the tokenizer was trained with, or set image_size and patch_sizes to fit.",
        )
    top_k = min(config.sampling.top_k, tokenizer.tokenizer.codebook_size)
    return config.model_copy(
        update={
            "tokenizer": tokenizer.tokenizer,
            "transformer": config.transformer.model_copy(update={"num_classes": len(class_names)}),
            "class_names": class_names,
            "result": None,  # what a preset's source reports is of other weights
            "sampling": config.sampling.model_copy(update={"top_k": top_k}),
        }
    )


def _tokenizer_of(cache: TokenCache | None, given: Path | str | None, data: Path | str | None, out: Path) -> Path:
    """The tokenizer's directory: the one that was given, or the one that the cache remembers."""
    if given is not None:
        return Path(given)
    if cache is None:
        made = out.parent / "tokenizer"
        command = shlex.join(["mvar", "train-tokenizer", "--data", str(data), "--out", str(made)])
        raise ConfigError(
            "Training on images needs a tokenizer.",
            f"Train one with `{command}`, then add {shlex.join(['--tokenizer', str(made)])}.",
        )
    if cache.manifest.tokenizer is None:
        raise ConfigError(f"{cache.path} does not record where its tokenizer is.", "Add --tokenizer DIR.")
    recorded, place = Path(cache.manifest.tokenizer), cache.path.resolve()
    # As it was typed, from here or from a folder above the cache; or next to the cache, where both were moved.
    candidates = [recorded, *(parent / recorded for parent in place.parents), place.parent / recorded.name]
    found = next((path for path in candidates if (path / "config.json").is_file()), None)
    if found is None:
        raise ConfigError(
            f"{cache.path} was made by the tokenizer in {recorded}, which is not there.",
            "Add --tokenizer DIR, where it is now.",
        )
    return found


def _read_off(source: ModelConfig, images: int) -> dict[str, Any]:
    """The start's model with MVAR's attention, and the published settings of fine-tuning, its batch for many images."""
    batch = {} if images > recipes.MANY else {"batch_size": recipes.recipe_for(images).batch}
    return {
        **source.model_dump(mode="json", exclude={"provenance", "class_names", "attention"}),
        "name": f"{source.name}-ft",
        "attention": {"scale_prefixes": 1, "windows": list(mvar_windows(source.pyramid))},
        "train": {"epochs": FINETUNING_EPOCHS, **batch},
    }


def _number(value: int | Sequence[int] | str | None) -> Any:
    """A number, or a comma list of them, that was given as text."""
    if not isinstance(value, str) or not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", value, re.ASCII):
        return value
    numbers = [int(number) for number in value.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def _sample_pictures(
    config: RunConfig, tokenizer: VQVAE, transformer: Transformer, out: Path
) -> Callable[[int], np.ndarray]:
    """Generate the same few samples with the model as it is: two each of up to eight classes, as one grid."""
    classes = config.transformer.num_classes if config.transformer is not None else 1
    labels = sorted({round(place) for place in np.linspace(0, classes - 1, PICTURED_CLASSES)})

    def sample(step: int) -> np.ndarray:
        pipeline = Pipeline(config.model, tokenizer, transformer)
        samples = pipeline.sample(**by_labels(config, labels * 2), seed=config.seed)
        grid = make_grid(samples.images, columns=len(labels))
        save_png(grid, out / PICTURES / f"step-{step:08d}.png")
        return grid

    return sample


def _convert(file: Path, tokenizer: Path | None, directory: Path, settings: Sequence[str]) -> None:
    """Convert a published file to a model directory, once; a resumed run does not convert it again."""
    if not (directory / "config.json").is_file():
        sizes = dict(map(parse_setting, settings)).get(("patch_sizes",))
        # Whatever attention the file is of: here it follows from the configuration.
        whole: dict[str, Any] = {"scale_prefixes": "all", "windows": 0}
        convert(model=file, tokenizer=tokenizer, out=directory, kind="var", pyramid=sizes, **whole)
    made_from = read_model_config(directory).provenance.get("source")
    if made_from != file.name:
        raise CheckpointError(
            f"{directory} was made from {made_from}, not from {file.name}.", "Remove it, or choose another --out."
        )


def _load_start(transformer: Transformer, config: ModelConfig, start: Start, out: Path, verify: bool) -> None:
    """Load the first weights; what became of each is logged, and written to a file of the run."""
    source = read_model_config(start.directory)
    reports = load_pretrained(
        transformer,
        load_transformer(start.directory, source, verify=verify).state_dict(),
        source.pyramid,
        classes=start.classes,
    )
    state = official.read_official(start.file, "transformer", checksums=False) if start.file else {}
    ignored = list(filter(official.is_buffer, state))
    if world().is_rank_zero:
        write_json(out / START_REPORT, describe_reports(start.origin, reports, ignored))
    counts = Counter(report.action for report in reports)
    logger.info("%s: %d of %d parameters loaded as they are.", start.origin, counts["loaded"], len(reports))
    if start.classes is not None and start.classes.by == "number":
        logger.warning("Classes are matched by number, not by name: %s.", start.classes.note())
    for report in reports:
        if report.action != "loaded":
            logger.info("  %s: %s, %s", report.name, report.action, report.note)
    counts["ignored"] = len(ignored)
    listed = ", ".join(f"{count} {action}" for action, count in counts.items() if count)
    logger.info("Weights: %s; %s lists each of them.", listed, out / START_REPORT)
