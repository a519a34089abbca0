"""What a device has free, and the micro-batches that fit in it (mvar_core.models.micro_batches)."""

from __future__ import annotations

import os

import torch

from mvar_core.config import ModelConfig
from mvar_core.models.footprint import Setting
from mvar_core.models.micro_batches import (
    DECODED_AT_ONCE,
    IMAGES_AT_ONCE,
    TOKENS_AT_ONCE,
    MicroBatches,
    choose,
)
from mvar_core.runtime import has_bfloat16_unit

__all__ = [
    "DECODED_AT_ONCE",
    "IMAGES_AT_ONCE",
    "PART_OF_FREE_MEMORY",
    "TOKENS_AT_ONCE",
    "MicroBatches",
    "choose_micro_batches",
    "free_memory",
]

PART_OF_FREE_MEMORY = 0.5
"""Of what the device has free, where no budget is given."""


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
    top_p: float = 0.0,
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
        top_p: Probability that it then keeps; 0 or 1 for all.
        batch_size: Images that advance together; by default as many as are fast and fit.
        keep_stages: f̂ is kept after every scale.

    Raises:
        ConfigError: Not even one image fits; says how much one takes.
    """
    setting = Setting(dtype_bytes, guided, top_k, top_p, device.type, keep_stages, has_bfloat16_unit())
    return choose(config, images, setting, budget=budget, batch_size=batch_size)
