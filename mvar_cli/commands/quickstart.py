"""`mvar quickstart`: from images to a model, samples, metrics and a report."""

from pathlib import Path
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar quickstart --out runs/quickstart")
def quickstart(
    machine: options.Device,
    out: options.Out = Path("runs/quickstart"),
    data: options.Data = "digits",
    image_size: options.ImageSize = None,
    depth: Annotated[
        int | None, options.option("--depth", "N", "Blocks; N heads, width 64·N. Default: as suits the images.", min=1)
    ] = None,
    minutes: Annotated[
        float | None, options.option("--minutes", "N", "Time to spend. Default: 2, or 60 on your own images.")
    ] = None,
    num: Annotated[
        int | None, options.option("--num", "N", "Samples per class. Default: 100, or 64 in all.", min=2)
    ] = None,
    seed: options.Seed = 0,
    settings: options.Settings = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
) -> None:
    """From images to a model, samples, metrics and a report, in minutes on a CPU.

    Trains a tokenizer and an MVAR on bundled handwritten digits, or on your own images with --data, generates samples,
    scores them, and writes index.html. On your own images a few steps are measured first, and their number fills
    --minutes; a tenth of the images is held out, and the report shows samples next to the training images nearest to
    them. Running the same command again resumes where it stopped.
    """
    result = mvar.quickstart(
        out, data=data, image_size=image_size, depth=depth, minutes=minutes, num=num, seed=seed,
        settings=settings or (), overwrite=overwrite, dry_run=dry_run, machine=machine, progress=console.progress,
    )  # fmt: skip
    for name, (heading, *rows) in result.tables.items():
        console.table(name, heading, rows)
    console.show(result, ("images_per_second", "peak_memory_bytes", "seconds"), title="throughput and memory")
    if result.commands:
        console.say(f"Look at {result.report} and {result.grid}.\n\n{result.commands}")
