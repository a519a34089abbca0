"""`mvar finetune-from-var`: the training of `mvar train`, starting from VAR weights."""

from pathlib import Path
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options
from mvar_cli.commands.train import show


@options.command(example="mvar finetune-from-var --var-checkpoint var-d16 --tokens tokens --out ft")
def finetune_from_var(
    out: options.Out,
    var_checkpoint: Annotated[
        Path, options.option("--var-checkpoint", "PATH", "Model directory or published .pth to start from.")
    ],
    machine: options.Machine,
    given: options.Train,
    scale_prefixes: options.ScalePrefixes = None,
    windows: options.Windows = None,
    classes: Annotated[
        str,
        options.option(
            "--classes",
            "auto|by-number|new",
            "What each class starts from: auto the same class of the weights, matched by name; by-number the"
            " class of its number; new nothing.",
        ),
    ] = "auto",
) -> None:
    """Train an MVAR that starts from VAR weights; which token sees which follows from the options, never from the file.

    Without a preset, sizes and pyramid are read off the weights, a token sees its own scale alone and windows of 7 on
    the last two scales (in large pyramids wherever they pay), and training is as published for fine-tuning. For another
    pyramid, from a preset or --set image_size=512, positions are interpolated scale by scale. Running the same command
    again resumes where it stopped.
    """
    arguments = {**locals(), **given}
    del arguments["given"]
    show(mvar.finetune_from_var(**arguments, progress=console.progress))
