"""Published checkpoint files: reading, mapping both ways, writing; the only place that knows their names.

Masks and scale numbers that such files carry as buffers are never loaded: what a token sees follows from the
configuration, and so do the buffers of an export. (A VAR file carries VAR's mask, which would turn an MVAR into a VAR.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mvar_core.classes import imagenet_names
from mvar_core.config import AttentionConfig, ModelConfig, SamplingConfig, TokenizerConfig, TransformerConfig
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.io.files import atomic_path
from mvar_core.io.weights import check_finite, is_safetensors, load_torch_file, read_weights, state_dict_in
from mvar_core.models import directory
from mvar_core.models.meta import meta_device
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import PUBLISHED_PYRAMIDS, ScalePrefixes, ScalePyramid, auto_windows, mvar_windows, spread_window

Kind = Literal["var", "mvar"]
State = dict[str, Tensor]

BUFFERS = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")
"""Last components of the names of published buffers, which follow from the configuration."""

FLOAT32_MODULES = ("quantizer.", "head.", "head_modulation.")
"""Modules that compute in float32 in any case, and are therefore stored in it."""

PUBLISHED_SAMPLING: dict[tuple[Kind, int], SamplingConfig] = {
    ("mvar", 16): SamplingConfig(cfg=2.7, top_k=1200, top_p=0.99),
    ("mvar", 20): SamplingConfig(cfg=1.5, top_k=900, top_p=0.96),
    ("mvar", 24): SamplingConfig(cfg=1.4, top_k=900, top_p=0.96),
}
"""Published sampling settings by kind and depth; every other model has VAR's."""

_TRANSFORMER_NAMES = {
    "class_embedding": "class_emb",
    "start_position": "pos_start",
    "position_embedding": "pos_1LC",
    "scale_embedding": "lvl_embed",
    "input_projection": "word_embed",
    "head_modulation": "head_nm.ada_lin.1",
    "shared_modulation": "shared_ada_lin.1",
    "modulation": "ada_lin.1",
    "modulation_offset": "ada_gss",
    "attention": "attn",
    "qkv": "mat_qkv",
    "query_bias": "q_bias",
    "value_bias": "v_bias",
    "log_head_scale": "scale_mul_1H11",
    "projection": "proj",
    "mlp": "ffn",
    "up": "fc1",
    "down": "fc2",
}
_TOKENIZER_NAMES = {
    "quantizer": "quantize",
    "codebook": "embedding.weight",
    "residual_convs": "quant_resi.qresi_ls",
    "quantizer_conv": "quant_conv",
    "decoder_conv": "post_quant_conv",
    "input_conv": "conv_in",
    "output_norm": "norm_out",
    "output_conv": "conv_out",
    "middle": "mid",
    "blocks": "block",
    "attentions": "attn",
    "shortcut": "nin_shortcut",
    "projection": "proj_out",
}
"""Published components of a name by ours; components that are not listed are the same."""


def transformer_name(name: str) -> str:
    """The published name of a parameter of the transformer."""
    return ".".join(_TRANSFORMER_NAMES.get(component, component) for component in name.split("."))


def tokenizer_name(name: str, config: TokenizerConfig) -> str:
    """The published name of a parameter of the VQVAE."""
    name = ".".join(_TOKENIZER_NAMES.get(component, component) for component in name.split("."))
    name = re.sub(r"(qresi_ls\.\d+)\.conv", r"\1", name)
    # The middle's modules are attributes of their own, counted from 1.
    name = re.sub(r"(mid\.\w+)\.(\d+)", lambda found: f"{found[1]}_{int(found[2]) + 1}", name)
    if name.startswith("encoder."):
        return name.replace("levels", "down").replace("resample", "downsample")
    # Published decoders number their levels from the finest, ours from the first that runs.
    finest = len(config.channel_multipliers) - 1
    name = re.sub(r"levels\.(\d+)", lambda found: f"up.{finest - int(found[1])}", name)
    return name.replace("resample", "upsample")


