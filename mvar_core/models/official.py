"""Published checkpoint files: reading, mapping both ways, writing; the only place that knows their names.

Masks and scale numbers that such files carry as buffers are never loaded: what a token sees follows from the
configuration, and so do the buffers of an export. (VAR's mask, which many MVAR files carry, would make it a VAR.)
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mvar_core.classes import imagenet_names
from mvar_core.config import AttentionConfig, ModelConfig, SamplingConfig, TokenizerConfig, TransformerConfig
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.io.files import atomic_path
from mvar_core.io.weights import check_tensors, finite, is_dense, read_tensors
from mvar_core.models import directory
from mvar_core.models.meta import meta_device
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import PUBLISHED_PYRAMIDS, ScalePrefixes, ScalePyramid, auto_windows, mvar_windows, spread_window

Kind = Literal["var", "mvar"]
Part = Literal["transformer", "tokenizer"]
State = dict[str, Tensor]

logger = logging.getLogger("mvar")

ANCHORS: dict[Part, str] = {"transformer": "word_embed.weight", "tokenizer": "quantize.embedding.weight"}
"""A published name that every set of such weights has, and nothing else; what stands before it is the set's name."""
OWN_NAMES = ("input_projection.weight", "quantizer.codebook")
"""Ours for the same."""
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)($|[._\d])", re.IGNORECASE)
"""In the name of a set of weights that is an average over steps, which samples better than a step's own."""

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


def find_weights(
    path: Path, part: Part | None = None, weights: str | None = None, *, mapped: bool = True, checksums: bool = True
) -> tuple[str, State]:
    """The weights of a transformer or a tokenizer, however deep they lie in a file: their name there, and the tensors.

    Of several sets it is the one that `weights` names, in full or by its end; without it an average over steps (EMA)
    where there is one, or else the first, which is logged. Without a part it is the transformer, where there is one.
    CheckpointError where the file cannot be read, or holds no such weights.
    """
    tensors = read_tensors(path, mapped=mapped, checksums=checksums)
    bases = {each: [n.removesuffix(a) for n in tensors if f".{n}".endswith(f".{a}")] for each, a in ANCHORS.items()}
    part = part or ("transformer" if bases["transformer"] else "tokenizer")
    named = {base.removesuffix("."): base for base in bases[part]}
    listed = ", ".join(name or "weights without a name" for name in named)
    if not named:
        raise _no_such_weights(path, part, tensors, any(bases.values()))
    chosen = list(named)
    if weights is not None:
        chosen = [weights] if weights in named else [name for name in named if name.endswith(f".{weights}")]
        if len(chosen) != 1:
            hint = "Use one of these names." if any(named) else "Leave out --weights."
            raise CheckpointError(f"{path} holds {listed}; --weights {weights} does not name one of them.", hint)
    name = next(filter(AVERAGED.search, chosen), chosen[0])
    if len(chosen) > 1:
        logger.info("%s holds %s: %s is read; `mvar convert --weights NAME` reads another.", path, listed, name)
    base = named[name]
    inner = tuple(other for each in bases.values() for other in each if other != base and other.startswith(base))
    # A number of the whole network is not a weight: an average's n_averaged, or its decay.
    state = {
        full.removeprefix(base): tensor
        for full, tensor in tensors.items()
        if full.startswith(base)
        and not full.startswith(inner)
        and (tensor.is_nested or tensor.ndim or "." in full.removeprefix(base))
    }
    return name, check_tensors(state, path, is_buffer)


def _no_such_weights(path: Path, part: Part, tensors: State, other: bool) -> CheckpointError:
    """What to raise for a file without the weights of a part; `other` says that it holds those of the other."""
    if other and part == "transformer":
        hint = "Name it as --tokenizer, and the transformer's file in its place."
        return CheckpointError(f"{path} holds a tokenizer (VQVAE), not a transformer.", hint)
    if other:
        hint = "Name the tokenizer's file (vae*.pth); this one is for --model or --checkpoint."
        return CheckpointError(f"{path} holds a transformer, not a tokenizer.", hint)
    if any(f".{name}".endswith(f".{own}") for name in tensors for own in OWN_NAMES):
        directory = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        hint = f"If {directory} is a model directory, name it as it is, as in `mvar sample --checkpoint {directory}`."
        return CheckpointError(f"{path} holds weights by mvar's own names, not a published file.", hint)
    shown = ", ".join(list(tensors)[:3])
    return CheckpointError(
        f"{path} holds the weights of another network ({len(tensors)} tensors: {shown} …), not of a {part}; there is no"
        f" {ANCHORS[part]} among them.",
        "Expected a VAR, MVAR or VQVAE with the parameter names of the published files.",
    )


def read_official(path: Path, part: Part | None = None, *, checksums: bool = True) -> State:
    """The tensors that `find_weights` finds in a file, by published names."""
    return find_weights(path, part, checksums=checksums)[1]


