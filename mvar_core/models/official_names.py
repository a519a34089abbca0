"""The published parameter names: they live here and where their shapes tell sizes, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

from mvar_core.config import ModelConfig, TokenizerConfig
from mvar_core.errors import CheckpointError


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
