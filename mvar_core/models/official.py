"""Published checkpoint files: reading, mapping both ways, writing; the only place that knows their names.

Masks and scale numbers that such files carry as buffers are never loaded: what a token sees follows from the
configuration. (A VAR file carries VAR's mask, which would turn an MVAR into a VAR.) On export they are made from the
configuration.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mvar_core.config import AttentionConfig, ModelConfig, SamplingConfig, TokenizerConfig, TransformerConfig
from mvar_core.config.presets import presets_directory
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.io.files import atomic_path
from mvar_core.models import directory
from mvar_core.models.meta import meta_device
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import PUBLISHED_PYRAMIDS, ScalePrefixes, ScalePyramid, auto_windows, mvar_windows, spread_window

Kind = Literal["var", "mvar"]
State = dict[str, Tensor]

BUFFERS = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")
"""Last components of the names of published buffers, which follow from the configuration."""

IMAGENET_CLASSES = 1000

FLOAT32_PARTS = ("quantizer.", "head.", "head_modulation.")
"""Modules whose results need float32 in any case, and which are therefore stored in it."""

PUBLISHED_SAMPLING: dict[tuple[Kind, int], SamplingConfig] = {
    ("mvar", 16): SamplingConfig(cfg=2.7, top_k=1200, top_p=0.99),
    ("mvar", 20): SamplingConfig(cfg=1.5, top_k=900, top_p=0.96),
    ("mvar", 24): SamplingConfig(cfg=1.4, top_k=900, top_p=0.96),
}
"""Published sampling settings by kind and depth; every other model has VAR's."""


