"""`mvar train`: a VAR or MVAR from scratch; and what `mvar finetune-from-var` shares with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_bytes, format_seconds
from mvar_cli.old_groups import TrainOptions, TransformerLoopOptions
from mvar_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mvar_cli.processes import Processes
    from mvar_core.config import RunConfig

EXAMPLE = "mvar train --preset digits --tokens tokens --checkpoint tokenizer --out mvar"


def run(
    *,
    preset: options.RequiredPreset,
    checkpoint: options.TokenizerCheckpoint,
    out: options.Out,
    given: TrainOptions,
    loop: TransformerLoopOptions,
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Train a VAR or MVAR from scratch on a token cache, or on images that are tokenized first.

    Running the same command again goes on where it stopped, with any number of processes: under torchrun or --nproc
    they share every batch. The run directory is also a model directory.
    """
    request = TrainRequest(preset=preset, checkpoint=checkpoint, out=out, given=given, loop=loop)
    execute(as_json, request, dry_run)


@dataclass(frozen=True)
class TrainRequest:
    """What was asked of a training command.

    Attributes:
        preset: None only where there is a start to read the configuration off.
        checkpoint: Model directory with the tokenizer.
        out: The run directory.
        given: Data, length and machine.
        loop: Keys of the training section that have flags of their own.
        start: Model directory that gives the first weights.
        start_file: The published file that it was made from.
        classes: What becomes of the start's class table.
        scale_prefixes: Scales that a token sees, where not as the preset says.
        windows: One for all windowed scales or one per scale, likewise.
    """

    preset: str | None
    checkpoint: Path
    out: Path
    given: TrainOptions
    loop: TransformerLoopOptions
    start: Path | None = None
    start_file: Path | None = None
    classes: str = "auto"
    scale_prefixes: int | str | None = None
    windows: int | list[int] | str | None = None

    def configuration(self) -> RunConfig:
        """Preset, settings and flags, merged.

        Raises:
            ConfigError: A key or value that cannot be used, or flags that contradict each other.
        """
        from mvar_core.config.presets import load_config

        given = self.given
        if given.steps is not None and given.epochs is not None:
            raise ConfigError("--steps and --epochs both say how long to train.", "Give one of them.")
        if (given.tokens is None) == (given.data is None):
            raise ConfigError("Training needs tokens or images.", "Give --tokens CACHE or --data IMAGES, one of them.")
        settings = list(given.settings or ())
        # Steps win over epochs wherever both are set; --epochs must be able to win over a preset's steps.
        settings += ["train.steps=null"] if given.epochs is not None else []
        flags = {
            "seed": given.seed,
            "image_size": options.parse_size(given.image_size, "--image-size"),
            "train": {
                "steps": given.steps, "epochs": given.epochs, "batch_size": given.batch_size, **self.loop.keys
            },
            "attention": {"scale_prefixes": self.scale_prefixes, "windows": self.windows},
        }  # fmt: skip
        return load_config(self.preset, settings, flags, base=None if self.preset else self._read_off_the_start())

    def _read_off_the_start(self) -> dict[str, Any]:
        """The start's model with MVAR's attention, and the published settings of fine-tuning."""
        from mvar_core.models.directory import read_model_config
        from mvar_core.pyramid import mvar_windows

        assert self.start is not None
        source = read_model_config(self.start)
        values = source.model_dump(mode="json", exclude={"provenance", "class_names", "attention"})
        return {
            **values,
            "name": f"{source.name}-ft",
            "attention": {"scale_prefixes": 1, "windows": list(mvar_windows(source.pyramid))},
            "train": {"epochs": 80},
        }


def execute(as_json: bool, request: TrainRequest, dry_run: bool) -> None:
    """Tokenize where images were given, train, and print the result."""
    config = request.configuration()
    from mvar_core.models.directory import read_model_config

    tokenizer = read_model_config(request.checkpoint)
    if request.out.resolve() == request.checkpoint.resolve():
        raise DataError(f"--out {request.out} is the tokenizer's directory.", "Choose another --out.")
    if request.start is not None:
        from mvar_core.training.finetune import check_start

        fitted = config.model_copy(update={"tokenizer": tokenizer.tokenizer})
        check_start(fitted, read_model_config(request.start), str(request.start_file or request.start))
    if dry_run:
        _show_plan(Console(as_json), request, config)
        return

    from mvar_cli.processes import processes

    given = request.given
    with processes(given.device) as team:
        own = replace(request, given=replace(given, device=team.device(given.device)))
        interrupted = _train(team, team.console(as_json), own, config)
    if interrupted:
        raise typer.Exit(130)


