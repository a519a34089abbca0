"""`mvar tokenize`: images to a cache of token indices."""

import shlex
from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar tokenize --tokenizer runs/tokenizer --data digits --out runs/tokens")
def tokenize(
    tokenizer: options.Tokenizer,
    data: options.Data,
    out: options.Out,
    machine: options.Device,
    preset: options.Preset = None,
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    flip: Annotated[
        bool | None, options.option("--flip/--no-flip", None, "Also a mirrored view of every image.")
    ] = None,
    crops: Annotated[
        int | None, options.option("--crops", "N", "Crops of every image: its centre and N-1 random ones.", min=1)
    ] = None,
    batch_size: options.BatchSize = None,
    seed: options.OptionalSeed = None,
    skip_bad: Annotated[
        bool, options.option("--skip-bad", None, "Leave out images that cannot be read, and list them.")
    ] = False,
    image_key: Annotated[
        str | None, options.option("--image-key", "NAME", "Suffix or column of the images, where samples have several.")
    ] = None,
    words: Annotated[
        bool,
        options.option("--words", None, "Also vectors of captions or class names, for models conditioned on words."),
    ] = False,
    vectors: options.VectorsFile = None,
    encoder: Annotated[
        str | None, options.option("--encoder", "NAME", "Name of what made the vectors of --vectors.")
    ] = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
) -> None:
    """Turn images into a cache of token indices, which is what training reads.

    Views (mirrored, cropped, slightly moved) follow data.* of the preset or of --set. Image size and pyramid are the
    tokenizer's own unless a preset, --set or --image-size gives others. Running the same command again resumes where it
    stopped. Under torchrun the processes share the work.
    """
    given = {**locals(), "settings": settings or (), "batch_size": batch_size or 64}
    result = mvar.tokenize(**given, progress=console.progress)
    console.show(result, ("images", "views", "encoded", "bytes", "bytes_per_view", "seconds"), title="tokens")
    if result.skipped:
        shown = ", ".join(result.skipped[:5]) + (", …" if len(result.skipped) > 5 else "")
        console.say(f"Left out, because they cannot be read: {len(result.skipped)} images ({shown})")
    if result.dry_run is None:
        console.say(f"{'Written' if result.encoded else 'Complete already'}: {out}")
        train = ["mvar", "train", "--tokens", str(out), "--out", str(out.with_name(f"{out.name}-mvar"))]
        console.say(f"Next: {shlex.join(train)}")
