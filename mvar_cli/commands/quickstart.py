"""`mvar quickstart`: from bundled images to a model, samples, metrics and a report."""

from pathlib import Path
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar quickstart --out runs/quickstart")
def quickstart(
    machine: options.Device,
    out: options.Out = Path("runs/quickstart"),
    minutes: Annotated[float, options.option("--minutes", "N", "Time to spend on two CPU cores.")] = 2.0,
    num: Annotated[int, options.option("--num", "N", "Samples per class to score.", min=2)] = 100,
    seed: options.Seed = 0,
    settings: options.Settings = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
) -> None:
    """From bundled images to a model, samples, metrics and a report, in minutes on a CPU.

    Trains a tokenizer and an MVAR on handwritten digits, generates samples, scores them, and writes index.html.
    Running the same command again resumes where it stopped.
    """
    result = mvar.quickstart(
        out, minutes=minutes, num=num, seed=seed, settings=settings or (), overwrite=overwrite, dry_run=dry_run,
        machine=machine, progress=console.progress,
    )  # fmt: skip
    for name, (heading, *rows) in result.tables.items():
        console.table(name, heading, rows)
    console.show(result, ("images_per_second", "peak_memory_bytes", "seconds"), title="throughput and memory")
    if result.commands:
        console.say(f"Look at {result.report} and {result.grid}.\n\n{result.commands}")
