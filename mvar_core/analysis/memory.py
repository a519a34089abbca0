"""Predicted peak memory of sampling, and the largest batches that fit; by formula, no torch.

The prediction counts what torch's allocators give out and what lives together: weights, KV cache, activations of the
widest moment, scratch space of kernels. It leaves out what the device's libraries and allocators hold for themselves.
Sampling is predicted by the formulas that the sampler itself chooses its micro-batches from. In bfloat16 on a CPU, it
holds where the CPU computes in bfloat16; others need up to three times as much for the decoder.
"""

from __future__ import annotations

from collections.abc import Callable

from mvar_core.analysis.counts import (
    decoder_parameters,
    head_parameters,
    quantizer_parameters,
    transformer_parameters,
)
from mvar_core.config import ModelConfig
from mvar_core.errors import ConfigError
from mvar_core.models.footprint import FLOAT32, Setting
from mvar_core.models.micro_batches import PROCESS_BYTES, MicroBatches, choose

MAX_BATCH = 1 << 24


def weight_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Weights for sampling, in the compute dtype; head and quantizer stay in float32, the encoder is left out."""
    in_float32 = head_parameters(config) + quantizer_parameters(config)
    parameters = transformer_parameters(config) + quantizer_parameters(config) + decoder_parameters(config)
    return parameters * dtype_bytes + in_float32 * (FLOAT32 - dtype_bytes)


def beside_weights(config: ModelConfig, setting: Setting, memory: int) -> int:
    """What is left of a device's memory for sampling: without the weights, and on a CPU without the process itself."""
    process = PROCESS_BYTES if setting.device == "cpu" else 0
    return memory - weight_bytes(config, setting.dtype_bytes) - process


def sample_batches(config: ModelConfig, images: int, setting: Setting, memory: int | None = None) -> MicroBatches:
    """How the sampler divides `images` that advance together.

    Args:
        config: The model.
        images: How many.
        setting: What memory and speed depend on.
        memory: Bytes of the device or of a budget; None for no limit.

    Raises:
        ConfigError: Not even one image fits in the memory.
    """
    budget = None if memory is None else beside_weights(config, setting, memory)
    return choose(config, images, setting, budget=budget, batch_size=images)


def sample_peak_bytes(config: ModelConfig, images: int, setting: Setting, memory: int | None = None) -> int:
    """Most memory allocated at once while `images` advance together, weights included; see `sample_batches`.

    Raises:
        ConfigError: Not even one image fits in the memory.
    """
    return weight_bytes(config, setting.dtype_bytes) + sample_batches(config, images, setting, memory).peak_bytes


def largest_sample_batch(config: ModelConfig, setting: Setting, memory: int) -> int:
    """The most images that the sampler lets advance together on a device, 0 where not even one fits.

    With micro-batches a scale takes as much memory as it is given, so that the number is bounded by what an image needs
    from scale to scale: f̂, tokens, keys and values where a later scale sees them, pixels on a CPU.
    """
    try:
        return sample_batches(config, MAX_BATCH, setting, memory).images
    except ConfigError:
        return 0


def largest_batch(peak_bytes: Callable[[int], int], device_memory: int) -> int:
    """The largest batch whose predicted peak fits, 0 where not even one image does.

    Args:
        peak_bytes: Predicted peak for a batch size; must not fall as the batch grows.
        device_memory: Bytes that there are.
    """
    if peak_bytes(1) > device_memory:
        return 0
    fits = 1
    while fits < MAX_BATCH and peak_bytes(2 * fits) <= device_memory:
        fits *= 2
    too_large = 2 * fits
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if peak_bytes(middle) <= device_memory:
            fits = middle
        else:
            too_large = middle
    return fits
