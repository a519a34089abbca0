"""Model directories: config.json, transformer.safetensors, tokenizer.safetensors and a README.md.

A tokenizer alone is the same directory without the transformer; a run directory is a model directory with more in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mvar_core.config import ConditioningConfig, ModelConfig
from mvar_core.config.section import validate
from mvar_core.errors import CheckpointError, ConfigError, nearest, shown
from mvar_core.io.files import atomic_path, sha256_of_file, write_json, write_text
from mvar_core.io.weights import shapes_of, tensors_of
from mvar_core.models.meta import meta_device
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.untrusted import read_json

CONFIG_FILE = "config.json"
TRANSFORMER_FILE = "transformer.safetensors"
TOKENIZER_FILE = "tokenizer.safetensors"
CARD_FILE = "README.md"
HASHES = "sha256"
"""In the provenance of config.json: the SHA-256 of each file of weights, by its name."""


def save_model(
    directory: Path,
    config: ModelConfig,
    *,
    tokenizer: Mapping[str, Tensor],
    transformer: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model directory from states under our names; each file is whole or absent, config.json comes last.

    What else the directory holds stays. Without a transformer the configuration's section of it is left out.
    """
    save_tensors(directory / TOKENIZER_FILE, tokenizer)
    if transformer is None:
        config = config.model_copy(update={"transformer": None, "conditioning": ConditioningConfig()})
    else:
        save_tensors(directory / TRANSFORMER_FILE, transformer)
    save_config(directory, config)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of weights, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def save_config(directory: Path, config: ModelConfig) -> None:
    """Write config.json, with the hashes of the weights that are there, and the model card."""
    names = (TOKENIZER_FILE, *((TRANSFORMER_FILE,) if config.transformer is not None else ()))
    hashes = {name: sha256_of_file(directory / name) for name in names}
    provenance = {**config.provenance, "tokenizer_hash": tokenizer_hash(directory), HASHES: hashes}
    config = config.model_copy(update={"provenance": provenance})
    values = config.model_dump(mode="json")
    values["attention"]["windows"] = list(config.windows)
    write_text(directory / CARD_FILE, model_card(config))
    write_json(directory / CONFIG_FILE, values)


def read_model_config(directory: Path) -> ModelConfig:
    """The configuration of a model directory; CheckpointError where it has none, or one that describes no model."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        found = (
            "is a file" if directory.is_file() else f"has no {CONFIG_FILE}" if directory.exists() else "does not exist"
        )
        hint = "Make one with `mvar train`, `mvar train-tokenizer` or `mvar convert`."
        inside = [directory] if directory.is_file() else sorted(directory.glob("*.pt*")) if directory.is_dir() else []
        if inside:
            hint = (
                f"If {inside[0]} is published, make one of it: `mvar convert --model FILE --tokenizer FILE --out DIR`."
            )
        raise CheckpointError(f"{directory} {found}; expected a model directory.", hint)
    try:
        config: ModelConfig = validate(ModelConfig, read_json(path, CheckpointError), str(path))
    except ConfigError as error:
        where = "" if error.message.startswith(str(path)) else f"{path}: "
        raise CheckpointError(where + error.message, "Make the model again, or copy its config.json again.") from None
    return config


def load_transformer(
    directory: Path,
    config: ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    verify: bool = True,
) -> Transformer:
    """The transformer of a model directory, in evaluation mode; the head stays in float32.

    With `verify` the file is compared with the hash that config.json recorded when it was saved, where it has one.
    CheckpointError where it is missing, damaged, or does not fit the configuration.
    """
    if config.transformer is None or not (directory / TRANSFORMER_FILE).is_file():
        raise CheckpointError(
            f"{directory} holds a tokenizer but no transformer ({TRANSFORMER_FILE}).",
            f"Name a model's directory, or train one: mvar train --data IMAGES --tokenizer {directory} --out MODEL",
        )
    with meta_device():
        model = Transformer(config).to_compute_dtype(dtype)
    _load(model, directory / TRANSFORMER_FILE, device, verify=verify)
    return model.eval().requires_grad_(False)


def load_tokenizer(
    directory: Path,
    config: ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    encoder: bool = True,
    verify: bool = True,
) -> VQVAE:
    """The tokenizer of a model directory, in evaluation mode; the quantizer stays in float32.

    Without `encoder` the encoder, which sampling does not need, is left out; otherwise as `load_transformer`.
    """
    with meta_device():
        model = VQVAE(config.tokenizer, config.pyramid).to_compute_dtype(dtype)
        whole = model.state_dict()
        if not encoder:
            model.drop_encoder()
    _load(model, directory / TOKENIZER_FILE, device, whole, verify=verify)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def tokenizer_hash(directory: Path) -> str:
    """SHA-256 over names, shapes, types and values of a directory's tokenizer; the same after any copy or rewrite."""
    path = directory / TOKENIZER_FILE
    return _hash_of(tensors_of(path, sorted(shapes_of(path))))


