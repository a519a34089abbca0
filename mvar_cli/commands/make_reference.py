"""`mvar evaluate make-reference`: features and statistics of images, measured once and kept in a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import format_seconds
from mvar_core.errors import ConfigError, DataError

EXAMPLE = "mvar evaluate make-reference --data digits --out digits-reference.npz"


def run(
    out: Annotated[Path, typer.Option("--out", metavar="FILE.npz", help="Where to write the reference.")],
    data: Annotated[str | None, typer.Option("--data", metavar="PATH|digits", help="Folder, npz or digits.")] = None,
    samples: Annotated[str | None, typer.Option("--samples", metavar="PATH", help="Another name for --data.")] = None,
    image_size: Annotated[
        str | None, typer.Option("--image-size", metavar="N|HxW", help="Resize and crop to this size first.")
    ] = None,
    features: Annotated[
        str,
        typer.Option("--features", metavar="NAME|FILE.pt2", help="As for `mvar evaluate`; auto is demo for digits."),
    ] = "auto",
    inception_weights: Annotated[
        Path | None, typer.Option("--inception-weights", metavar="FILE", help="The network that FID is defined by.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the Inception weights if absent.")] = False,
    demo_classifier: Annotated[
        Path | None, typer.Option("--demo-classifier", metavar="FILE", help="The classifier behind demo features.")
    ] = None,
    batch_size: options.BatchSize = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure a reference once: features, statistics and labels of images, and a record of how they were measured.

    `mvar evaluate --reference FILE.npz` takes the file, and refuses it where its features are not those it measures.
    """
    named = data if data is not None else samples
    if named is None or (data is not None and samples is not None):
        raise ConfigError("There must be images to measure.", "Give --data PATH.")
    if out.suffix.lower() != ".npz":
        raise DataError(f"--out {out} does not end in .npz.")
    if out.is_dir() or (out.exists() and not overwrite):
        raise DataError(f"{out} is already there.", "Choose another --out, or add --overwrite to replace it.")
    size = options.parse_size(image_size, "--image-size")
    from mvar_cli import evaluation
    from mvar_cli.image_sets import open_stored
    from mvar_cli.processes import processes
    from mvar_core import __version__
    from mvar_core.evaluation.references import ReferenceRecord, save_reference
    from mvar_core.runtime import resolve_device

    start = time.monotonic()
    with processes() as team:
        console = team.console(as_json)
        kind = evaluation.feature_kind(features, named)
        if kind == "inception":
            inception_weights = evaluation.inception_file(inception_weights, download, console, team)
        images = open_stored(named, None, (size, size) if isinstance(size, int) else size)
        target = resolve_device(team.device(device))
        extractor = evaluation.make_extractor(kind, inception_weights, demo_classifier, [], images.image_shape, target)
        measurer = evaluation.Measurer(extractor, console, team, batch_size=batch_size or evaluation.DEFAULT_BATCH)
        found = measurer.measure(images, "reference")
        if not team.first or found is None:
            return
        record = ReferenceRecord(
            extractor=extractor.name,
            weights_hash=extractor.weights_hash,
            count=images.count,
            image_shape=images.image_shape,
            resized=images.images.stored_shape is not None,
            source=named,
            mvar_version=__version__,
            class_names=images.class_names,
        )
        save_reference(out, found, record)
        seconds = time.monotonic() - start
        console.say(f"Written: {out}, {images.count:,} images with {extractor.name} features.")
        console.note(f"Measured in {format_seconds(seconds)}.")
        console.finish(
            {
                "reference": str(out),
                "num_reference": images.count,
                "features": extractor.name,
                "weights_hash": extractor.weights_hash,
                "image_shape": images.image_shape,
                "resized": record.resized,
                "seconds": seconds,
            }
        )
