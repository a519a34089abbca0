"""What a model costs, before anything is built: parameters, multiply-accumulates, KV cache, memory; no torch.

Figures called GMACs are 10⁹ multiply-accumulates for one image. `attention_gmacs` follows the MVAR paper's convention
("GFLOPs in attention blocks"): query, key and value projections and the attention itself, without guidance.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_core.analysis import counts
from mvar_core.analysis import memory as memory_model
from mvar_core.analysis.training_memory import train_peak_bytes
from mvar_core.config import Machine, ModelConfig, RunConfig
from mvar_core.config.training import TrainConfig
from mvar_core.errors import ConfigError, nearest
from mvar_core.models import footprint
from mvar_core.models.footprint import Setting
from mvar_core.models.micro_batches import TOKENS_AT_ONCE, MicroBatches
from mvar_core.results import Result

GIGA = 1e9
DTYPE_BYTES = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Plan(Result):
    """The predicted cost of a model.

    Attributes:
        name: The model.
        parameters: Learned numbers of the transformer; 0 for a tokenizer alone.
        tokenizer_parameters: Learned numbers of the tokenizer.
        tokens: Tokens per image, L.
        attention_gmacs: Attention of all scales in the paper's convention.
        total_gmacs: One image without guidance: `scales`' totals, conditioning and decoder.
        guided_gmacs: One image with guidance: the transformer and its conditioning twice, the decoder once.
        conditioning_gmacs: The AdaLN vectors.
        decoder_gmacs: From tokens to pixels.
        batch_size: Images sampled together, for the figures in bytes.
        dtype_bytes: Bytes per value of the compute dtype.
        guided: Whether the figures in bytes are for sampling with guidance, which doubles the transformer's rows.
        weight_bytes: Weights for sampling.
        parts_gmacs: `total_gmacs` by part: inputs, projections, attention (the products alone), mlp, head,
            conditioning, quantizer, decoder.
        kv_cache_bytes: The most keys and values kept after any scale.
        sample_peak_bytes: Predicted peak of sampling, weights included.
        image_bytes: What each further image of a batch keeps: f̂, tokens, random numbers and KV cache from scale to
            scale, or f̂, tokens and (on a CPU) pixels while images are decoded, whichever is more.
        images_together: Images that advance together: the batch size, or fewer where `memory` asks for it.
        decoder_images: Images that are decoded together.
        device: The kind of device that all bytes are for.
        memory: Bytes that sampling was allowed to take, where given.
        train_batch_size: Images per training step, where training was asked about.
        train_peak_bytes: Predicted peak of a training step on one device.
        device_memory: Bytes of the device, where given.
        largest_batch: The most images that advance together on the device.
        largest_train_batch: The most images per training step on the device.
        scales: One row per scale: side (or [height, width]), tokens, window (0 = whole), keys_per_query,
            attention_gmacs, total_gmacs (transformer without guidance), parts_gmacs (of them), kv_cache_bytes (kept
            once the scale is done), micro_batch (images in one pass), activation_bytes (of that pass).
    """

    name: str
    parameters: int
    tokenizer_parameters: int
    tokens: int
    attention_gmacs: float
    total_gmacs: float
    guided_gmacs: float
    conditioning_gmacs: float
    decoder_gmacs: float
    parts_gmacs: dict[str, float]
    batch_size: int
    dtype_bytes: int
    device: str
    guided: bool
    weight_bytes: int
    kv_cache_bytes: int
    sample_peak_bytes: int
    image_bytes: int
    images_together: int
    decoder_images: int
    memory: int | None
    train_batch_size: int | None
    train_peak_bytes: int | None
    device_memory: int | None
    largest_batch: int | None
    largest_train_batch: int | None
    scales: list[dict[str, Any]]


def cost_of(
    config: ModelConfig,
    machine: Machine = Machine(),
    *,
    batch_size: int | None = None,
    guided: bool = True,
    device_memory: int | None = None,
) -> Plan:
    """The predicted cost of a model and of its training.

    Args:
        config: The model, or a run.
        machine: Kind of device, dtype (auto is float32) and memory that the bytes are for.
        batch_size: Images sampled or trained on together; by default 1, and what the run trains with.
        guided: Whether sampling uses guidance.
        device_memory: Bytes of a device, to find the largest batches.

    Raises:
        ConfigError: An unknown dtype, or sizes that make no sense.
    """
    if machine.dtype not in DTYPE_BYTES:
        raise ConfigError(f"--dtype {machine.dtype!r} is not known. {nearest(machine.dtype, DTYPE_BYTES)}")
    train = config.train if isinstance(config, RunConfig) else TrainConfig(batch_size=1)
    return plan(
        config,
        batch_size=batch_size or 1,
        dtype_bytes=DTYPE_BYTES[machine.dtype],
        guided=guided,
        device=device_kind(machine.device),
        device_memory=device_memory,
        memory=machine.memory_bytes,
        train=train.model_copy(update={"batch_size": batch_size}) if batch_size else train,
    )


def device_kind(name: str) -> str:
    """cpu, cuda or mps for the name of a device; auto is what this machine seems to have, found without torch."""
    if name != "auto":
        return name.split(":")[0]
    if Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        return "cuda"
    return "mps" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"


def plan(
    config: ModelConfig,
    *,
    batch_size: int = 1,
    dtype_bytes: int = 2,
    guided: bool = True,
    device: str = "cpu",
    device_memory: int | None = None,
    memory: int | None = None,
    train: TrainConfig | None = None,
) -> Plan:
    """Predict what a model costs.

    Args:
        config: The model.
        batch_size: Images sampled together.
        dtype_bytes: Bytes per value of the compute dtype: 4, or 2 for the half types.
        guided: Whether sampling uses guidance.
        device: cpu, cuda or mps: what runs together, and what is kept where, differ between them.
        device_memory: Bytes of a device, to find the largest batches.
        memory: Bytes that sampling may take, weights (and on a CPU the process) included; None for no limit.
        train: Predict training with these settings too.

    Raises:
        ConfigError: A batch, dtype or memory that makes no sense, or a memory in which not even one image fits.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1.")
    if dtype_bytes not in (2, 4, 8):
        raise ConfigError(f"dtype_bytes is {dtype_bytes}; expected 2 (bfloat16, float16) or 4 (float32).")
    for name, given in (("device_memory", device_memory), ("memory", memory)):
        if given is not None and given <= 0:
            raise ConfigError(f"{name} is {given} bytes; expected a positive number.")
    if device not in TOKENS_AT_ONCE:
        raise ConfigError(f"device is {device!r}. {nearest(device, TOKENS_AT_ONCE)}")
    sampling = config.sampling
    if sampling.guided != guided:
        sampling = sampling.model_copy(update={"cfg": 1.0 if guided else 0.0, "cfg_schedule": "linear"})
    setting = Setting(dtype_bytes, sampling, device)
    batches = memory_model.sample_batches(config, batch_size, setting, memory)
    trains = train is not None and config.transformer is not None
    scales = [_scale_row(config, scale, batch_size, setting, batches) for scale in range(config.pyramid.num_scales)]
    parts = _parts(config)
    decoder = parts["quantizer"] + parts["decoder"]
    transformer = sum(parts.values()) - decoder
    largest = largest_train = train_peak = None
    if trains:
        assert train is not None
        train_peak = train_peak_bytes(config, train, dtype_bytes, device)
    if device_memory is not None:
        largest = memory_model.largest_sample_batch(config, setting, device_memory)
        if trains:
            assert train is not None
            settings = train
            largest_train = memory_model.largest_batch(
                lambda images: train_peak_bytes(
                    config, settings.model_copy(update={"batch_size": images}), dtype_bytes, device
                ),
                device_memory,
            )
    return Plan(
        name=config.name,
        parameters=counts.transformer_parameters(config),
        tokenizer_parameters=counts.tokenizer_parameters(config),
        tokens=config.pyramid.num_tokens,
        attention_gmacs=attention_gmacs(config),
        total_gmacs=transformer + decoder,
        guided_gmacs=2 * transformer + decoder,
        conditioning_gmacs=parts["conditioning"],
        decoder_gmacs=decoder,
        parts_gmacs=parts,
        batch_size=batch_size,
        dtype_bytes=dtype_bytes,
        device=device,
        guided=guided,
        weight_bytes=memory_model.weight_bytes(config, dtype_bytes),
        kv_cache_bytes=counts.kv_cache_bytes(config, batch_size, dtype_bytes, guided),
        sample_peak_bytes=memory_model.weight_bytes(config, dtype_bytes) + batches.peak_bytes,
        image_bytes=max(
            footprint.image_bytes(config) + counts.kv_cache_bytes(config, 1, dtype_bytes, guided),
            footprint.output_bytes(config, setting),
        ),
        images_together=batches.images,
        decoder_images=batches.decoder,
        memory=memory,
        train_batch_size=train.batch_size if train is not None and trains else None,
        train_peak_bytes=train_peak,
        device_memory=device_memory,
        largest_batch=largest,
        largest_train_batch=largest_train,
        scales=scales,
    )