def tell_kind(name: str, state: State, path: Path, kind: Kind | None = None) -> tuple[Kind, str]:
    """Whose attention a published transformer was trained with, and what says so: option, mask, weights, file, nothing.

    A mask that hides earlier scales is MVAR's. A causal one proves nothing: MVARs that were fine-tuned from a VAR carry
    it. Then the name of the weights decides, or that of the file. Where nothing does, VAR is assumed, with a warning.
    CheckpointError where they contradict each other, or `kind`.
    """
    signs: dict[str, Kind] = {"mask": "mvar"} if _mask_in(state)[0] else {}
    for sign, text in (("weights", name), ("file", path.stem)):
        if re.search(r"mvar|(?<![a-z])var(?![a-z])", text.lower()):
            signs[sign] = "mvar" if "mvar" in text.lower() else "var"
    shown = {
        "mask": "its attention mask hides earlier scales",
        "weights": f"its weights are called {name}",
        "file": f"its name is {path.name}",
    }
    said = " but ".join(f"{shown[sign]} ({each})" for sign, each in signs.items())
    if kind == "var" and "mvar" in (signs.get("mask"), signs.get("weights")):
        raise CheckpointError(
            f"{path} is not a VAR: {said}.",
            "Leave out --kind; add --scale-prefixes all --windows 0 for VAR's attention.",
        )
    if kind is None and len(set(signs.values())) > 1:
        raise CheckpointError(f"{path} may be a VAR or an MVAR: {said}.", "Say which with `mvar convert --kind mvar`.")
    if kind is None and not signs:
        logger.warning(
            "%s does not say whether it is a VAR or an MVAR: VAR is assumed. If it is an MVAR, make a model directory"
            " of it with `mvar convert --kind mvar`.", path,
        )  # fmt: skip
    return (kind, "option") if kind else (next(iter(signs.values()), "var"), next(iter(signs), "nothing"))


