"""How many images run together at each scale: few enough for the memory, enough for the speed; no torch.

A batch advances scale by scale. Within a scale nothing passes between images, so they are processed in micro-batches:
many images at 1×1, few at the last scales, so that every product has about as many rows. Only f̂, tokens and, where a
scale sees earlier ones, keys and values live between scales. Sizes decide speed and memory, never the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvar_core.config import ModelConfig
from mvar_core.errors import ConfigError
from mvar_core.models import footprint
from mvar_core.models.footprint import Setting

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 8192, "mps": 4096}
"""Rows of a product from which more do not make it faster."""

IMAGES_AT_ONCE = 64
"""Images that advance together where no batch size is given: at 1×1 they make the only products with few rows."""

DECODED_AT_ONCE = {"cpu": 1, "cuda": 4, "mps": 2}
"""Images that are decoded together; one on a CPU, whose convolutions choose their rounding by the batch they see."""

PROCESS_BYTES = 350_000_000
"""Resident memory of Python and torch themselves, which a memory budget on a CPU has to cover."""


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


def peak_bytes(config: ModelConfig, images: int, scales: tuple[int, ...], decoder: int, setting: Setting) -> int:
    """Predicted peak beside the weights, of images that run together in the given micro-batches.

    What lives from scale to scale, with the widest scale (and its keys and values); or what is left of it, with the
    decoder.
    """
    between = images * footprint.image_bytes(config, setting.keep_stages)
    between += footprint.classes_bytes(config, images, setting)
    widest = max(
        (
            images * footprint.cached_bytes(config, scale, setting.dtype_bytes, setting.guided)
            + footprint.scale_bytes(config, scale, setting, count, whole=count >= images)
            for scale, count in enumerate(scales)
        ),
        default=0,
    )
    decoding = images * footprint.output_bytes(config, setting) + decoder * footprint.decoder_bytes(config, setting)
    return max(between + widest, decoding)


def choose(
    config: ModelConfig, images: int, setting: Setting, *, budget: int | None = None, batch_size: int | None = None
) -> MicroBatches:
    """Micro-batches for a number of images.

    Args:
        config: The model.
        images: How many images are asked for.
        setting: What memory and speed depend on.
        budget: Bytes for everything beside the weights; None for no limit.
        batch_size: Images that advance together; by default as many as are fast and fit.

    Raises:
        ConfigError: Not even one image fits; says how much one takes.
    """
    together = min(batch_size or IMAGES_AT_ONCE, max(1, images))
    if budget is None:
        return _fast(config, together, setting)
    smallest = _sized(config, 1, setting, 1)
    if smallest.peak_bytes > budget:
        raise ConfigError(
            f"{max(0, budget) / 1e6:,.0f} MB are left for sampling beside the weights; one image of {config.name} takes"
            f" {smallest.peak_bytes / 1e6:,.0f} MB.",
            "Give more --memory, or use --dtype bfloat16.",
        )
    # As many images together as leave every scale room for half of its fast micro-batch, or for one image.
    fits, too_many = 1, together + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fast = _fast(config, middle, setting)
        halved = tuple(max(1, count // 2) for count in fast.scales)
        if peak_bytes(config, middle, halved, 1, setting) <= budget:
            fits = middle
        else:
            too_many = middle
    return _within(config, fits, setting, budget)


def _fast(config: ModelConfig, images: int, setting: Setting) -> MicroBatches:
    """As many images at each scale as make products fast."""
    return _sized(config, images, setting, TOKENS_AT_ONCE.get(setting.device, 2048))


def _sized(config: ModelConfig, images: int, setting: Setting, rows: int) -> MicroBatches:
    halves = 2 if setting.guided else 1
    scales = tuple(min(images, max(1, rows // (halves * grid.tokens))) for grid in config.pyramid.grids)
    decoder = min(images, DECODED_AT_ONCE.get(setting.device, 1)) if rows > 1 else 1
    return MicroBatches(images, scales, decoder, peak_bytes(config, images, scales, decoder, setting))


def _within(config: ModelConfig, images: int, setting: Setting, budget: int) -> MicroBatches:
    """The fast micro-batches, made smaller where the budget asks for it, each scale by itself."""
    fast = _fast(config, images, setting)
    alone = footprint.image_bytes(config, setting.keep_stages) * images
    alone += footprint.classes_bytes(config, images, setting)
    scales = []
    for scale, count in enumerate(fast.scales):
        held = alone + images * footprint.cached_bytes(config, scale, setting.dtype_bytes, setting.guided)
        fitting = (budget - held) // max(1, footprint.scale_bytes(config, scale, setting))
        scales.append(max(1, min(count, fitting)))
    room = budget - images * footprint.output_bytes(config, setting)
    decoder = max(1, min(fast.decoder, room // footprint.decoder_bytes(config, setting)))
    return MicroBatches(images, tuple(scales), decoder, peak_bytes(config, images, tuple(scales), decoder, setting))
