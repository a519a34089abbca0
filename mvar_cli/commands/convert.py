"""`mvar convert`: published .pth files to a model directory, and back."""

from pathlib import Path
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar convert --model var_d16.pth --tokenizer vae.pth --out var-d16")
def convert(
    out: options.Out,
    model: Annotated[
        Path | None, options.option("--model", "PATH", "Published transformer; or a model directory.")
    ] = None,
    tokenizer: Annotated[
        Path | None, options.option("--tokenizer", "FILE", "Published VQVAE. Default: the one next to it.")
    ] = None,
    weights: Annotated[
        str | None, options.option("--weights", "NAME", "Which of several in a file. Default: an EMA's.")
    ] = None,
    kind: Annotated[str | None, options.option("--kind", "var|mvar", "Default: as its mask or a name says.")] = None,
    pyramid: Annotated[
        str | None, options.option("--pyramid", "1,2,3x4…", "Sides of the scales, or height x width.")
    ] = None,
    windows: options.Windows = None,
    scale_prefixes: options.ScalePrefixes = None,
    to: Annotated[str, options.option("--to", "directory|official", "What to write.")] = "directory",
    dtype: Annotated[
        str, options.option("--dtype", "NAME", "float32, bfloat16 or float16; quantizer and head stay in float32.")
    ] = "float32",
    verify: options.Verify = True,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
) -> None:
    """Turn published .pth files into a model directory, or with --to official a model directory into such files.

    Sizes are read off the file. Attention masks in it only tell the kind: which token sees which follows from kind,
    windows and scale prefixes.
    """
    result = mvar.convert(**locals())
    config = result.config
    if result.dry_run is None and to == "directory":
        sees = config.attention.scale_prefixes
        rows = [
            ("pyramid", str(config.pyramid)),
            ("scales that a token sees", "all earlier ones" if sees == "all" else str(sees)),
            ("windows", ", ".join(str(window) if window else "whole" for window in config.windows)),
            ("codebook", f"{config.tokenizer.codebook_size} × {config.tokenizer.latent_channels}"),
        ]
        if config.transformer is not None:
            size = f"depth {config.transformer.depth}, {console.format_count(result.parameters)}"
            found = {"option": "--kind", "file": "the file's name", "weights": "the weights' name", "mask": "its mask"}
            told = f"{result.kind.upper()}, by {found.get(result.kind_from or '', 'assumption')}"
            read = [("weights", result.weights)] if result.weights else []
            rows = [*read, ("kind", told), ("transformer", size), *rows]
            rows.append(("recommended sampling", config.sampling.summary))
        if dtype != "float32":
            rows.append(("in float32, not " + dtype, ", ".join(result.float32_modules)))
        console.table(config.name, ("what", "as read from the file"), rows)
    console.show(result)
    if result.dry_run is None:
        for path in result.outputs:
            console.say(f"Written: {path}")
        if to == "directory" and config.transformer is not None:
            label = min(207, config.transformer.num_classes - 1)
            console.say(f"Next: mvar sample --checkpoint {out} --class {label} --num 4 --out grid.png")