def state_hash(state: Mapping[str, Tensor]) -> str:
    """The `tokenizer_hash` of a directory that this tokenizer, in our names, is written to."""
    return _hash_of((name, state[name].detach().cpu()) for name in sorted(state))


def _hash_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.ndim else b"")
    return digest.hexdigest()


def check_state(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str | Path
) -> None:
    """Refuse shapes by name that are not exactly a model's (CheckpointError, which names what differs)."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshaped = [
        f"{name} is {tuple(found[name])}, expected {tuple(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    kinds = {"missing": missing, "unexpected": extra, "wrong shape:": misshaped}
    if problems := [f"{kind} {_some(names)}" for kind, names in kinds.items() if names]:
        hint = nearest(missing[0], extra) if len(missing) == len(extra) == 1 else None
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}.", hint)


def model_card(config: ModelConfig) -> str:
    """A README for the model directory, in Markdown."""
    what, command = "multi-scale residual VQVAE (tokenizer)", "tokenize --tokenizer . --data FOLDER --out tokens"
    facts = []
    if (transformer := config.transformer) is not None:
        what, command = (
            "next-scale visual autoregressive model",
            "sample --checkpoint . --class 0 --num 8 --out samples",
        )
        prefixes = config.attention.scale_prefixes
        sees = "all earlier scales (VAR)" if prefixes == "all" else f"{prefixes} scale(s), its own included"
        windows = ", ".join(str(window) if window else "whole" for window in config.windows)
        conditions = f"{transformer.num_classes} classes"
        if (dim := config.conditioning.dim) is not None:
            encoder = f" ({config.conditioning.encoder})" if config.conditioning.encoder else ""
            conditions = f"conditioned on vectors of {dim} values{encoder}"
        facts = [
            f"transformer: depth {transformer.depth}, width {transformer.embed_dim},"
            f" {transformer.num_heads} heads, {conditions}",
            f"a token sees {sees}; windows per scale: {windows}",
            f"recommended sampling: {config.sampling.summary}",
        ]
    codebook = f"{config.tokenizer.codebook_size} × {config.tokenizer.latent_channels}"
    facts.append(f"token maps: {config.pyramid} ({config.pyramid.num_tokens} tokens); codebook of {codebook}")
    facts += [f"{key.replace('_', ' ')}: {value}" for key, value in config.provenance.items() if key != HASHES]
    height, width = config.image_shape
    lines = [f"# {config.name}", "", f"A {what} for {height}×{width} images.", "", *(f"- {fact}" for fact in facts)]
    return "\n".join([*lines, "", "```bash", f"mvar {command}", "```", ""])


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _check_hash(path: Path) -> None:
    values = read_json(path.parent / CONFIG_FILE, CheckpointError)
    for key in ("provenance", HASHES, path.name):
        values = values.get(key) if isinstance(values, dict) else None
    if (expected := values) is not None and (found := sha256_of_file(path)) != expected:
        raise CheckpointError(
            f"{path} is not what was saved: its SHA-256 is {found}, {CONFIG_FILE} records {shown(expected)}.",
            "Copy or convert the model again; if you changed the file on purpose, add --no-verify (verify=False).",
        )


def _load(
    model: nn.Module, path: Path, device: torch.device | str, whole: Mapping[str, Tensor] | None = None, *, verify: bool
) -> None:
    """Fill a model that is on the meta device, in the dtypes that it has there.

    On a CPU, tensors that are stored in the model's dtype stay mapped from the file: they are read when they are used,
    and the system may drop and read them again when memory is short. `whole` is what the file must hold, where the
    model lacks some of it.
    """
    expected = model.state_dict()
    if verify and path.is_file() and (path.parent / CONFIG_FILE).is_file():
        _check_hash(path)
    check_state(shapes_of(path), {name: tuple(tensor.shape) for name, tensor in (whole or expected).items()}, path)
    state = {name: tensor.to(device, expected[name].dtype) for name, tensor in tensors_of(path, expected)}
    model.load_state_dict(state, assign=True)