def attention_gmacs(config: ModelConfig) -> float:
    """Attention of all scales in the paper's convention: d·(3·C²·L + 2·C·Σ_q keys(q)) / 10⁹."""
    return sum(counts.attention_macs(config, scale) for scale in range(config.pyramid.num_scales)) / GIGA


def _parts(config: ModelConfig) -> dict[str, float]:
    """GMACs of one image without guidance by part."""
    scales = [counts.scale_macs(config, scale) for scale in range(config.pyramid.num_scales)]
    macs = {part: sum(scale[part] for scale in scales) for part in scales[0]}
    macs["conditioning"] = counts.conditioning_macs(config)
    macs["quantizer"] = config.pyramid.num_scales * counts.quantizer_macs(config)
    macs["decoder"] = counts.decoder_macs(config) - macs["quantizer"]
    return {part: value / GIGA for part, value in macs.items()}


def _scale_row(
    config: ModelConfig, scale: int, batch_size: int, setting: Setting, batches: MicroBatches
) -> dict[str, Any]:
    pattern = config.patterns[scale]
    return {
        "side": pattern.grid.height if pattern.grid.height == pattern.grid.width else list(pattern.grid),
        "tokens": pattern.queries,
        "window": pattern.window if pattern.is_windowed else 0,
        "keys_per_query": pattern.keys_per_query,
        "attention_gmacs": counts.attention_macs(config, scale) / GIGA,
        "total_gmacs": counts.transformer_macs(config, scale) / GIGA,
        "parts_gmacs": {part: macs / GIGA for part, macs in counts.scale_macs(config, scale).items()},
        "kv_cache_bytes": counts.kv_cache_bytes(config, batch_size, setting.dtype_bytes, setting.guided, scale),
        "micro_batch": batches.scales[scale],
        "activation_bytes": footprint.scale_bytes(
            config, scale, setting, batches.scales[scale], whole=batches.scales[scale] >= batches.images
        ),
    }