def _mask_in(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """The first token that the last one sees by the mask in a file, and how many tokens it is for; or (0, 0)."""
    mask, positions = state.get("attn_bias_for_masking"), state.get("pos_1LC")
    if mask is None or positions is None or not is_dense(mask) or not mask.is_floating_point() or mask.ndim < 2:
        return 0, 0
    if 0 in mask.shape or mask.shape[-1] > positions.shape[1 if positions.ndim > 1 else 0]:
        return 0, 0
    seen = (mask[(0,) * (mask.ndim - 2)][-1] == 0).nonzero()
    return int(seen[0]) if len(seen) else 0, mask.shape[-1]


@dataclass(frozen=True)
class Published:
    """Published files whose shapes have been read; `model` is None for a tokenizer alone.

    `kind` is whose attention the transformer was trained with, and `kind_from` what says so, see `tell_kind`. `weights`
    is their name in the transformer's file, or else the tokenizer's; None where they have none.
    """

    model: Path | None
    tokenizer: Path
    config: ModelConfig
    kind: Kind
    kind_from: str
    weights: str | None

    def states(self, dtype: torch.dtype = torch.float32) -> Iterator[State | None]:
        """The tokenizer's state under our names, then the transformer's, or None; read as they are asked for.

        They are in `dtype`, but for `FLOAT32_MODULES`. CheckpointError for names that do not fit, and for values that
        are not finite or too large for the dtype.
        """
        # Pages of a mapping stay until it is closed; tensors that are read can be freed one by one as they are cast.
        mapped, config = dtype == torch.float32, self.config
        own = self.weights if self.model is None else None
        with meta_device():
            ours = VQVAE(config.tokenizer, config.pyramid).state_dict()
        state = find_weights(self.tokenizer, "tokenizer", own, mapped=mapped)[1]
        yield _from_official(state, ours, lambda name: tokenizer_name(name, config.tokenizer), self.tokenizer, dtype)
        if self.model is None:
            yield None
            return
        with meta_device():
            ours = Transformer(config).state_dict()
        state = find_weights(self.model, "transformer", self.weights, mapped=mapped)[1]
        yield _from_official(state, ours, transformer_name, self.model, dtype)


def open_official(
    model: Path | None, tokenizer: Path, *, kind: Kind | None = None, weights: str | None = None, **attention: Any
) -> Published:
    """Published files, of which nothing but the shapes is read; without a model a tokenizer alone.

    `kind` is by default as the file says (`tell_kind`); `weights` is which set of weights of the model, or of the
    tokenizer alone, where the file holds several; patch_sizes, windows and scale_prefixes are as of `infer_config`.
    """
    name, tokenizer_state = find_weights(tokenizer, "tokenizer", None if model else weights, checksums=False)
    transformer_state, kind_from = None, "option" if kind else "nothing"
    if model is not None:
        name, transformer_state = find_weights(model, "transformer", weights, checksums=False)
        if kind is None or attention.get("windows") is None or attention.get("scale_prefixes") is None:
            kind, kind_from = tell_kind(name, transformer_state, model, kind)
    kind = kind or "var"
    try:
        config = infer_config(transformer_state, tokenizer_state, kind, name=(model or tokenizer).stem, **attention)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{model or tokenizer}: {error.message}", error.hint) from None
    provenance = {"source": (model or tokenizer).name, "source_tokenizer": tokenizer.name}
    config = config.model_copy(update={"provenance": provenance})
    return Published(model, tokenizer, config, kind, kind_from, name or None)


class Converted(NamedTuple):
    """Published files under our names; `transformer` is None for a tokenizer alone."""

    config: ModelConfig
    tokenizer: State
    transformer: State | None


def convert(model: Path | None, tokenizer: Path, **options: Any) -> Converted:
    """Read published files; arguments and errors as of `open_official` and `Published.states`."""
    published = open_official(model, tokenizer, **options)
    vqvae, transformer = published.states()
    assert vqvae is not None
    return Converted(published.config, vqvae, transformer)


def tokenizer_next_to(model: Path) -> Path:
    """The tokenizer next to a published transformer, or in the same file; CheckpointError for none or several."""
    beside = (path for path in model.parent.glob("v*") if path.suffix in (".pth", ".pt", ".safetensors"))
    found = sorted(path for path in beside if path.name.startswith(("vae", "vqvae")) and path != model)
    if not found and any(f".{n}".endswith(f".{ANCHORS['tokenizer']}") for n in read_tensors(model, checksums=False)):
        return model
    if len(found) != 1:
        find_weights(model, "transformer", checksums=False)  # the error of a file that is none comes first
        what = f"{len(found)} of them lie" if found else "none lies"
        raise CheckpointError(
            f"{model} is a transformer and needs its tokenizer (vae*.pth), but {what} next to it.",
            "Name it with --tokenizer, or convert both once with `mvar convert`.",
        )
    return found[0]


def import_official(published: Published, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model directory; one part after the other, so that the peak of memory is one of them."""
    files = (directory.TOKENIZER_FILE, directory.TRANSFORMER_FILE)
    for name, state in zip(files, published.states(dtype), strict=True):
        if state is not None:
            directory.save_tensors(out / name, state)
            state.clear()
    directory.save_config(out, published.config)


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
    return directory.state_hash(convert(None, tokenizer or tokenizer_next_to(checkpoint)).tokenizer)


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
    """Read a model's configuration off the shapes of its published tensors; no transformer is a tokenizer alone.

    The kind decides the attention where it is not specified: VAR sees all scales whole; MVAR sees its own scale alone,
    or as many as a mask in the state says, in windows of 7 on the last two scales and wherever else they pay. Windows
    are one per scale, one number for the last two, or auto (auto:K) for those where it pays; also as text. Without
    `patch_sizes` the pyramid is a published one.
    """
    tokenizer_config = _infer_tokenizer(tokenizer)
    transformer_config = None
    if transformer is not None:
        transformer_config = _infer_transformer(transformer, kind)
        found = (_shape(transformer, "lvl_embed.weight", 2)[0], _shape(transformer, "pos_1LC", 3)[1])
        known = ((len(sides), sum(side * side for side in sides)) == found for sides in PUBLISHED_PYRAMIDS.values())
        patch_sizes = patch_sizes or next(itertools.compress(PUBLISHED_PYRAMIDS.values(), known), None)
        if patch_sizes is None:
            raise CheckpointError(
                f"the file was trained with {found[0]} scales and {found[1]} tokens, which is none of the published"
                " pyramids.",
                "Convert it with its sizes: `mvar convert --model FILE --tokenizer FILE --pyramid 1,2,3x4 --out DIR`.",
            )
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
    if scale_prefixes is None and kind == "mvar":  # as many as the mask in the file shows, or else one
        first, tokens = _mask_in(transformer or {})
        scales = pyramid.scale_of_token
        scale_prefixes = scales[tokens - 1] - scales[first] + 1 if first and tokens <= len(scales) else 1
    elif scale_prefixes is None:
        scale_prefixes = "all"
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


def _from_official(state: State, ours: State, named: Callable[[str], str], source: Path, dtype: torch.dtype) -> State:
    """A published state under our names, in a dtype, without buffers; the original is emptied to free memory."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if not is_buffer(name)}
    expected = {named(name): published_shape(named(name), tensor) for name, tensor in ours.items()}
    directory.check_state(found, expected, source)
    names, converted = {named(name): name for name in ours}, {}
    for published, value in finite(((name, state.pop(name)) for name in names), source):
        name = names[published]
        kept = name.startswith(FLOAT32_MODULES)
        cast = converted[name] = value.reshape(ours[name].shape).to(torch.float32 if kept else dtype)
        if cast.dtype != value.dtype and cast.isinf().any() and value.isfinite().all():
            raise CheckpointError(f"{source}: {published} holds values too large for {dtype}.", "Use --dtype float32.")
    return converted


def transformer_to_official(state: Mapping[str, Tensor], config: ModelConfig) -> State:
    """The published transformer state, with the buffers that the configuration implies.

    CheckpointError for a model that is conditioned on vectors, which no published format knows.
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
