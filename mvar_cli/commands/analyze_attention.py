"""`mvar analyze-attention`: where a model's attention goes."""

from pathlib import Path
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar analyze-attention --checkpoint runs/mvar --data digits --out attention")
def analyze_attention(
    checkpoint: options.Checkpoint,
    out: options.Out,
    machine: options.AnalysisDevice,
    tokens: options.Tokens = None,
    data: options.OptionalData = None,
    num: Annotated[int, options.option("--num", "N", "Images to measure.", min=1)] = 256,
    keep: Annotated[float, options.option("--keep", "FRACTION", "Attention that recommended settings keep.")] = 0.95,
    write_preset: Annotated[
        Path | None, options.option("--write-preset", "FILE.yaml", "Write the recommended model as a preset.")
    ] = None,
    tokenizer: options.TokenizerFile = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
) -> None:
    """Measure a model's attention per scale and neighbourhood, and which prefixes and windows keep most of it.

    Measured on --tokens, on --data, or without either on samples of the model itself. Writes report.html,
    report.json, and the figures as PNG and SVG.
    """
    result = mvar.analyze_attention(**locals(), progress=console.progress)
    if result.dry_run is None:
        sides = [row[0] for row in result.tables["scales"][1:]]
        cells = [["" if key > row else f"{mass:.3f}" for key, mass in enumerate(masses)]
                 for row, masses in enumerate(result.scale_mass)]  # fmt: skip
        rows = [[side, *shown] for side, shown in zip(sides, cells, strict=True)]
        console.table("attention of the rows' scales to the columns'", ("scale", *sides), rows)
        heading, *rows = result.tables["scales"]
        console.table("near and far", heading, rows)
        for sentence in result.sentences:
            console.say(sentence)
        heading, *rows = result.tables["savings"]
        console.table("what the recommended settings save", heading, rows)
        written = f" and {write_preset}" if write_preset else ""
        console.say(f"Written: {result.report}{written}")
    console.show(result, ("num_images", "seconds", "peak_memory_bytes"))
