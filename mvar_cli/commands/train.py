"""`mvar train`: a VAR or MVAR from scratch."""

from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar train --tokens runs/tokens --out runs/mvar --depth 4 --steps 300")
def train(
    out: options.Out,
    machine: options.Machine,
    given: options.Train,
    depth: Annotated[
        int | None, options.option("--depth", "N", "Blocks; N heads, width 64·N. Default: as suits the images.", min=1)
    ] = None,
    image_size: options.ImageSize = None,
) -> None:
    """Train a VAR or MVAR from scratch on a token cache, or on images that are tokenized first.

    Pyramid, image size, codebook, classes and tokenizer are those of the token cache. Without a preset, the model is an
    MVAR whose depth, batch and epochs suit the number of images. Running the same command again resumes where it
    stopped, with any number of processes: under torchrun or --nproc they share every batch. The run directory is also
    a model directory.
    """
    progress = console.progress
    show(mvar.train(out=out, depth=depth, image_size=image_size, machine=machine, progress=progress, **given))


def show(result: "mvar.TrainResult") -> None:
    """The end of a training, of this command and of `mvar finetune-from-var`."""
    if result.dry_run is None and not result.interrupted:
        console.end_progress()
        console.say(f"Written: {result.model}")
        console.say(f"Next: {result.command}")
    columns = ("steps", "loss", "seconds", "images_per_second", "peak_memory_bytes", "skipped")
    console.show(result, (*columns, "validation_loss", "best_step"))