def published_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The published shape of a tensor of ours: only the scale per head has axes of its own."""
    return (1, tensor.numel(), 1, 1) if name.endswith("scale_mul_1H11") else tuple(tensor.shape)


def is_buffer(name: str) -> bool:
    """Whether a published name is that of a buffer, which is never loaded."""
    return name.rsplit(".", 1)[-1] in BUFFERS


def read_official(path: Path, *, mapped: bool = True, checksums: bool = True) -> State:
    """The tensors of a file, .pth or .safetensors; other arguments as of `load_torch_file`.

    Raises:
        CheckpointError: The file is missing or damaged, holds code, or what it holds is no weights.
    """
    if is_safetensors(path):
        state = read_weights(path)
    else:
        content = load_torch_file(path, mapped=mapped, checksums=checksums)
        for wrapper in ("trainer", "mvar_wo_ddp", "var_wo_ddp", "state_dict", "model"):
            if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
        state = state_dict_in(content, path, is_buffer)
    # Wrappers for compiling and distribution put prefixes before a name.
    return {name.removeprefix("_orig_mod.").removeprefix("module."): value for name, value in state.items()}


def kind_of_file(path: Path) -> Kind:
    """Which system wrote a transformer's file: MVAR files name themselves, bare ones are VAR's."""
    content = {} if is_safetensors(path) else load_torch_file(path, checksums=False)
    inner = content.get("trainer", content) if isinstance(content, Mapping) else {}
    return "mvar" if isinstance(inner, Mapping) and "mvar_wo_ddp" in inner else "var"


class Converted(NamedTuple):
    """Published files under our names; `transformer` is None for a tokenizer alone."""

    config: ModelConfig
    tokenizer: State
    transformer: State | None


def convert(model: Path | None, tokenizer: Path, **overrides: Any) -> Converted:
    """Read published files; arguments as of `read_config`.

    Raises:
        CheckpointError: A file cannot be read or does not fit.
        ConfigError: A pyramid, windows or prefixes that do not fit.
    """
    config = read_config(model, tokenizer, **overrides)
    return Converted(
        config,
        tokenizer_from_official(read_official(tokenizer), config, tokenizer),
        transformer_from_official(read_official(model), config, model) if model else None,
    )


def read_config(model: Path | None, tokenizer: Path, *, kind: Kind | None = None, **overrides: Any) -> ModelConfig:
    """The configuration of published files, of whose tensors nothing but the shapes is read.

    Args:
        model: Published transformer, or None for a tokenizer alone.
        tokenizer: Published VQVAE.
        kind: None as the file says.
        **overrides: patch_sizes, windows and scale_prefixes of `infer_config`.
    """
    kind = kind or (kind_of_file(model) if model else "var")
    states = (read_official(model, checksums=False) if model else None, read_official(tokenizer, checksums=False))
    try:
        config = infer_config(*states, kind, name=(model or tokenizer).stem, **overrides)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{model or tokenizer}: {error.message}", error.hint) from None
    provenance = {"source": (model or tokenizer).name, "source_tokenizer": tokenizer.name}
    return config.model_copy(update={"provenance": provenance})


def tokenizer_next_to(model: Path) -> Path:
    """The published tokenizer next to a published transformer; CheckpointError for none or more than one."""
    found = sorted(path for path in model.parent.glob("*.pth") if path.name.startswith(("vae", "vqvae")))
    if len(found) != 1:
        what = f"{len(found)} of them lie" if found else "none lies"
        raise CheckpointError(
            f"{model} is a transformer and needs its tokenizer (vae*.pth), but {what} next to it.",
            "Name it with --tokenizer, or convert both once with `mvar convert`.",
        )
    return found[0]


def import_official(
    model: Path | None, tokenizer: Path, out: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> ModelConfig:
    """Write a model directory from published files, as `convert` reads them.

    Tokenizer and transformer are converted one after the other, so that the peak of memory is one of them. Quantizer
    and head stay in float32 whatever the dtype.
    """
    config = read_config(model, tokenizer, **overrides)
    # Pages of a mapping stay until it is closed; tensors that are read can be freed one by one as they are cast.
    mapped = dtype == torch.float32
    state = tokenizer_from_official(read_official(tokenizer, mapped=mapped), config, tokenizer)
    directory.save_tensors(out / directory.TOKENIZER_FILE, _cast(state, dtype))
    del state
    if model is not None:
        state = transformer_from_official(read_official(model, mapped=mapped), config, model)
        directory.save_tensors(out / directory.TRANSFORMER_FILE, _cast(state, dtype))
    directory.save_config(out, config)
    return config


def _cast(state: State, dtype: torch.dtype) -> State:
    """The state in another dtype; empties the original to free memory."""
    cast = {}
    for name in list(state):
        value = state.pop(name)
        cast[name] = value if name.startswith(FLOAT32_MODULES) else value.to(dtype)
    return cast


def kind_of(config: ModelConfig) -> Kind:
    """The kind that a model is exported as by default, which follows from the scale prefixes."""
    return "var" if config.attention.scale_prefixes == "all" else "mvar"


def published_names(config: ModelConfig, kind: Kind | None = None) -> list[str]:
    """Names of a model's published files: vae.pth and, with a transformer, KIND_dNN.pth."""
    transformer = config.transformer
    return ["vae.pth", *([f"{kind or kind_of(config)}_d{transformer.depth}.pth"] if transformer else [])]


