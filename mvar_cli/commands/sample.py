"""`mvar sample`: class-conditional images."""

from typing import Annotated

import typer

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar sample --checkpoint runs/quickstart/mvar --class 3,7 --num 8 --out out")
def sample(
    checkpoint: options.Checkpoint,
    out: options.SampleOut,
    settings: options.Sampling,
    machine: options.SamplingMachine,
    classes: options.Classes = None,
    words: options.Words = None,
    vectors: options.VectorsFile = None,
    num: Annotated[int, typer.Option("--num", min=1, metavar="N", help="Images per class, text or vector.")] = 1,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    output_format: options.SampleFormat = None,
    save_tokens: Annotated[bool, typer.Option("--save-tokens", help="Also write the token indices.")] = False,
    stages: options.Stages = False,
    tokenizer: options.TokenizerFile = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
) -> None:
    """Generate images of classes; of texts or vectors, where the model is conditioned on them.

    An image depends on the seed, its number, its class, text or vector, the settings and the weights alone: not on the
    batch size, the number of processes, or what was resumed. Running the same command again resumes a run that was
    interrupted.
    """
    if not classes and not words and vectors is None:
        raise typer.BadParameter("choose what to generate with --class, --words or --vectors", param_hint="--class")
    result = mvar.sample_to(
        out,
        checkpoint=checkpoint,
        classes=classes or (),
        words=words or (),
        vectors=vectors,
        num=num,
        settings=settings,
        seed=seed,
        batch_size=batch_size,
        format=output_format,
        save_tokens=save_tokens,
        stages=stages,
        tokenizer=tokenizer,
        overwrite=overwrite,
        dry_run=dry_run,
        machine=machine,
        progress=console.progress,
    )
    console.show(result, ("images", "resumed", "seconds", "images_per_second", "batch_size", "peak_memory_bytes",
                          "device", "processes"), title="samples")  # fmt: skip
    if result.outputs:
        console.say(f"Written: {out}")
