"""`mvar train`: a VAR or MVAR from scratch."""

from typing import Annotated

import typer

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar train --tokens runs/tokens --out runs/mvar --depth 4 --steps 300")
def train(
    out: options.Out,
    machine: options.Machine,
    loop: options.Loop,
    tokens: options.Tokens = None,
    data: options.OptionalData = None,
    tokenizer: options.OptionalTokenizer = None,
    preset: options.Preset = None,
    settings: options.Settings = None,
    depth: Annotated[
        int | None,
        typer.Option("--depth", min=1, metavar="N", help="Blocks; N heads, width 64·N. Default: the preset's, or 8."),
    ] = None,
    image_size: options.ImageSize = None,
    seed: options.OptionalSeed = None,
    validation: options.Validation = None,
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
    fsdp: options.Fsdp = False,
    dry_run: options.DryRun = False,
) -> None:
    """Train a VAR or MVAR from scratch on a token cache, or on images that are tokenized first.

    Without a preset, the model is an MVAR with the pyramid, image size, codebook and classes of the token cache; the
    tokenizer is the one that made the cache. Running the same command again resumes where it stopped, with any number
    of processes: under torchrun or --nproc they share every batch. The run directory is also a model directory.
    """
    result = mvar.train(
        out=out,
        tokens=tokens,
        data=data,
        tokenizer=tokenizer,
        preset=preset,
        settings=settings or (),
        depth=depth,
        image_size=image_size,
        seed=seed,
        validation=validation,
        resume=resume,
        overwrite=overwrite,
        fsdp=fsdp,
        dry_run=dry_run,
        machine=machine,
        progress=console.progress,
        **loop,
    )
    show(result)


def show(result: "mvar.TrainResult") -> None:
    """The end of a training, of this command and of `mvar finetune-from-var`."""
    if result.dry_run is None and not result.interrupted:
        console.end_progress()
        console.say(f"Written: {result.model}")
        console.say(f"Next: mvar sample --checkpoint {result.model} --class all --num 4 --out grid.png")
    columns = ("steps", "loss", "seconds", "images_per_second", "peak_memory_bytes", "skipped")
    console.show(result, (*columns, "validation_loss", "best_step"))
