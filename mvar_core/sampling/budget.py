"""How many images run together at each scale: few enough for the memory, enough for the speed.

A batch advances scale by scale. Within a scale nothing passes between images, so they are processed in micro-batches:
many images at 1×1, few at the last scales, so that every product has about as many rows. Only f̂, tokens and, where a
scale sees earlier ones, keys and values live between scales. Sizes decide speed and memory, never the result.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from mvar_core.config import ModelConfig
from mvar_core.errors import ConfigError
from mvar_core.models import footprint

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 8192, "mps": 4096}
"""Rows of a product from which more do not make it faster."""

IMAGES_AT_ONCE = 64
"""Images that advance together where no batch size is given: at 1×1 they make the only products with few rows."""

DECODED_AT_ONCE = {"cpu": 1, "cuda": 4, "mps": 2}
"""Images that are decoded together; one on a CPU, whose convolutions choose their rounding by the batch they see."""

PART_OF_FREE_MEMORY = 0.5
"""Of what the device has free, where no budget is given."""


@dataclass(frozen=True)
class MicroBatches:
    """Images that run together.

    Attributes:
        images: Images that advance from scale to scale together.
        scales: One number per scale: images in one pass of the transformer.
        decoder: Images that are decoded together.
        peak_bytes: Predicted peak of what sampling holds beside the weights.
    """

    images: int
    scales: tuple[int, ...]
    decoder: int
    peak_bytes: int


def free_memory(device: torch.device) -> int | None:
    """Bytes that the device has free, or None where it does not say."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def choose_micro_batches(
    config: ModelConfig,
    images: int,
    *,
    device: torch.device,
    dtype_bytes: int,
    guided: bool,
    budget: int | None,
    top_k: int = 0,
    batch_size: int | None = None,
    keep_stages: bool = False,
) -> MicroBatches:
    """Micro-batches for a number of images.

    Args:
        config: The model.
        images: How many images are asked for.
        device: Where they are sampled; decides from how many rows on products are fast.
        dtype_bytes: Bytes per value of the compute dtype.
        guided: Whether sampling uses guidance, which doubles the rows.
        budget: Bytes for everything beside the weights; None for no limit.
        top_k: Codes that the drawing keeps; 0 for all.
        batch_size: Images that advance together; by default as many as are fast and fit.
        keep_stages: f̂ is kept after every scale.

    Raises:
        ConfigError: Not even one image fits; says how much one takes.
    """
    kept = footprint.image_bytes(config, keep_stages) + footprint.class_bytes(config, dtype_bytes)
    scales = range(config.pyramid.num_scales)
    held = [footprint.cached_bytes(config, scale, dtype_bytes, guided) for scale in scales]
    active = [footprint.scale_bytes(config, scale, dtype_bytes, guided, top_k) for scale in scales]
    decoding = footprint.decoder_bytes(config, dtype_bytes)
    smallest = kept + max(decoding, *(a + h for a, h in zip(active, held, strict=True)))
    if budget is not None and smallest > budget:
        raise ConfigError(
            f"{max(0, budget) / 1e6:,.0f} MB are left for sampling beside the weights; one image of {config.name} takes"
            f" {smallest / 1e6:,.0f} MB.",
            "Give more --memory, or use --dtype bfloat16.",
        )
    together = min(batch_size or IMAGES_AT_ONCE, max(1, images))
    if budget is not None:
        # Half of the budget at most for what lives from scale to scale, so that micro-batches keep the other half.
        per_image = kept + max(held)
        together = max(1, min(together, max(budget // 2, budget - max(decoding, *active)) // per_image))
    room = None if budget is None else budget - together * kept
    per_pass = []
    for scale in scales:
        rows = config.pyramid.grids[scale].tokens * (2 if guided else 1)
        count = max(1, TOKENS_AT_ONCE.get(device.type, 2048) // rows)
        if room is not None:
            count = max(1, min(count, (room - together * held[scale]) // active[scale]))
        per_pass.append(min(count, together))
    decoder = min(together, DECODED_AT_ONCE.get(device.type, 1))
    if room is not None:
        decoder = max(1, min(decoder, room // decoding))
    peak = together * kept + max(
        decoder * decoding,
        *(count * a + together * h for count, a, h in zip(per_pass, active, held, strict=True)),
    )
    return MicroBatches(together, tuple(per_pass), decoder, peak)
