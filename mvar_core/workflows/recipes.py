"""Recipes that fit a data set: size of the images, tokenizer and training, from the images and their number.

What published recipes say of a million images does not suit a hundred; all choices here are ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mvar_core.config.presets import parse_setting
from mvar_core.data.sources import ImageSource
from mvar_core.errors import ConfigError
from mvar_core.pyramid import PatchSize, ScalePyramid, mvar_windows, read_size, read_sizes

WIDTH_PER_LAYER = 64
LARGEST_OWN_SIDE = 128
"""Pixels: images that all have one size, of up to the square of this side, keep it."""
SIDES = (64, 32)
"""What other images are brought to: the first that half of them reach."""
MEASURED_HEADERS = 256
IMAGES_SEEN = 1700
"""Times the root of the number of images: what a tokenizer is trained on, and no image less than once."""
LEARNING_RATE_TIMES_DEPTH = 4e-3
"""Wider models need smaller steps."""


class Recipe(NamedTuple):
    """What suits up to so many images; `epochs` are passes over all images, in whatever views of them there are."""

    images: float
    base_channels: int
    codebook_size: int
    tokenizer_batch: int
    depth: int
    batch: int
    epochs: int


RECIPES = (
    Recipe(2_000, 16, 512, 8, 4, 16, 200),
    Recipe(20_000, 32, 1024, 16, 8, 64, 100),
    Recipe(200_000, 64, 4096, 32, 12, 128, 100),
    Recipe(math.inf, 128, 4096, 64, 16, 256, 300),
)
MANY = 200_000
"""From here on training is as published."""


def recipe_for(images: int) -> Recipe:
    """The recipe for a number of images."""
    return next(recipe for recipe in RECIPES if images <= recipe.images)


def size_of_images(source: ImageSource) -> tuple[PatchSize, str]:
    """The size to train at where none is asked for, and why."""
    count = len(source)
    looked = np.unique(np.linspace(0, count - 1, min(count, MEASURED_HEADERS)).astype(int)).tolist()
    shapes = source.stored_shapes(looked)
    if not shapes:
        return SIDES[0], "they have no size of their own; --image-size sets another"
    if len(set(shapes)) == 1 and math.prod(shapes[0]) <= LARGEST_OWN_SIDE**2:
        multiple = downsample_for(shapes[0])
        size = read_size([max(4 * multiple, side // multiple * multiple) for side in shapes[0]])
        return size, f"all are {shapes[0][0]}×{shapes[0][1]}; --image-size sets another"
    half = sorted(min(shape) for shape in shapes)[len(shapes) // 2]
    side = next((side for side in SIDES if side <= half), SIDES[-1])
    return side, f"half of them have a shorter side of {half} or more; --image-size sets another"


def downsample_for(shape: tuple[int, int]) -> int:
    """Pixels to a token, so that there are about 16×16 tokens."""
    side = math.sqrt(max(1, math.prod(shape)))
    return 4 if side <= 96 else 8 if side <= 192 else 16


def tokenizer_settings(
    source: ImageSource, image_size: PatchSize | str | None, settings: Sequence[str]
) -> tuple[list[str], str]:
    """Changes to the preset tokenizer-64 that suit some images, and where the size comes from."""
    size, why = image_size or dict(map(parse_setting, settings)).get(("image_size",)), "as asked for"
    if size is None:
        size, why = size_of_images(source)
    try:
        size = read_size(size)
    except ValueError as error:
        raise ConfigError(f"image_size: {error}.") from None
    recipe = recipe_for(len(source))
    levels = int(math.log2(downsample_for((size, size) if isinstance(size, int) else size)))
    seen = max(len(source), round(IMAGES_SEEN * math.sqrt(len(source))))
    changes = {
        "name": "tokenizer",
        "image_size": json.dumps(size),
        "tokenizer.base_channels": recipe.base_channels,
        "tokenizer.channel_multipliers": [1, *[2] * (levels - 1), 4],
        "tokenizer.codebook_size": recipe.codebook_size,
        "train_tokenizer.batch_size": recipe.tokenizer_batch,
        "train_tokenizer.steps": math.ceil(seen / recipe.tokenizer_batch),
    }
    return [f"{key}={value}" for key, value in changes.items()], why


def sized(depth: int) -> dict[str, int]:
    """The transformer of a depth: width 64·depth, and `depth` heads."""
    return {"depth": depth, "embed_dim": WIDTH_PER_LAYER * depth, "num_heads": depth}


def transformer_values(
    patch_sizes: Sequence[PatchSize], images: int, views: float, depth: int | None
) -> dict[str, Any]:
    """An MVAR for tokens of a number of images, as a configuration without the sizes of these."""
    recipe = recipe_for(images)
    depth = depth or recipe.depth
    few = recipe is RECIPES[0]
    small = {"lr": LEARNING_RATE_TIMES_DEPTH / depth, "lr_batch": None, "schedule": "cosine", "end": 0.0}
    optimizer = {} if images > MANY else small
    return {
        "name": "mvar",
        "transformer": {**sized(depth), "drop_path": 0.1 if few else round(0.1 * depth / 24, 6)},
        "attention": {
            "scale_prefixes": 1,
            "windows": list(mvar_windows(ScalePyramid.from_patch_sizes(read_sizes(patch_sizes)))),
        },
        "train": {
            "batch_size": recipe.batch,
            "epochs": recipe.epochs / views,
            **({"checkpoint_every": 250} if few else {}),
            "optimizer": optimizer,
        },
    }
