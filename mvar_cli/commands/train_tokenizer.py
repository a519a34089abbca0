"""`mvar train-tokenizer`: a multi-scale residual VQVAE, from images."""

import shlex
from pathlib import Path
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar train-tokenizer --data IMAGES --out runs/tokenizer")
def train_tokenizer(
    data: options.Data,
    out: options.Out,
    machine: options.Device,
    given: options.TrainTokenizer,
    image_size: options.ImageSize = None,
    start: Annotated[
        Path | None,
        options.option("--start", "DIR|FILE.pth", "Tokenizer to start from: a directory or published file."),
    ] = None,
    new_codebook: Annotated[
        bool, options.option("--new-codebook", None, "With --start: train a codebook from scratch, of any size.")
    ] = False,
    vgg_weights: Annotated[
        Path | None, options.option("--vgg-weights", "FILE", "VGG16, for the perceptual loss.")
    ] = None,
    lpips_weights: Annotated[
        Path | None, options.option("--lpips-weights", "FILE", "LPIPS' weights, for the perceptual loss.")
    ] = None,
) -> None:
    """Train a multi-scale residual VQVAE on images.

    Without a preset, the size follows the images, and width, codebook and steps suit their number. Running the same
    command again resumes where it stopped. The run directory is also a model directory. Under torchrun or --nproc the
    processes share every batch.
    """
    arguments = {**locals(), **given}
    del arguments["given"]
    result = mvar.train_tokenizer(**arguments, progress=console.progress)
    if result.dry_run is None and not result.interrupted:
        console.end_progress()
        usage = ", ".join(f"{fraction:.1%}" for fraction in result.usage_per_scale)
        console.say(f"Codes used, per scale: {usage}")
        console.say(f"Written: {out}")
        options = ["--tokenizer", str(out), "--data", data, "--out", str(out.with_name(f"{out.name}-tokens"))]
        console.say(f"Next: {shlex.join(['mvar', 'tokenize', *options])}")
    columns = ("steps", "loss", "psnr", "code_usage", "seconds", "images_per_second", "peak_memory_bytes")
    console.show(result, columns)
