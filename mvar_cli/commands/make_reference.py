"""`mvar evaluate make-reference`: features and statistics of images, measured once and written to a file."""

from pathlib import Path
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar evaluate make-reference --data digits --out digits-reference.npz")
def make_reference(
    out: Annotated[Path, options.option("--out", "FILE.npz", "Where to write the reference.")],
    data: Annotated[str, options.option("--data", "PATH|digits", "Folder, npz or digits.")],
    machine: options.Device,
    image_size: Annotated[
        str | None, options.option("--image-size", "N|HxW", "Resize and crop to this size first.")
    ] = None,
    features: options.Features = "auto",
    inception_weights: options.InceptionWeights = None,
    download: options.Download = False,
    batch_size: options.BatchSize = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Measure a reference once: features, statistics and labels of images, and a record of how they were measured.

    `mvar evaluate --reference FILE.npz` reads the file, and refuses it where its features are not those it measures.
    """
    result = mvar.make_reference(**locals(), progress=console.progress)
    console.show(result, columns=("reference", "num_reference", "features", "image_shape", "seconds"))