def read_official(path: Path, *, mapped: bool = True) -> State:
    """The tensors of a .pth file.

    Args:
        path: The file.
        mapped: Map the file into memory rather than read it.

    Raises:
        CheckpointError: The file is missing, damaged, holds no tensors, or holds code.
    """
    content = _load_file(path, mapped)
    for wrapper in ("trainer", "mvar_wo_ddp", "var_wo_ddp", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict; expected a published VAR, MVAR or VQVAE file.")
    return {_bare(str(name)): tensor for name, tensor in content.items()}


def kind_of_file(path: Path) -> Kind:
    """Which system wrote a transformer's file: MVAR files name themselves, bare ones are VAR's."""
    content = _load_file(path)
    inner = content.get("trainer", content) if isinstance(content, Mapping) else {}
    return "mvar" if isinstance(inner, Mapping) and "mvar_wo_ddp" in inner else "var"


@dataclass(frozen=True)
class Converted:
    """Published files in our terms.

    Attributes:
        config: What the model is, its provenance included.
        tokenizer: VQVAE state.
        transformer: Transformer state, or None for a tokenizer alone.
    """

    config: ModelConfig
    tokenizer: State
    transformer: State | None


def convert(
    model: Path | None,
    tokenizer: Path,
    *,
    kind: Kind | None = None,
    **overrides: Any,
) -> Converted:
    """Read published files.

    Args:
        model: Published transformer, or None for a tokenizer alone.
        tokenizer: Published VQVAE.
        kind: None as the file says.
        **overrides: patch_sizes, windows and scale_prefixes of `infer_config`.

    Raises:
        CheckpointError: A file cannot be read or does not fit.
        ConfigError: A pyramid, windows or prefixes that do not fit.
    """
    tokenizer_state = read_official(tokenizer)
    model_state = read_official(model) if model else None
    config = infer_config(
        model_state,
        tokenizer_state,
        kind or (kind_of_file(model) if model else "var"),
        name=model.stem if model else tokenizer.stem,
        **overrides,
    )
    provenance = {"source": model.name if model else tokenizer.name, "source_tokenizer": tokenizer.name}
    config = config.model_copy(update={"provenance": provenance})
    return Converted(
        config,
        tokenizer_from_official(tokenizer_state, config, tokenizer),
        transformer_from_official(model_state, config, model) if model and model_state is not None else None,
    )


def tokenizer_next_to(model: Path) -> Path:
    """The published tokenizer that lies next to a published transformer.

    Raises:
        CheckpointError: There is none, or more than one.
    """
    found = sorted(path for path in model.parent.glob("*.pth") if path.name.startswith(("vae", "vqvae")))
    if len(found) != 1:
        what = f"{len(found)} of them lie" if found else "none lies"
        raise CheckpointError(
            f"{model} is a transformer and needs its tokenizer (vae*.pth), but {what} next to it.",
            "Name it with --tokenizer, or convert both once with `mvar convert`.",
        )
    return found[0]


def import_official(
    model: Path | None,
    tokenizer: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> ModelConfig:
    """Write a model directory from published files, as `convert` reads them.

    Tokenizer and transformer are converted one after the other, so that the peak of memory is one of them. Quantizer
    and head stay in float32 whatever the dtype.
    """
    # Maps the files and reads nothing of their tensors but the shapes.
    config = convert(model, tokenizer, **overrides).config
    # Pages of a mapping stay until it is closed; tensors that are read can be freed one by one as they are cast.
    mapped = dtype == torch.float32
    state = tokenizer_from_official(read_official(tokenizer, mapped=mapped), config, tokenizer)
    directory.save_tokenizer(out, _cast(state, dtype))
    del state
    if model is not None:
        state = transformer_from_official(read_official(model, mapped=mapped), config, model)
        directory.save_transformer(out, _cast(state, dtype))
    directory.save_config(out, config)
    return config


def export_official(source: Path, out: Path, *, kind: Kind | None = None) -> list[Path]:
    """Write the published files of a model directory: vae.pth and, with a transformer, KIND_dNN.pth.

    MVAR's files nest the state as published; the default kind follows from the scale prefixes.
    """
    config = directory.read_model_config(source)
    tokenizer_path = out / "vae.pth"
    tokenizer = directory.load_tokenizer(source, config).state_dict()
    save_official(tokenizer_to_official(tokenizer, config), tokenizer_path)
    del tokenizer
    if config.transformer is None:
        return [tokenizer_path]
    kind = kind or ("var" if config.attention.scale_prefixes == "all" else "mvar")
    model_path = out / f"{kind}_d{config.transformer.depth}.pth"
    transformer = directory.load_transformer(source, config).state_dict()
    state = transformer_to_official(transformer, config)
    save_official(state, model_path, wrapper="mvar_wo_ddp" if kind == "mvar" else None)
    return [tokenizer_path, model_path]


def tokenizer_hash_of(checkpoint: Path, tokenizer: Path | None = None) -> str:
    """The hash by which a token cache knows the tokenizer of a model directory or published file."""
    if checkpoint.is_dir():
        return directory.tokenizer_hash(checkpoint)
    converted = convert(checkpoint, tokenizer or tokenizer_next_to(checkpoint))
    return directory.state_hash(converted.tokenizer)


def infer_config(
    transformer: Mapping[str, Tensor] | None,
    tokenizer: Mapping[str, Tensor],
    kind: Kind,
    *,
    patch_sizes: Sequence[int | tuple[int, int]] | None = None,
    windows: Sequence[int] | int | str | None = None,
    scale_prefixes: ScalePrefixes | None = None,
    name: str | None = None,
) -> ModelConfig:
    """Read a model's configuration off the shapes of its published tensors.

    Args:
        transformer: Published transformer state, or None for a tokenizer alone.
        tokenizer: Published VQVAE state.
        kind: Decides the attention where it is not given: VAR sees all scales whole; MVAR sees its own scale alone, in
            windows of 7 on the last two scales and, in large pyramids, wherever else they pay.
        patch_sizes: The pyramid; None for a published one.
        windows: One per scale, one number for the last two, or auto (auto:K) for the scales where it pays.
        scale_prefixes: How many scales a token sees.
        name: What the model is called.

    Raises:
        CheckpointError: A tensor that should tell a size is missing, or the pyramid cannot be inferred.
        ConfigError: Windows or prefixes that do not fit the pyramid.
    """
    tokenizer_config = _infer_tokenizer(tokenizer)
    if transformer is None:
        sizes = patch_sizes or PUBLISHED_PYRAMIDS[256]
        transformer_config = None
        depth = 0
    else:
        transformer_config = _infer_transformer(transformer, kind)
        sizes = patch_sizes or _infer_patch_sizes(transformer)
        depth = transformer_config.depth
        pyramid = ScalePyramid.from_patch_sizes(sizes)
        found = (_shape(transformer, "lvl_embed.weight")[0], _shape(transformer, "pos_1LC")[1])
        if (pyramid.num_scales, pyramid.num_tokens) != found:
            raise ConfigError(
                f"--pyramid {pyramid.spelled} has {pyramid.num_scales} scales and {pyramid.num_tokens} tokens, but the"
                f" file was trained with {found[0]} scales and {found[1]} tokens."
            )
        vocabulary, latent = _shape(transformer, "head.weight")[0], _shape(transformer, "word_embed.weight")[1]
        if (vocabulary, latent) != (tokenizer_config.codebook_size, tokenizer_config.latent_channels):
            raise CheckpointError(
                f"the transformer was trained with a codebook of {vocabulary} × {latent}, but the tokenizer's is"
                f" {tokenizer_config.codebook_size} × {tokenizer_config.latent_channels}: they do not belong together."
            )
    if windows is None:
        windows = mvar_windows(ScalePyramid.from_patch_sizes(sizes)) if kind == "mvar" else 0
    if isinstance(windows, int):
        windows = spread_window(windows, (0,) * len(sizes))
    elif isinstance(windows, str):
        windows = auto_windows(windows, ScalePyramid.from_patch_sizes(sizes))
    latent_grid = ScalePyramid.from_patch_sizes(sizes).latent_grid
    height, width = (side * tokenizer_config.downsample for side in latent_grid)
    if scale_prefixes is None:
        scale_prefixes = 1 if kind == "mvar" else "all"
    return _checked_config(
        name=name or f"{kind}-d{depth}-{height}",
        image_size=height if height == width else (height, width),
        patch_sizes=tuple(sizes),
        tokenizer=tokenizer_config,
        transformer=transformer_config,
        attention=AttentionConfig(scale_prefixes=scale_prefixes, windows=tuple(windows)),
        sampling=_published_sampling(kind, depth, tokenizer_config.codebook_size),
        class_names=_published_class_names(transformer_config.num_classes if transformer_config else 0),
    )


def transformer_from_official(state: Mapping[str, Tensor], config: ModelConfig, source: str | Path) -> State:
    """Our transformer state from a published one; buffers are left out.

    Raises:
        CheckpointError: Names the missing, extra and misshaped keys.
    """
    with meta_device():
        ours = Transformer(config).state_dict()
    return _from_official(state, ours, transformer_names(config), source)


def transformer_to_official(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """The published transformer state, with the buffers that the configuration implies."""
    assert config.transformer is not None
    published = _to_official(state, transformer_names(config))
    pyramid = config.pyramid
    scales_L = torch.tensor(pyramid.scale_of_token)
    published["lvl_1L"] = scales_L[None]
    first_L = torch.tensor(
        [pyramid.first_visible_scale(scale, config.attention.scale_prefixes) for scale in pyramid.scale_of_token]
    )
    visible_LL = (scales_L[None, :] <= scales_L[:, None]) & (scales_L[None, :] >= first_L[:, None])
    published["attn_bias_for_masking"] = torch.zeros(visible_LL.shape).masked_fill(~visible_LL, -torch.inf)[None, None]
    for layer in range(config.transformer.depth):
        published[f"blocks.{layer}.attn.zero_k_bias"] = torch.zeros(config.transformer.embed_dim)
    return published


def tokenizer_from_official(state: Mapping[str, Tensor], config: ModelConfig, source: str | Path) -> State:
    """Our VQVAE state from a published one; the usage counter is left out.

    Raises:
        CheckpointError: Names the missing, extra and misshaped keys.
    """
    with meta_device():
        ours = VQVAE(config.tokenizer, config.pyramid).state_dict()
    return _from_official(state, ours, tokenizer_names(config.tokenizer), source)


def tokenizer_to_official(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """The published VQVAE state, with an empty usage counter."""
    published = _to_official(state, tokenizer_names(config.tokenizer))
    published["quantize.ema_vocab_hit_SV"] = torch.zeros(config.pyramid.num_scales, config.tokenizer.codebook_size)
    return published


def save_official(state: State, path: Path, *, wrapper: str | None = None) -> None:
    """Write a published file, whole or not at all; `wrapper` is the key that MVAR's files nest the state under."""
    with atomic_path(path) as temporary:
        torch.save({wrapper: state} if wrapper else state, temporary)


def _load_file(path: Path, mapped: bool = True) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a published .pth file.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it holds Python objects that would run code when loaded; expected tensors alone.",
            "If you trust its source, save its state dict again with torch.save(state_dict, path).",
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} is not a whole torch checkpoint: {first}") from None


def _bare(name: str) -> str:
    """A parameter's name without what wrappers for compiling and distribution put before it."""
    for prefix in ("_orig_mod.", "module."):
        name = name.removeprefix(prefix)
    return name


def is_buffer(name: str) -> bool:
    """Whether a published name is that of a buffer, which is never loaded."""
    return name.rsplit(".", 1)[-1] in BUFFERS


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{name} is missing from the file; expected a published VAR, MVAR or VQVAE state.")
    return tuple(state[name].shape)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of distinct indices that follow `prefix` in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _infer_transformer(state: Mapping[str, Tensor], kind: Kind) -> TransformerConfig:
    width = _shape(state, "word_embed.weight")[0]
    depth = _count(state, "blocks.")
    hidden = _shape(state, "blocks.0.ffn.fc1.weight")[0]
    scale_name = "blocks.0.attn.scale_mul_1H11"
    return TransformerConfig(
        depth=depth,
        embed_dim=width,
        num_heads=_shape(state, scale_name)[1] if scale_name in state else max(1, width // 64),
        mlp_ratio=hidden / width,
        num_classes=_shape(state, "class_emb.weight")[0] - 1,
        shared_adaln="shared_ada_lin.1.weight" in state,
        l2_attention=scale_name in state,
        drop_path=min(0.1 * depth / 24, 0.9),
        gate_init=1e-3 if kind == "mvar" else 1e-5,
    )


def _infer_patch_sizes(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    scales, tokens = _shape(state, "lvl_embed.weight")[0], _shape(state, "pos_1LC")[1]
    for sides in PUBLISHED_PYRAMIDS.values():
        if (len(sides), sum(side * side for side in sides)) == (scales, tokens):
            return sides
    raise CheckpointError(
        f"the file was trained with {scales} scales and {tokens} tokens, which is none of the published pyramids.",
        "Convert it with its sizes: mvar convert --pyramid 1,2,3x4 …",
    )


def _infer_tokenizer(state: Mapping[str, Tensor]) -> TokenizerConfig:
    base = _shape(state, "encoder.conv_in.weight")[0]
    levels = _count(state, "encoder.down.")
    widths = [_shape(state, f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    codebook_size, latent = _shape(state, "quantize.embedding.weight")
    groups = 32
    while base % groups:
        groups //= 2
    return TokenizerConfig(
        codebook_size=codebook_size,
        latent_channels=latent,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        encoder_blocks=_count(state, "encoder.down.0.block."),
        decoder_blocks=_count(state, "decoder.up.0.block."),
        middle_blocks=_count({name: state[name] for name in state if ".mid.block_" in name}, "encoder.mid."),
        attention=any(".mid.attn_" in name or ".attn." in name for name in state),
        norm_groups=groups,
        residual_convs=_count(state, "quantize.quant_resi.qresi_ls."),
    )


def _published_sampling(kind: Kind, depth: int, codebook_size: int) -> SamplingConfig:
    settings = PUBLISHED_SAMPLING.get((kind, depth), SamplingConfig(cfg=1.5, top_k=900, top_p=0.96))
    return settings.model_copy(update={"top_k": min(settings.top_k, codebook_size)})


def _published_class_names(num_classes: int) -> tuple[str, ...] | None:
    """Published files do not name their classes; those of 1000 classes were trained on ImageNet."""
    if num_classes != IMAGENET_CLASSES:
        return None
    return tuple((presets_directory() / "imagenet-classes.txt").read_text(encoding="utf-8").splitlines())


def _checked_config(**values: Any) -> ModelConfig:
    """A configuration whose problems are reported as ours."""
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _from_official(
    state: Mapping[str, Tensor], ours: Mapping[str, Tensor], names: Mapping[str, str], source: str | Path
) -> State:
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if not is_buffer(name)}
    expected = {names[name]: published_shape(names[name], tensor) for name, tensor in ours.items()}
    directory.check_state(found, expected, source)
    return {name: state[names[name]].reshape(tensor.shape) for name, tensor in ours.items()}


def _to_official(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    return {
        names[name]: tensor.detach().cpu().reshape(published_shape(names[name], tensor)).contiguous()
        for name, tensor in state.items()
    }


def published_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The published shape of a tensor of ours: only the scale per head has axes of its own."""
    return (1, tensor.numel(), 1, 1) if name.endswith("scale_mul_1H11") else tuple(tensor.shape)


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state in another dtype; empties the original to free memory."""
    cast = {}
    for name in list(state):
        value = state.pop(name)
        cast[name] = value if name.startswith(FLOAT32_PARTS) else value.to(dtype)
    return cast


def transformer_names(config: ModelConfig) -> dict[str, str]:
    """Published names by our names, for every parameter of the transformer.

    Raises:
        CheckpointError: The model is conditioned on vectors, which no published format knows.
    """
    assert config.transformer is not None
    if config.conditioning.dim is not None:
        raise CheckpointError(
            f"{config.name} is conditioned on vectors; published files know class labels alone.",
            "Keep it as a model directory, or train a model with conditioning.kind=class.",
        )
    names = {
        "class_embedding.weight": "class_emb.weight",
        "start_position": "pos_start",
        "position_embedding": "pos_1LC",
        "scale_embedding.weight": "lvl_embed.weight",
    }
    layers = {"input_projection": "word_embed", "head_modulation": "head_nm.ada_lin.1", "head": "head"}
    if config.transformer.shared_adaln:
        layers["shared_modulation"] = "shared_ada_lin.1"
    for index in range(config.transformer.depth):
        ours, published = f"blocks.{index}", f"blocks.{index}"
        names[f"{ours}.attention.qkv.weight"] = f"{published}.attn.mat_qkv.weight"
        names[f"{ours}.attention.query_bias"] = f"{published}.attn.q_bias"
        names[f"{ours}.attention.value_bias"] = f"{published}.attn.v_bias"
        if config.transformer.l2_attention:
            names[f"{ours}.attention.log_head_scale"] = f"{published}.attn.scale_mul_1H11"
        layers[f"{ours}.attention.projection"] = f"{published}.attn.proj"
        layers[f"{ours}.mlp.up"] = f"{published}.ffn.fc1"
        layers[f"{ours}.mlp.down"] = f"{published}.ffn.fc2"
        if config.transformer.shared_adaln:
            names[f"{ours}.modulation_offset"] = f"{published}.ada_gss"
        else:
            layers[f"{ours}.modulation"] = f"{published}.ada_lin.1"
    return {**names, **_with_weight_and_bias(layers)}


def tokenizer_names(config: TokenizerConfig) -> dict[str, str]:
    """Published names by our names, for every parameter of the VQVAE."""
    layers = {"quantizer_conv": "quant_conv", "decoder_conv": "post_quant_conv"}
    levels = len(config.channel_multipliers)
    for side in ("encoder", "decoder"):
        layers[f"{side}.input_conv"] = f"{side}.conv_in"
        layers[f"{side}.output_norm"] = f"{side}.norm_out"
        layers[f"{side}.output_conv"] = f"{side}.conv_out"
        for index in range(config.middle_blocks):
            layers |= _block_names(f"{side}.middle.blocks.{index}", f"{side}.mid.block_{index + 1}")
            layers |= _attention_names(f"{side}.middle.attentions.{index}", f"{side}.mid.attn_{index + 1}")
        for level in range(levels):
            # Published decoders number their levels from the finest, ours from the first that runs.
            published = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{levels - 1 - level}"
            resample = "downsample" if side == "encoder" else "upsample"
            layers[f"{side}.levels.{level}.resample.conv"] = f"{published}.{resample}.conv"
            for index in range(max(config.encoder_blocks, config.decoder_blocks)):
                layers |= _block_names(f"{side}.levels.{level}.blocks.{index}", f"{published}.block.{index}")
                layers |= _attention_names(f"{side}.levels.{level}.attentions.{index}", f"{published}.attn.{index}")
    names = _with_weight_and_bias(layers)
    names["quantizer.codebook"] = "quantize.embedding.weight"
    for index in range(config.residual_convs):
        names |= _with_weight_and_bias(
            {f"quantizer.residual_convs.{index}.conv": f"quantize.quant_resi.qresi_ls.{index}"}
        )
    return names


def _block_names(ours: str, published: str) -> dict[str, str]:
    parts = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "nin_shortcut"}
    return {f"{ours}.{part}": f"{published}.{name}" for part, name in parts.items()}


def _attention_names(ours: str, published: str) -> dict[str, str]:
    parts = {"norm": "norm", "qkv": "qkv", "projection": "proj_out"}
    return {f"{ours}.{part}": f"{published}.{name}" for part, name in parts.items()}


def _with_weight_and_bias(layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in layers.items() for kind in ("weight", "bias")}
