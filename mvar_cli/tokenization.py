"""Images to a token cache: what `mvar tokenize`, `mvar train --data` and the quickstart share."""

from __future__ import annotations

from pathlib import Path

from mvar_cli.console import Console
from mvar_core.config import DataConfig, ModelConfig
from mvar_core.data.images import open_images
from mvar_core.data.tokens import CacheSummary, write_token_cache
from mvar_core.models.directory import load_tokenizer, tokenizer_hash
from mvar_core.runtime import resolve_device, resolve_dtype


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
) -> CacheSummary:
    """Turn the images that `data` names into a token cache.

    Args:
        console: Where to report.
        checkpoint: Model directory with the tokenizer.
        config: Says image size and pyramid, which may be another than the directory's.
        data: Names the images.
        out: The cache's directory.
        views: Which views of each image.
        seed: Of the augmented views.
        device: Where to compute.
        dtype: What to compute in; auto is float32, for an index may hang on the last bits.
        batch_size: Images at a time.
        overwrite: Replace what is there.

    Raises:
        MvarError: Images, tokenizer or cache do not fit.
    """
    source = open_images(data)
    target = resolve_device(device)
    kind = resolve_dtype("float32" if dtype == "auto" else dtype, target)
    tokenizer = load_tokenizer(checkpoint, config, target, kind)
    with console.progress("tokenizing") as progress:
        return write_token_cache(
            out,
            source,
            lambda images: tokenizer.encode(images.to(target)),
            config=config,
            tokenizer_hash=tokenizer_hash(checkpoint),
            data=views,
            seed=seed,
            batch_size=batch_size,
            overwrite=overwrite,
            progress=progress,
        )
