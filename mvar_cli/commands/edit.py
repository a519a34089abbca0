"""`mvar edit`: a region of given images generated again, the rest kept."""

from pathlib import Path
from typing import Annotated

import typer

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar edit --checkpoint var-d16 --image a.png --box 64,64,192,192 --out out")
def edit(
    checkpoint: options.Checkpoint,
    images: Annotated[
        list[Path], typer.Option("--image", metavar="PATH", help="An image file, or a folder of them; repeatable.")
    ],
    out: options.SampleOut,
    settings: options.BasicSampling,
    machine: options.SamplingMachine,
    box: Annotated[
        str | None,
        typer.Option("--box", metavar="X0,Y0,X1,Y1", help="A box in pixels of the image's file, from its upper left."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", metavar="FILE", help="A mask instead: white inside; of the image's or model's size."),
    ] = None,
    keep: Annotated[
        str,
        typer.Option("--keep", metavar="SIDE", help="What stays: outside (in-painting) or inside (out-painting)."),
    ] = "outside",
    classes: options.Classes = None,
    words: options.Words = None,
    num: Annotated[int, typer.Option("--num", min=1, metavar="N", help="Variants per image and class.")] = 1,
    paste: Annotated[
        bool, typer.Option("--paste", help="Copy the image's own pixels over what stays: bit-equal there.")
    ] = False,
    coverage: Annotated[
        float,
        typer.Option("--coverage", metavar="FRACTION", help="Of a coarse token that must stay for it to stay."),
    ] = 0.5,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    output_format: options.SampleFormat = None,
    save_tokens: Annotated[
        bool, typer.Option("--save-tokens", help="Also write the tokens, and which of them stayed.")
    ] = False,
    tokenizer: options.TokenizerFile = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
) -> None:
    """Regenerate a region of images: in-painting, out-painting, and editing towards a class.

    The image's tokens stay at every scale where box or mask say so, and the model generates the rest around them: VAR's
    zero-shot editing, for any VAR or MVAR. The image is first resized and cropped to the model's size, and box or mask
    with it. Without --paste, what stays is shown as the tokenizer decodes it.
    """
    result = mvar.edit(
        images,
        out,
        checkpoint=checkpoint,
        box=box,
        mask=mask,
        keep=keep,
        classes=classes or (),
        words=words or (),
        num=num,
        paste=paste,
        coverage=coverage,
        settings=settings,
        seed=seed,
        batch_size=batch_size,
        format=output_format,
        save_tokens=save_tokens,
        tokenizer=tokenizer,
        overwrite=overwrite,
        dry_run=dry_run,
        machine=machine,
        progress=console.progress,
    )
    console.show(result, ("images", "resumed", "seconds", "images_per_second", "batch_size", "peak_memory_bytes",
                          "device", "processes"), title="edits")  # fmt: skip
    if result.outputs:
        console.say(f"Written: {out}")
