"""`mvar tokenize`: images to a cache of token indices."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_bytes, format_seconds

if TYPE_CHECKING:
    from mvar_core.config import ConditioningConfig, RunConfig
    from mvar_core.data.tokens import CacheSummary

EXAMPLE = "mvar tokenize --checkpoint runs/tokenizer --data digits --out runs/tokens"


def run(
    checkpoint: options.Checkpoint,
    data: options.Data,
    out: options.Out,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Also a mirrored view of every image.")] = None,
    crops: Annotated[
        int | None,
        typer.Option("--crops", min=1, metavar="N", help="Crops of every image: its centre and N-1 random ones."),
    ] = None,
    preset: options.Preset = None,
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and list them.")
    ] = False,
    shard_images: Annotated[
        int | None,
        typer.Option("--shard-images", min=1, metavar="N", help="Images in a shard. Default: by their number."),
    ] = None,
    words: Annotated[
        bool, typer.Option("--words", help="Also vectors of the classes' names, for models that take words.")
    ] = False,
    vectors: options.VectorsFile = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", metavar="NAME", help="What made the vectors of --vectors.")
    ] = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Turn images into a cache of token indices, which is what training reads.

    Views (mirrored, cropped, slightly moved) follow data.* of the preset or of --set. A preset's image_size and
    patch_sizes, or --image-size, replace the tokenizer's own. Running the same command again goes on where it stopped.
    Under torchrun the processes share the work.
    """
    from mvar_core.config import ModelConfig
    from mvar_core.config.presets import load_config
    from mvar_core.config.section import validate
    from mvar_core.models.directory import read_model_config

    tokenizer = read_model_config(checkpoint)
    own = {"tokenizer": tokenizer.tokenizer.model_dump()}
    base = {**own, "image_size": tokenizer.image_size, "patch_sizes": tokenizer.patch_sizes}
    flags = {"image_size": options.parse_size(image_size, "--image-size"), "data": {"flip": flip, "crops": crops}}
    run_config = load_config(preset, settings or [], {**flags, **own}, base=base)
    conditioning = _conditioning(run_config, words, vectors, encoder)
    config = tokenizer
    asked = any(setting.startswith(("image_size", "patch_sizes")) for setting in settings or [])
    if preset is not None or image_size is not None or asked:
        sizes = {"image_size": run_config.image_size, "patch_sizes": run_config.patch_sizes}
        values = {"name": tokenizer.name, "tokenizer": tokenizer.tokenizer.model_dump(), "transformer": None, **sizes}
        config = validate(ModelConfig, values, str(checkpoint))
    if dry_run:
        from mvar_cli.costs import finish_dry_run
        from mvar_core.data.images import Views, open_images

        source = open_images(data)
        views = len(Views(run_config.data, seed))
        bytes_per_token = 1 if config.tokenizer.codebook_size <= 256 else 2
        size = len(source) * views * config.pyramid.num_tokens * bytes_per_token
        plan = [f"encode {len(source)} images in {views} views", f"write {format_bytes(size)} of tokens to {out}"]
        finish_dry_run(Console(as_json), config, plan, images=len(source), views=views)
        return

    from mvar_cli.processes import processes
    from mvar_cli.tokenization import tokenize_run

    start = time.monotonic()
    with processes() as team:
        console = team.console(as_json)
        summary = tokenize_run(
            console,
            checkpoint,
            config,
            data,
            out,
            views=run_config.data,
            seed=seed,
            device=device,
            dtype=dtype,
            batch_size=batch_size or 64,
            overwrite=overwrite,
            skip_bad=skip_bad,
            images_per_shard=shard_images,
            conditioning=conditioning,
            vectors_file=vectors,
            encoder=encoder,
            team=team,
        )
    seconds = time.monotonic() - start
    _show(console, out, summary, seconds)
    console.finish(
        {
            "images": summary.images,
            "views": summary.views,
            "bytes": summary.bytes,
            "bytes_per_view": summary.bytes_per_view,
            "seconds": seconds,
            "encoded": summary.encoded,
            "skipped": summary.skipped,
            "tokens": str(out),
        }
    )


def _conditioning(config: RunConfig, words: bool, vectors: Path | None, encoder: str | None) -> ConditioningConfig:
    """What the cache's vectors are for.

    Raises:
        ConfigError: Options that contradict each other or the preset.
    """
    from mvar_core.data.words import ENCODER
    from mvar_core.errors import ConfigError

    asked = config.conditioning
    if words and vectors is not None:
        raise ConfigError("--words and --vectors both say what the vectors are.", "Give one of them.")
    if encoder is not None and vectors is None:
        raise ConfigError("--encoder says what made the file of --vectors.", "Give --vectors FILE too.")
    if not words:
        return asked
    if asked.dim is None:
        raise ConfigError(
            "--words needs the length of a vector.",
            "Add --preset digits-words, or --set conditioning.kind=vector --set conditioning.dim=64.",
        )
    return asked.model_copy(update={"encoder": ENCODER})


def _show(console: Console, out: Path, summary: CacheSummary, seconds: float) -> None:
    console.table(
        "tokens",
        ("images", "views", "encoded now", "size", "bytes per view", "time", "images/s"),
        [
            (
                summary.images,
                summary.views,
                summary.encoded,
                format_bytes(summary.bytes),
                summary.bytes_per_view,
                format_seconds(seconds),
                summary.encoded / max(seconds, 1e-9),
            )
        ],
    )
    if summary.skipped:
        shown = ", ".join(summary.skipped[:5]) + (", …" if len(summary.skipped) > 5 else "")
        console.say(f"Left out, because they cannot be read: {len(summary.skipped)} images ({shown})")
    console.say(f"Written: {out}")