def export_official(source: Path, out: Path, *, kind: Kind | None = None, verify: bool = True) -> None:
    """Write the published files of a model directory; MVAR's nest the state as published.

    `verify` as in `load_transformer`. Equal models have equal bytes.
    """
    config = directory.read_model_config(source)
    paths = [out / name for name in published_names(config, kind)]
    state = directory.load_tokenizer(source, config, verify=verify).state_dict()
    save_official(tokenizer_to_official(state, config), paths[0])
    if config.transformer is not None:
        state = directory.load_transformer(source, config, verify=verify).state_dict()
        wrapper = "mvar_wo_ddp" if (kind or kind_of(config)) == "mvar" else None
        save_official(transformer_to_official(state, config), paths[1], wrapper=wrapper)


def tokenizer_hash_of(checkpoint: Path, tokenizer: Path | None = None) -> str:
    """The hash by which a token cache knows the tokenizer of a model directory or published file."""
    if checkpoint.is_dir():
        return directory.tokenizer_hash(checkpoint)
    return directory.state_hash(convert(checkpoint, tokenizer or tokenizer_next_to(checkpoint)).tokenizer)


def infer_config(
    transformer: Mapping[str, Tensor] | None,
    tokenizer: Mapping[str, Tensor],
    kind: Kind,
    *,
    patch_sizes: Sequence[int | tuple[int, int]] | None = None,
    windows: Sequence[int] | int | str | None = None,
    scale_prefixes: ScalePrefixes | str | None = None,
    name: str | None = None,
) -> ModelConfig:
    """Read a model's configuration off the shapes of its published tensors.

    Args:
        transformer: Published transformer state, or None for a tokenizer alone.
        tokenizer: Published VQVAE state.
        kind: Decides the attention where it is not specified: VAR sees all scales whole; MVAR sees its own scale alone,
            in windows of 7 on the last two scales and, in large pyramids, wherever else they pay.
        patch_sizes: The pyramid; None for a published one.
        windows: One per scale, one number for the last two, or auto (auto:K) for those where it pays; also as text.
        scale_prefixes: How many scales a token sees.
        name: What the model is called.

    Raises:
        CheckpointError: A tensor from which a size is read is missing, or the pyramid cannot be inferred.
        ConfigError: Windows or prefixes that do not fit the pyramid.
    """
    tokenizer_config = _infer_tokenizer(tokenizer)
    transformer_config = None
    if transformer is not None:
        transformer_config = _infer_transformer(transformer, kind)
        found = (_shape(transformer, "lvl_embed.weight", 2)[0], _shape(transformer, "pos_1LC", 3)[1])
        patch_sizes = patch_sizes or _published_pyramid(*found)
        pyramid = ScalePyramid.from_patch_sizes(patch_sizes)
        if (pyramid.num_scales, pyramid.num_tokens) != found:
            raise ConfigError(
                f"--pyramid {pyramid.spelled} has {pyramid.num_scales} scales and {pyramid.num_tokens} tokens, but the"
                f" file was trained with {found[0]} scales and {found[1]} tokens."
            )
        vocabulary, latent = _shape(transformer, "head.weight", 2)[0], _shape(transformer, "word_embed.weight", 2)[1]
        if (vocabulary, latent) != (tokenizer_config.codebook_size, tokenizer_config.latent_channels):
            raise CheckpointError(
                f"the transformer was trained with a codebook of {vocabulary} × {latent}, but the tokenizer's is"
                f" {tokenizer_config.codebook_size} × {tokenizer_config.latent_channels}: they do not belong together."
            )
    pyramid = ScalePyramid.from_patch_sizes(patch_sizes or PUBLISHED_PYRAMIDS[256])
    if windows is None:
        windows = mvar_windows(pyramid) if kind == "mvar" else 0
    if isinstance(windows, str):
        numbers = re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", windows)
        windows = [int(window) for window in windows.split(",")] if numbers else auto_windows(windows, pyramid)
        windows = windows[0] if len(windows) == 1 else windows
    if isinstance(windows, int):
        windows = spread_window(windows, (0,) * pyramid.num_scales)
    if scale_prefixes is None:
        scale_prefixes = 1 if kind == "mvar" else "all"
    height, width = (side * tokenizer_config.downsample for side in pyramid.latent_grid)
    depth = transformer_config.depth if transformer_config else 0
    sampling = PUBLISHED_SAMPLING.get((kind, depth), SamplingConfig(cfg=1.5, top_k=900, top_p=0.96))
    class_names = None
    if transformer_config and transformer_config.num_classes == 1000:  # published models of 1000 classes know ImageNet
        class_names = imagenet_names()
    return ModelConfig(
        name=name or f"{kind}-d{depth}-{height}",
        image_size=(height, width),
        patch_sizes=pyramid.patch_sizes,
        tokenizer=tokenizer_config,
        transformer=transformer_config,
        attention=AttentionConfig(scale_prefixes=scale_prefixes, windows=tuple(windows)),
        sampling=sampling.model_copy(update={"top_k": min(sampling.top_k, tokenizer_config.codebook_size)}),
        class_names=class_names,
    )


