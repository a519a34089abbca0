"""`mvar edit`: a region of given images generated again, the rest kept."""

from pathlib import Path
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options
from mvar_cli.commands.sample import show
from mvar_cli.options import option


@options.command(example="mvar edit --checkpoint var-d16 --image a.png --box 64,64,192,192 --out out")
def edit(
    checkpoint: options.Checkpoint,
    images: Annotated[list[Path], option("--image", "PATH", "An image file, or a folder of them; repeatable.")],
    out: options.SampleOut,
    settings: options.BasicSampling,
    machine: options.EditingMachine,
    given: options.Generate,
    box: Annotated[
        str | None, option("--box", "X0,Y0,X1,Y1", "A box in pixels of the image's file, from its upper left.")
    ] = None,
    mask: Annotated[
        Path | None, option("--mask", "FILE", "A mask instead: white inside; of the image's or model's size.")
    ] = None,
    keep: Annotated[
        str, option("--keep", "SIDE", "What stays: outside (in-painting) or inside (out-painting).")
    ] = "outside",
    num: Annotated[int, option("--num", "N", "Variants per image and class.", min=1)] = 1,
    paste: Annotated[
        bool, option("--paste", None, "Copy the image's own pixels over what stays: bit-equal there.")
    ] = False,
    coverage: Annotated[
        float, option("--coverage", "FRACTION", "Of a coarse token that must stay for it to stay.")
    ] = 0.5,
) -> None:
    """Regenerate a region of images: in-painting, out-painting, and editing towards a class.

    The image's tokens stay at every scale where box or mask say so, and the model generates the rest around them: VAR's
    zero-shot editing, for any VAR or MVAR. The image is first resized and cropped to the model's size, and box or mask
    with it. Without --paste, what stays is shown as the tokenizer decodes it.
    """
    result = mvar.edit(
        images, out, checkpoint=checkpoint, box=box, mask=mask, keep=keep, num=num, paste=paste, coverage=coverage,
        settings=settings, machine=machine, progress=console.progress, **given,
    )  # fmt: skip
    show(result, "edits")
