"""Published files to a model directory and back, one part at a time.

Tokenizer and transformer are converted one after the other, so that the peak of memory is one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mvar_core.config import ModelConfig
from mvar_core.models import directory, official
from mvar_core.pyramid import ScalePrefixes

FLOAT32_PARTS = ("quantizer.", "head.", "head_modulation.")
"""Parts whose results need float32 in any case, and which are therefore stored in it."""


def import_official(
    model: Path | None,
    tokenizer: Path,
    out: Path,
    *,
    kind: official.Kind | None = None,
    patch_sizes: Sequence[int | tuple[int, int]] | None = None,
    windows: Sequence[int] | int | str | None = None,
    scale_prefixes: ScalePrefixes | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelConfig:
    """Write a model directory from published files.

    Args:
        model: Published transformer, or None for a tokenizer alone.
        tokenizer: Published VQVAE.
        out: The directory.
        kind: See `official.infer_config`, as for the next three.
        patch_sizes: The pyramid.
        windows: One per scale, one for the last two, or auto (auto:K) for the scales where it pays.
        scale_prefixes: How many scales a token sees.
        dtype: Of the weights; quantizer and head stay in float32.

    Raises:
        CheckpointError: A file cannot be read or does not fit.
        ConfigError: A pyramid, windows or prefixes that do not fit.
    """
    # Maps the files and reads nothing of their tensors but the shapes.
    config = official.convert(
        model, tokenizer, kind=kind, patch_sizes=patch_sizes, windows=windows, scale_prefixes=scale_prefixes
    ).config
    # Pages of a mapping stay until it is closed; tensors that are read can be freed one by one as they are cast.
    mapped = dtype == torch.float32
    state = official.tokenizer_from_official(official.read_official(tokenizer, mapped=mapped), config, tokenizer)
    directory.save_tokenizer(out, _cast(state, dtype))
    del state
    if model is not None:
        state = official.transformer_from_official(official.read_official(model, mapped=mapped), config, model)
        directory.save_transformer(out, _cast(state, dtype))
    directory.save_config(out, config)
    return config


def export_official(source: Path, out: Path, *, kind: official.Kind | None = None) -> list[Path]:
    """Write the published files of a model directory: vae.pth and, with a transformer, KIND_dNN.pth.

    Args:
        source: The model directory.
        out: The folder.
        kind: Names the file and, for mvar, nests the state as published; by default as the scale prefixes say.

    Raises:
        CheckpointError: The directory cannot be read.
    """
    config = directory.read_model_config(source)
    tokenizer_path = out / "vae.pth"
    tokenizer = directory.load_tokenizer(source, config).state_dict()
    official.save_official(official.tokenizer_to_official(tokenizer, config), tokenizer_path)
    del tokenizer
    if config.transformer is None:
        return [tokenizer_path]
    kind = kind or ("var" if config.attention.scale_prefixes == "all" else "mvar")
    model_path = out / f"{kind}_d{config.transformer.depth}.pth"
    transformer = directory.load_transformer(source, config).state_dict()
    state = official.transformer_to_official(transformer, config)
    official.save_official(state, model_path, wrapper="mvar_wo_ddp" if kind == "mvar" else None)
    return [tokenizer_path, model_path]


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state in another dtype; empties the given one on the way."""
    cast = {}
    for name in list(state):
        value = state.pop(name)
        cast[name] = value if name.startswith(FLOAT32_PARTS) else value.to(dtype)
    return cast


def tokenizer_hash_of(checkpoint: Path, tokenizer: Path | None = None) -> str:
    """The hash by which a token cache knows a model's tokenizer; of a published file that of what it converts to.

    Args:
        checkpoint: A model directory or a published file.
        tokenizer: The published tokenizer, or None for the one beside the file.

    Raises:
        CheckpointError: Nothing there that can be read.
    """
    if checkpoint.is_dir():
        return directory.tokenizer_hash(checkpoint)
    converted = official.convert(checkpoint, tokenizer or official.tokenizer_beside(checkpoint))
    return directory.state_hash(converted.tokenizer)
