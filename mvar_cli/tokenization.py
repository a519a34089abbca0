"""Images to a token cache: what `mvar tokenize`, `mvar train --data` and the quickstart share."""

from __future__ import annotations

from pathlib import Path

from mvar_cli.old_console import Console
from mvar_cli.processes import Processes
from mvar_core.config import ConditioningConfig, ModelConfig
from mvar_core.config.training import DataConfig
from mvar_core.data.images import ImageSource, open_images
from mvar_core.data.manifest import MANIFEST, Manifest
from mvar_core.data.tokens import CacheSummary, CacheWriter
from mvar_core.data.vectors import Vectors, file_vectors, word_vectors
from mvar_core.data.words import ENCODER
from mvar_core.errors import DataError
from mvar_core.models.directory import load_tokenizer, tokenizer_hash
from mvar_core.runtime import resolve_device, resolve_dtype

ALONE = Processes()


def tokenize_run(
    console: Console,
    checkpoint: Path,
    config: ModelConfig,
    data: str,
    out: Path,
    *,
    views: DataConfig,
    seed: int,
    device: str,
    dtype: str,
    batch_size: int = 64,
    overwrite: bool = False,
    skip_bad: bool = False,
    images_per_shard: int | None = None,
    conditioning: ConditioningConfig | None = None,
    vectors_file: Path | None = None,
    encoder: str | None = None,
    team: Processes = ALONE,
) -> CacheSummary:
    """Turn the images that `data` names into a token cache.

    Args:
        console: Where to report.
        checkpoint: Model directory with the tokenizer.
        config: Says image size and pyramid, which may be another than the directory's.
        data: Names the images.
        out: The cache's directory.
        views: Which views of each image.
        seed: Of random crops and augmented views.
        device: Where to compute.
        dtype: What to compute in; auto is float32, for an index may hang on the last bits.
        batch_size: Images at a time.
        overwrite: Replace what is there.
        skip_bad: Leave out images that cannot be read.
        images_per_shard: Images in a shard; by default what suits their number.
        conditioning: What the cache's vectors are for; by default the configuration's own. Those by words are made.
        vectors_file: A file with vectors of another encoder.
        encoder: What made the file.
        team: The processes that share the work; all of them return when the cache is complete.

    Raises:
        MvarError: Images, tokenizer or cache do not fit.
    """
    source = open_images(data)
    vectors = _vectors(source, conditioning or config.conditioning, vectors_file, encoder)
    target = resolve_device(team.device(device))
    kind = resolve_dtype("float32" if dtype == "auto" else dtype, target)
    tokenizer = load_tokenizer(checkpoint, config, target, kind)
    writer = CacheWriter(
        out,
        source,
        lambda images: tokenizer.encode(images.to(target)),
        config=config,
        tokenizer_hash=tokenizer_hash(checkpoint),
        data=views,
        seed=seed,
        batch_size=batch_size,
        images_per_shard=images_per_shard,
        skip_bad=skip_bad,
        vectors=vectors,
    )
    work = team.from_first(lambda: writer.prepare(overwrite))
    with console.progress("checking images") as progress:
        writer.check(work, team.rank, team.count, progress)
    with console.progress("tokenizing") as progress:
        writer.write(work, team.rank, team.count, progress)
    if team.first:
        return writer.finish(work)
    writer.wait()
    return CacheSummary.of(Manifest.read(out / MANIFEST), work.images)


def _vectors(
    source: ImageSource, conditioning: ConditioningConfig, file: Path | None, encoder: str | None
) -> Vectors | None:
    """The vectors that the images come with, where the configuration or the user asks for some."""
    if file is not None:
        given = file_vectors(file, classes=len(source.class_names), images=len(source), encoder=encoder)
        if conditioning.dim not in (None, given.values.shape[-1]):
            raise DataError(
                f"{file} holds vectors of {given.values.shape[-1]} numbers; conditioning.dim is {conditioning.dim}.",
                f"Set conditioning.dim={given.values.shape[-1]}.",
            )
        return given
    if conditioning.dim is not None and conditioning.encoder == ENCODER:
        return word_vectors(source.class_names, conditioning.dim)
    return None