def _train(team: Processes, console: Console, request: TrainRequest, config: RunConfig) -> bool:
    """What each process does; returns whether an interruption ended the training early."""
    from mvar_cli.tokenization import tokenize_run
    from mvar_cli.training import Start, fit_to_tokens, prepare_run, train_run
    from mvar_core.data.images import open_images
    from mvar_core.data.tokens import TokenCache
    from mvar_core.kernels import check_backend
    from mvar_core.models.directory import read_model_config
    from mvar_core.runtime import peak_memory_bytes, resolve_device, resolve_dtype
    from mvar_core.training.trackers import check_trackers

    given = request.given
    tokenizer = read_model_config(request.checkpoint)
    device = resolve_device(given.device)
    check_trackers(config.train)
    check_backend(given.attention, config.patterns, device, resolve_dtype(given.dtype, device), needs_grad=True)
    resume = team.from_first(lambda: prepare_run(request.out, given.resume, given.overwrite))
    tokens = given.tokens
    if tokens is None:
        assert given.data is not None
        tokens = request.out / "tokens"
        tokenize_run(
            console,
            request.checkpoint,
            fit_to_tokens(config, tokenizer, open_images(given.data).class_names),
            given.data,
            tokens,
            views=config.data,
            seed=config.seed,
            device=given.device,
            dtype="auto",
            overwrite=given.overwrite,
            team=team,
        )
    cache = TokenCache.open(tokens)
    config = fit_to_tokens(config, tokenizer, cache.class_names)
    result = train_run(
        console,
        config,
        cache,
        request.checkpoint,
        request.out,
        device=given.device,
        dtype=given.dtype,
        attention=given.attention,
        fsdp=given.fsdp,
        resume=resume,
        validation=TokenCache.open(given.validation) if given.validation else None,
        start=Start(request.start, request.start_file, request.classes) if request.start else None,
        provenance={"started_from": str(request.start_file or request.start)} if request.start else None,
    )
    speed = result.steps * config.train.batch_size / max(result.seconds, 1e-9)
    memory = peak_memory_bytes(device)
    columns = ["steps", "loss", "time", "images/s", "peak memory", "skipped steps"]
    row: list[Any] = [
        result.steps, result.loss, format_seconds(result.seconds), speed, format_bytes(memory), result.skipped
    ]  # fmt: skip
    if result.val_loss is not None:
        columns.append("validation loss")
        row.append(result.val_loss)
    if result.best_step is not None:
        columns.append("best at step")
        row.append(result.best_step)
    console.table(config.name, columns, [row])
    if not result.interrupted:
        console.say(f"Written: {request.out}")
        console.say(f"Next: mvar sample --checkpoint {request.out} --class all --num 4 --out grid.png")
    console.finish(
        {
            "steps": result.steps,
            "loss": result.loss,
            "model": str(request.out),
            "seconds": result.seconds,
            "images_per_second": speed,
            "peak_memory_bytes": memory,
            "validation_loss": result.val_loss,
            "best_step": result.best_step,
            "skipped": result.skipped,
            "interrupted": result.interrupted,
            "processes": team.count,
        }
    )
    if result.interrupted:
        options.interrupted(console)
    return result.interrupted


def _show_plan(console: Console, request: TrainRequest, config: RunConfig) -> None:
    from mvar_cli.costs import finish_dry_run, steps_of

    plan = []
    if request.given.tokens is not None:
        from mvar_core.data.tokens import TokenCache

        rows = len(TokenCache.open(request.given.tokens))
    else:
        from mvar_core.data.images import Views, open_images

        assert request.given.data is not None
        source = open_images(request.given.data)
        views = len(Views(config.data, config.seed))
        rows = len(source) * views
        plan.append(f"encode {len(source)} images in {views} views into {request.out / 'tokens'}")
    if request.start is not None:
        plan.append(f"start from the transformer of {request.start_file or request.start}")
    steps = steps_of(config, rows)
    batch = config.train.batch_size
    plan += [
        f"train {steps} steps of {batch} of {rows} rows ({steps * batch / rows:.3g} epochs)",
        f"write {request.out}",
    ]
    finish_dry_run(console, config, plan, steps=steps, rows=rows)
