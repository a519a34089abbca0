"""How many images run together at each scale: few enough for the memory, enough for the speed.

A batch advances scale by scale. Within a scale nothing passes between images, so they are processed in micro-batches:
many images at 1×1, few at the last scales, so that every product has about as many rows. Only f̂, tokens and, where a
scale sees earlier ones, keys and values live between scales. Sizes decide speed and memory, never the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """How many images advance from scale to scale together, run in one pass of each scale, and are decoded together.

    `peak_bytes` is the predicted peak of what sampling holds besides the weights.
    """

    images: int
    scales: tuple[int, ...]
    decoder: int
    peak_bytes: int

    def halved(self, images: int) -> MicroBatches:
        """Half of what runs together, at least one image, where `images` were too many."""
        scales = tuple(max(1, min(count, images) // 2) for count in self.scales)
        return MicroBatches(max(1, images // 2), scales, max(1, self.decoder // 2), self.peak_bytes // 2)


def choose(
    config: ModelConfig, images: int, setting: Setting, *, budget: int | None = None, batch_size: int | None = None
) -> MicroBatches:
    """Micro-batches to sample so many images with at most `budget` bytes for everything besides the weights.

    `batch_size` images advance together; by default as many as are fast and fit. ConfigError, which says how much one
    needs, where not even one image fits.
    """
    rows = TOKENS_AT_ONCE.get(setting.device, 2048) // (2 if setting.guided else 1)
    grids = config.pyramid.grids

    def sized(images: int, scales: Iterable[int], decoder: int) -> MicroBatches:
        sizes = tuple(scales)
        return MicroBatches(images, sizes, decoder, _peak_bytes(config, images, sizes, decoder, setting))

    def fast(images: int) -> MicroBatches:
        """As many images at each scale as make products fast."""
        decoder = min(images, DECODED_AT_ONCE.get(setting.device, 1))
        return sized(images, (min(images, max(1, rows // grid.tokens)) for grid in grids), decoder)

    together = min(batch_size or IMAGES_AT_ONCE, max(1, images))
    if budget is None:
        return fast(together)
    smallest = sized(1, [1] * len(grids), 1)
    if smallest.peak_bytes > budget:
        raise ConfigError(
            f"{max(0, budget) / 1e6:,.0f} MB are left for sampling besides the weights; one image of {config.name}"
            f" needs {smallest.peak_bytes / 1e6:,.0f} MB.",
            "Give more --memory, or use --dtype bfloat16.",
        )
    # As many images together as leave every scale room for half of its fast micro-batch, or for one image.
    fits, too_many = 1, together + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if sized(middle, (max(1, count // 2) for count in fast(middle).scales), 1).peak_bytes <= budget:
            fits = middle
        else:
            too_many = middle
    # The fast micro-batches, made smaller where the budget asks for it, each scale by itself.
    wanted, between = fast(fits), _bytes_between(config, fits, setting)
    scales = []
    for scale, count in enumerate(wanted.scales):
        held = between + fits * footprint.cached_bytes(config, scale, setting.dtype_bytes, setting.guided)
        fitting = (budget - held) // max(1, footprint.scale_bytes(config, scale, setting))
        scales.append(max(1, min(count, fitting)))
    room = budget - fits * footprint.output_bytes(config, setting)
    return sized(fits, scales, max(1, min(wanted.decoder, room // footprint.decoder_bytes(config, setting))))


def _bytes_between(config: ModelConfig, images: int, setting: Setting) -> int:
    """What lives from scale to scale, without keys and values."""
    return images * footprint.image_bytes(config, setting.keep_stages) + footprint.classes_bytes(
        config, images, setting
    )


def _peak_bytes(config: ModelConfig, images: int, scales: Sequence[int], decoder: int, setting: Setting) -> int:
    """What lives from scale to scale, with the widest scale; or what is left of it, with the decoder."""
    widest = max(
        images * footprint.cached_bytes(config, scale, setting.dtype_bytes, setting.guided)
        + footprint.scale_bytes(config, scale, setting, count, whole=count >= images)
        for scale, count in enumerate(scales)
    )
    decoding = images * footprint.output_bytes(config, setting) + decoder * footprint.decoder_bytes(config, setting)
    return max(_bytes_between(config, images, setting) + widest, decoding)
