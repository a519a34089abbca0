"""Images to a token cache: what training reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvar_core.config import Machine, ModelConfig, RunConfig
from mvar_core.config.presets import load_config
from mvar_core.data.images import ImageSource, open_images, split_name
from mvar_core.data.shards import IMAGE_KEY
from mvar_core.data.token_writer import write_token_cache
from mvar_core.data.tokens import smallest_unsigned
from mvar_core.data.transforms import Views
from mvar_core.data.vectors import ENCODER, Vectors, caption_vectors, file_vectors, word_vectors
from mvar_core.distributed import connect
from mvar_core.errors import ConfigError, DataError
from mvar_core.models.directory import load_tokenizer, read_model_config, tokenizer_hash
from mvar_core.progress import Progress
from mvar_core.pyramid import PatchSize
from mvar_core.results import DryRun, Result
from mvar_core.runtime import resolve_device, resolve_dtype


@dataclass(frozen=True, kw_only=True)
class TokenizeResult(Result):
    """What `tokenize` leaves behind in the directory `path`, or `tokens`.

    `bytes` is the size of tokens and labels, `bytes_per_view` that of one view's tokens with its share of labels and
    headers. This call `encoded` so many images; `skipped` are the names of those that could not be read.
    """

    images: int
    views: int
    bytes: int
    bytes_per_view: float = field(init=False)
    seconds: float
    encoded: int
    skipped: tuple[str, ...]
    path: Path
    tokens: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes_per_view", self.bytes / max(1, self.images * self.views))
        object.__setattr__(self, "tokens", self.path)


def tokenize(
    *,
    tokenizer: Path | str,
    data: Path | str | ImageSource,
    out: Path | str,
    preset: str | None = None,
    settings: Sequence[str] = (),
    image_size: PatchSize | str | None = None,
    flip: bool | None = None,
    crops: int | None = None,
    batch_size: int = 64,
    seed: int | None = None,
    skip_bad: bool = False,
    image_key: str | None = None,
    words: bool = False,
    vectors: Path | str | None = None,
    encoder: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> TokenizeResult:
    """Turn images into a cache of token indices.

    The same call again resumes where it was interrupted. Under torchrun the processes share the work.

        cache = mvar.tokenize(tokenizer="runs/tokenizer", data="digits", out="runs/tokens", flip=True)

    Args:
        tokenizer: Model directory with the tokenizer; image size and pyramid are its own unless a preset, `settings`
            or `image_size` sets others.
        data: `digits`, `photographs`, a folder of images, tar shards, or parquet or arrow files; `:test` chooses a
            split, `:image=KEY` one of several images of a sample.
        out: The cache's directory.
        preset: Name of a preset or a YAML file, for its image size and its `data.*`.
        settings: Changes to it, as `data.augmented_views=4`.
        image_size: Side, or (height, width), also as "256x384"; the pyramid follows.
        flip: Also encode a mirrored view of every image.
        crops: Crops of every image: its centre, and `crops` - 1 random ones.
        batch_size: Views encoded together.
        seed: Of random crops and augmented views; by default the preset's.
        skip_bad: Leave out images that cannot be read, and list them.
        image_key: As in `data`: a suffix in tar shards, a column of tables.
        words: Also vectors of the classes' names, or of captions where images have some and no classes.
        vectors: Also the vectors of this file (.npy, .npz, .safetensors), one for each class or image.
        encoder: Name of what made `vectors`; by default the name in the file.
        overwrite: Replace what is in `out`.
        dry_run: Only report what would be done.
        machine: Device and dtype; dtype auto is float32, since a code may depend on the last bits.
        progress: Called with the images that are checked, then encoded.

    Raises:
        MvarError: Images, tokenizer, preset or cache do not fit.
    """
    if image_key is not None:
        name, split = split_name(str(data))
        data = f"{name}{IMAGE_KEY}{image_key}:{split}"
    data = data if isinstance(data, ImageSource) else str(data)
    own = read_model_config(Path(tokenizer))
    section = {"tokenizer": own.tokenizer.model_dump()}
    base = {"name": own.name, "image_size": own.image_size, "patch_sizes": own.patch_sizes, **section}
    flags = {"image_size": image_size, "data": {"flip": flip, "crops": crops}, "seed": seed, **section}
    config = load_config(preset, settings, flags, base=base).model_copy(update={"transformer": None})
    if words and vectors is not None:
        raise ConfigError("--words and --vectors both specify vectors.", "Use one of them.")
    if encoder is not None and vectors is None:
        raise ConfigError("--encoder names what made the file of --vectors.", "Add --vectors FILE.")
    if words:
        if config.conditioning.dim is None:
            raise ConfigError(
                "--words needs the length of a vector.",
                "Add --preset digits-words, or --set conditioning.kind=vector --set conditioning.dim=64.",
            )
        conditioning = config.conditioning.model_copy(update={"encoder": ENCODER})
        config = config.model_copy(update={"conditioning": conditioning})
    if dry_run:
        return _plan(config, open_images(data), Path(out))
    return write_tokens(
        Path(out), data=data, tokenizer=Path(tokenizer), config=config, vectors=vectors, encoder=encoder,
        machine=machine, progress=progress, batch_size=batch_size, skip_bad=skip_bad, overwrite=overwrite,
    )  # fmt: skip


def write_tokens(
    out: Path,
    *,
    data: str | ImageSource,
    tokenizer: Path,
    config: RunConfig,
    vectors: Path | str | None = None,
    encoder: str | None = None,
    machine: Machine = Machine(),
    progress: Progress | None = None,
    **writing: Any,
) -> TokenizeResult:
    """As `tokenize`, for a ready configuration: image size, pyramid, `data`, `seed` and `conditioning` are its own.

    Its `tokenizer` section must be that of the tokenizer's directory. `writing` is for `write_token_cache`.
    """
    start = time.monotonic()
    with connect(machine.device) as world:
        source = open_images(data, max_pixels=machine.max_pixels)
        device = resolve_device(world.device(machine.device))
        dtype = resolve_dtype("float32" if machine.dtype == "auto" else machine.dtype, device)
        model = load_tokenizer(tokenizer, config, device, dtype, verify=machine.verify)
        made, encoded = write_token_cache(
            out,
            source,
            lambda images: model.encode(images.to(device)),
            progress=progress,
            config=config,
            tokenizer_hash=tokenizer_hash(tokenizer),
            tokenizer=str(tokenizer),
            data=config.data,
            seed=config.seed,
            vectors=_vectors(source, config, vectors, encoder),
            **writing,
        )
    return TokenizeResult(
        images=made.images,
        views=made.views,
        bytes=sum(shard.tokens.bytes + shard.labels.bytes for shard in made.shards),
        seconds=time.monotonic() - start,
        encoded=encoded,
        skipped=tuple(name for shard in made.shards for name in shard.skipped),
        path=out,
    )


def _vectors(source: ImageSource, config: RunConfig, file: Path | str | None, encoder: str | None) -> Vectors | None:
    """The vectors to store with the images: those of a file, of captions or of the classes' names, or none."""
    dim = config.conditioning.dim
    if file is not None:
        found = file_vectors(Path(file), classes=len(source.class_names), images=len(source), encoder=encoder)
        length = found.values.shape[-1]
        if dim not in (None, length):
            raise DataError(
                f"{file} holds vectors of {length} values; conditioning.dim is {dim}.",
                f"Set conditioning.dim={length}.",
            )
        return found
    if dim is not None and config.conditioning.encoder == ENCODER:
        captions = source.captions() if len(source.class_names) == 1 else None
        return caption_vectors(captions, dim) if captions else word_vectors(source.class_names, dim)
    return None


def _plan(config: RunConfig, source: ImageSource, out: Path) -> TokenizeResult:
    """What would be done."""
    images, views = len(source), len(Views(config.data))
    tokens = images * views * config.pyramid.num_tokens
    size = tokens * smallest_unsigned(config.tokenizer.codebook_size - 1).itemsize
    plan = DryRun(
        configuration=config.model_dump(mode="json", include={*ModelConfig.model_fields, "data", "seed"}),
        steps=(f"encode {images:,} images in {views} views", f"write {tokens:,} tokens ({size:,} bytes) to {out}"),
        facts={"images": images, "views": views, "bytes": size},
    )
    return TokenizeResult(
        images=images, views=views, bytes=size, seconds=0.0, encoded=0, skipped=(), path=out, dry_run=plan
    )
