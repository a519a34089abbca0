"""`mvar sample`: class-conditional images."""

from typing import Annotated

import typer

import mvar_core as mvar
from mvar_cli import console, options

CLASSES_SHOWN = 10


@options.command(example="mvar sample --checkpoint runs/quickstart/mvar --class 3,7 --num 8 --out out")
def sample(
    checkpoint: options.Checkpoint,
    out: options.SampleOut,
    settings: options.Sampling,
    machine: options.SamplingMachine,
    given: options.Generate,
    vectors: options.VectorsFile = None,
    num: Annotated[int, options.option("--num", "N", "Images per class, text or vector.", min=1)] = 1,
    stages: options.Stages = False,
) -> None:
    """Generate images of classes; of texts or vectors, where the model is conditioned on them.

    An image depends on the seed, its number, its class, text or vector, the settings and the weights alone: not on the
    batch size, the number of processes, or what was resumed. Running the same command again resumes a run that was
    interrupted, and changes nothing where the output is finished.
    """
    if "classes" not in given and "words" not in given and vectors is None:
        raise typer.BadParameter("choose what to generate with --class, --words or --vectors", param_hint="--class")
    result = mvar.sample_to(
        out, checkpoint=checkpoint, vectors=vectors, num=num, stages=stages, settings=settings, machine=machine,
        progress=console.progress, **given,
    )  # fmt: skip
    show(result, "samples")


def show(result: "mvar.SampleResult", title: str) -> None:
    """The end of this command and of `mvar edit`."""
    columns = ("images", "resumed", "seconds", "images_per_second", "batch_size", "peak_memory_bytes", "device")
    console.show(result, (*columns, "processes"), title=title)
    if result.classes:
        named = [each["name"] if each["index"] in (None, each["name"]) else f"{each['name']} (#{each['index']})"
                 for each in result.classes[:CLASSES_SHOWN]]  # fmt: skip
        more = f", … {len(result.classes)} in all" if len(result.classes) > len(named) else ""
        console.say(f"Classes: {', '.join(named)}{more}")
    if result.outputs:
        console.say(f"Written: {result.out}")
