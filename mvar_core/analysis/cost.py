"""What a model costs, before anything is built: parameters, multiply-accumulates, KV cache, memory; no torch.

Figures called GMACs are 10⁹ multiply-accumulates for one image. `attention_gmacs` follows the MVAR paper's convention
("GFLOPs in attention blocks"): query, key and value projections and the attention itself, without guidance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mvar_core.analysis import counts, memory
from mvar_core.config import ModelConfig
from mvar_core.errors import ConfigError
from mvar_core.train_config import TrainConfig

GIGA = 1e9


@dataclass(frozen=True)
class Plan:
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
        kv_cache_bytes: The most keys and values kept after any scale.
        sample_peak_bytes: Predicted peak of sampling.
        train_batch_size: Images per training step, where training was asked about.
        train_peak_bytes: Predicted peak of a training step on one device.
        device_memory: Bytes of the device, where given.
        largest_batch: The most images that can be sampled together on the device.
        largest_train_batch: The most images per training step on the device.
        scales: One row per scale: side (or [height, width]), tokens, window (0 = whole), keys_per_query,
            attention_gmacs, total_gmacs (transformer without guidance), kv_cache_bytes (kept once the scale is done).
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
    batch_size: int
    dtype_bytes: int
    guided: bool
    weight_bytes: int
    kv_cache_bytes: int
    sample_peak_bytes: int
    train_batch_size: int | None
    train_peak_bytes: int | None
    device_memory: int | None
    largest_batch: int | None
    largest_train_batch: int | None
    scales: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The plan as a mapping of plain values."""
        return asdict(self)


def plan(
    config: ModelConfig,
    *,
    batch_size: int = 1,
    dtype_bytes: int = 2,
    guided: bool = True,
    device_memory: int | None = None,
    train: TrainConfig | None = None,
) -> Plan:
    """Predict what a model costs.

    Args:
        config: The model.
        batch_size: Images sampled together.
        dtype_bytes: Bytes per value of the compute dtype: 4, or 2 for the half types.
        guided: Whether sampling uses guidance.
        device_memory: Bytes of a device, to find the largest batches.
        train: Predict training with these settings too.

    Raises:
        ConfigError: A batch, dtype or memory that makes no sense.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1.")
    if dtype_bytes not in (2, 4, 8):
        raise ConfigError(f"dtype_bytes is {dtype_bytes}; expected 2 (bfloat16, float16) or 4 (float32).")
    if device_memory is not None and device_memory <= 0:
        raise ConfigError(f"device_memory is {device_memory} bytes; expected a positive number.")
    trains = train is not None and config.transformer is not None
    scales = [_scale_row(config, scale, batch_size, dtype_bytes, guided) for scale in range(config.pyramid.num_scales)]
    conditioning, decoder = counts.conditioning_macs(config), counts.decoder_macs(config)
    transformer = conditioning + sum(
        counts.transformer_macs(config, scale) for scale in range(config.pyramid.num_scales)
    )
    largest = largest_train = None
    if device_memory is not None:
        largest = memory.largest_batch(
            lambda images: memory.sample_peak_bytes(config, images, dtype_bytes, guided), device_memory
        )
        if trains:
            assert train is not None
            settings = train
            largest_train = memory.largest_batch(
                lambda images: memory.train_peak_bytes(
                    config, settings.model_copy(update={"batch_size": images}), dtype_bytes
                ),
                device_memory,
            )
    return Plan(
        name=config.name,
        parameters=counts.transformer_parameters(config),
        tokenizer_parameters=counts.tokenizer_parameters(config),
        tokens=config.pyramid.num_tokens,
        attention_gmacs=attention_gmacs(config),
        total_gmacs=(transformer + decoder) / GIGA,
        guided_gmacs=(2 * transformer + decoder) / GIGA,
        conditioning_gmacs=conditioning / GIGA,
        decoder_gmacs=decoder / GIGA,
        batch_size=batch_size,
        dtype_bytes=dtype_bytes,
        guided=guided,
        weight_bytes=memory.weight_bytes(config, dtype_bytes),
        kv_cache_bytes=counts.kv_cache_bytes(config, batch_size, dtype_bytes, guided),
        sample_peak_bytes=memory.sample_peak_bytes(config, batch_size, dtype_bytes, guided),
        train_batch_size=train.batch_size if train is not None and trains else None,
        train_peak_bytes=memory.train_peak_bytes(config, train, dtype_bytes) if train is not None and trains else None,
        device_memory=device_memory,
        largest_batch=largest,
        largest_train_batch=largest_train,
        scales=scales,
    )


def attention_gmacs(config: ModelConfig) -> float:
    """Attention of all scales in the paper's convention: d·(3·C²·L + 2·C·Σ_q keys(q)) / 10⁹."""
    return sum(counts.attention_macs(config, scale) for scale in range(config.pyramid.num_scales)) / GIGA


def _scale_row(config: ModelConfig, scale: int, batch_size: int, dtype_bytes: int, guided: bool) -> dict[str, Any]:
    pattern = config.patterns[scale]
    return {
        "side": pattern.grid.height if pattern.grid.height == pattern.grid.width else list(pattern.grid),
        "tokens": pattern.queries,
        "window": pattern.window if pattern.is_windowed else 0,
        "keys_per_query": pattern.keys_per_query,
        "attention_gmacs": counts.attention_macs(config, scale) / GIGA,
        "total_gmacs": counts.transformer_macs(config, scale) / GIGA,
        "kv_cache_bytes": counts.kv_cache_bytes(config, batch_size, dtype_bytes, guided, scale),
    }
