"""`mvar finetune-from-var`: the training of `mvar train`, starting from VAR weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from mvar_cli import old_options as options
from mvar_cli.commands.train import TrainRequest, execute
from mvar_cli.old_groups import TrainOptions, TransformerLoopOptions
from mvar_core.errors import CheckpointError, ConfigError, nearest

if TYPE_CHECKING:
    from mvar_core.pyramid import PatchSize

EXAMPLE = "mvar finetune-from-var --var-checkpoint var_d16.pth --tokens T --out ft"
CLASSES = ("auto", "keep", "resize", "reinit")


def run(
    *,
    var_checkpoint: Annotated[
        Path,
        typer.Option("--var-checkpoint", metavar="PATH", help="Model directory or published .pth to start from."),
    ],
    out: options.Out,
    preset: options.Preset = None,
    checkpoint: options.OptionalTokenizerCheckpoint = None,
    tokenizer: options.TokenizerFile = None,
    scale_prefixes: Annotated[
        str | None,
        typer.Option("--scale-prefixes", metavar="1|2|3|all", help="Scales that a token sees. Default: preset, or 1."),
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(
            "--windows",
            metavar="K|K,K,…|auto",
            help="Window of the last two scales, of each, or of those where it pays.",
        ),
    ] = None,
    classes: Annotated[
        str,
        typer.Option(
            "--classes",
            metavar="|".join(CLASSES),
            help="The class table: keep refuses another number of classes, resize takes rows over by name or number,"
            " reinit starts anew but for no-class; auto keeps where numbers agree and reinits otherwise.",
        ),
    ] = "auto",
    pyramid: Annotated[
        str | None,
        typer.Option("--pyramid", metavar="1,2,3x4…", help="Sizes of a .pth file's scales, if not published ones."),
    ] = None,
    given: TrainOptions,
    loop: TransformerLoopOptions,
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Train an MVAR that starts from VAR weights; which token sees which follows from the options, never from the file.

    Without a preset, sizes and pyramid are read off the weights, a token sees its own scale alone and windows of 7 on
    the last two scales (in large pyramids wherever they pay), and training is as published for fine-tuning. For another
    pyramid, which --image-size or a preset asks for, positions are interpolated scale by scale. The tokenizer is the
    VAR's own unless --checkpoint names another. Running the same command again goes on where it stopped.
    """
    if classes not in CLASSES:
        raise ConfigError(f"--classes {classes!r} is not known. {nearest(classes, CLASSES)}")
    if preset is None and any(setting.startswith(("transformer.", "tokenizer.")) for setting in given.settings or ()):
        raise ConfigError("Without a preset, sizes are read off the weights.", "Leave out --set transformer.*.")
    is_file = var_checkpoint.is_file()
    sizes = options.parse_sizes(pyramid, "--pyramid")
    with start_directory(var_checkpoint, tokenizer, out, sizes, kept=not dry_run) as start:
        request = TrainRequest(
            preset=preset,
            checkpoint=checkpoint or start,
            out=out,
            given=given,
            loop=loop,
            start=start,
            start_file=var_checkpoint if is_file else None,
            classes=classes,
            scale_prefixes=options.parse_prefixes(scale_prefixes),
            windows=options.parse_windows(windows),
        )
        execute(as_json, request, dry_run)


@contextmanager
def start_directory(
    checkpoint: Path, tokenizer: Path | None, out: Path, sizes: list[PatchSize] | None, kept: bool
) -> Iterator[Path]:
    """The model directory to start from: the one given, or of a published file one made by the first process.

    Args:
        checkpoint: A model directory or a published file.
        tokenizer: The published tokenizer, or None for the one beside the file.
        out: The run.
        sizes: The file's pyramid, where it is not a published one.
        kept: Whether it stays, for the run to be resumed without converting again.

    Raises:
        CheckpointError: A file that does not fit, or what was made before beside the run came from another file.
    """
    if not checkpoint.is_file():
        yield checkpoint
        return
    from mvar_cli.launch import Worker
    from mvar_core.io.files import atomic_directory
    from mvar_core.models import official
    from mvar_core.models.directory import read_model_config
    from mvar_core.models.official import import_official

    tokenizer = tokenizer or official.tokenizer_next_to(checkpoint)
    with TemporaryDirectory() as scratch:
        directory = out.parent / f"{out.name}-start" if kept else Path(scratch) / "start"
        first = Worker.here().rank == 0 or not kept
        if first and not (directory / "config.json").is_file():
            directory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_directory(directory) as temporary:
                import_official(checkpoint, tokenizer, temporary, kind="var", patch_sizes=sizes)
        while not (directory / "config.json").is_file():  # should the first process fail, its launcher ends this one
            time.sleep(0.2)
        made_from = read_model_config(directory).provenance.get("source")
        if made_from != checkpoint.name:
            raise CheckpointError(
                f"{directory} was made from {made_from}, not from {checkpoint.name}.",
                "Remove it, or choose another --out.",
            )
        yield directory