def _shape(state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{name} is missing from the file; expected a published VAR, MVAR or VQVAE state.")
    shape = tuple(state[name].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{name} has shape {shape}; expected {axes} axes, none of them empty.")
    return shape


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of distinct indices that follow `prefix` in the names."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _infer_transformer(state: Mapping[str, Tensor], kind: Kind) -> TransformerConfig:
    width = _shape(state, "word_embed.weight", 2)[0]
    depth = _count(state, "blocks.")
    scale_name = "blocks.0.attn.scale_mul_1H11"
    return TransformerConfig(
        depth=depth,
        embed_dim=width,
        num_heads=_shape(state, scale_name, 4)[1] if scale_name in state else max(1, width // 64),
        mlp_ratio=_shape(state, "blocks.0.ffn.fc1.weight", 2)[0] / width,
        num_classes=_shape(state, "class_emb.weight", 2)[0] - 1,
        shared_adaln="shared_ada_lin.1.weight" in state,
        l2_attention=scale_name in state,
        drop_path=min(0.1 * depth / 24, 0.9),
        gate_init=1e-3 if kind == "mvar" else 1e-5,
    )


def _published_pyramid(scales: int, tokens: int) -> tuple[int, ...]:
    for sides in PUBLISHED_PYRAMIDS.values():
        if (len(sides), sum(side * side for side in sides)) == (scales, tokens):
            return sides
    raise CheckpointError(
        f"the file was trained with {scales} scales and {tokens} tokens, which is none of the published pyramids.",
        "Convert it with its sizes: mvar convert --pyramid 1,2,3x4 …",
    )


def _infer_tokenizer(state: Mapping[str, Tensor]) -> TokenizerConfig:
    base = _shape(state, "encoder.conv_in.weight", 4)[0]
    levels = range(_count(state, "encoder.down."))
    codebook_size, latent = _shape(state, "quantize.embedding.weight", 2)
    groups = 32
    while base % groups:
        groups //= 2
    return TokenizerConfig(
        codebook_size=codebook_size,
        latent_channels=latent,
        base_channels=base,
        channel_multipliers=[_shape(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // base for i in levels],
        encoder_blocks=_count(state, "encoder.down.0.block."),
        decoder_blocks=_count(state, "decoder.up.0.block."),
        middle_blocks=_count(state, "encoder.mid.block_"),
        attention=any(".mid.attn_" in name or ".attn." in name for name in state),
        norm_groups=groups,
        residual_convs=_count(state, "quantize.quant_resi.qresi_ls."),
    )


def transformer_from_official(state: Mapping[str, Tensor], config: ModelConfig, source: str | Path) -> State:
    """Our transformer state from a published one, without buffers; CheckpointError names keys that do not fit."""
    with meta_device():
        ours = Transformer(config).state_dict()
    return _from_official(state, ours, transformer_name, source)


def tokenizer_from_official(state: Mapping[str, Tensor], config: ModelConfig, source: str | Path) -> State:
    """Our VQVAE state from a published one, likewise."""
    with meta_device():
        ours = VQVAE(config.tokenizer, config.pyramid).state_dict()
    return _from_official(state, ours, lambda name: tokenizer_name(name, config.tokenizer), source)


def _from_official(state: Mapping[str, Tensor], ours: State, named: Callable[[str], str], source: str | Path) -> State:
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if not is_buffer(name)}
    expected = {named(name): published_shape(named(name), tensor) for name, tensor in ours.items()}
    directory.check_state(found, expected, source)
    return {
        name: check_finite(state[named(name)], named(name), Path(source)).reshape(tensor.shape)
        for name, tensor in ours.items()
    }


def transformer_to_official(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """The published transformer state, with the buffers that the configuration implies.

    Raises:
        CheckpointError: The model is conditioned on vectors, which no published format knows.
    """
    assert config.transformer is not None
    if config.conditioning.dim is not None:
        raise CheckpointError(
            f"{config.name} is conditioned on vectors; published files know class labels alone.",
            "Keep it as a model directory, or train a model with conditioning.kind=class.",
        )
    pyramid, prefixes = config.pyramid, config.attention.scale_prefixes
    scales_L = torch.tensor(pyramid.scale_of_token)
    first_L = torch.tensor([pyramid.first_visible_scale(scale, prefixes) for scale in pyramid.scale_of_token])
    visible_LL = (scales_L[None, :] <= scales_L[:, None]) & (scales_L[None, :] >= first_L[:, None])
    mask_LL = torch.zeros(visible_LL.shape).masked_fill(~visible_LL, -torch.inf)
    zero_bias = {
        f"blocks.{layer}.attn.zero_k_bias": torch.zeros(config.transformer.embed_dim)
        for layer in range(config.transformer.depth)
    }
    published = _to_official(state, transformer_name)
    return {**published, "lvl_1L": scales_L[None], "attn_bias_for_masking": mask_LL[None, None], **zero_bias}


def tokenizer_to_official(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """The published VQVAE state, with an empty usage counter."""
    published = _to_official(state, lambda name: tokenizer_name(name, config.tokenizer))
    counter = torch.zeros(config.pyramid.num_scales, config.tokenizer.codebook_size)
    return {**published, "quantize.ema_vocab_hit_SV": counter}


def _to_official(state: Mapping[str, Tensor], named: Callable[[str], str]) -> State:
    published = {named(name): tensor.detach().cpu() for name, tensor in state.items()}
    return {name: tensor.reshape(published_shape(name, tensor)).contiguous() for name, tensor in published.items()}


def save_official(state: State, path: Path, *, wrapper: str | None = None) -> None:
    """Write a published file, whole or not at all; `wrapper` is the key that MVAR's files nest the state under."""
    # Into an open file: given a path, torch would write its name, here a random one, into the file.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save({wrapper: state} if wrapper else state, file)
