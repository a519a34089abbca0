"""What a trained digits model keeps when it is edited, and how well it knows digits that it has not seen.

python benchmarks/editing.py --checkpoint runs/quickstart/mvar writes benchmarks/results/editing.json: the PSNR of what
stays, by region and coverage, next to that of the tokenizer alone; and likelihoods of held-out and of training digits.
"""

import argparse
import math
from typing import Any

import machine
import numpy as np
import torch

from mvar_core import Pipeline
from mvar_core.analysis.likelihood import measure_likelihood
from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config.presets import load_config
from mvar_core.data.images import ImageRows, open_images
from mvar_core.io.pixels import to_uint8

COVERAGES = (0.25, 0.5, 0.75, 1.0)


def regions(shape: tuple[int, int]) -> dict[str, tuple[np.ndarray, str]]:
    """Masks, and which side of them stays."""
    height, width = shape
    lower, centre = np.zeros(shape, bool), np.zeros(shape, bool)
    lower[height // 2 :] = True
    centre[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    return {
        "lower half filled": (lower, "outside"),
        "centre filled": (centre, "outside"),
        "around the centre": (centre, "inside"),
    }


def psnr(images: torch.Tensor, given: torch.Tensor, stays: np.ndarray) -> float:
    """Of the pixels that stay, over all images together."""
    error = (images.double() - given.double())[:, torch.from_numpy(stays)].square().mean()
    return 10 * math.log10(255**2 / float(error))


def editing(pipeline: Pipeline, count: int) -> dict[str, Any]:
    """PSNR of what stays, of held-out digits whose rest is generated under their own class."""
    images, labels = ImageRows(open_images("digits:test"), pipeline.config.image_shape).batch(np.arange(count))
    given = to_uint8(images)
    decoded = torch.cat([to_uint8(pipeline.decode(pipeline.encode(image))) for image in images.split(1)])
    rows = {}
    for name, (mask, keep) in regions(pipeline.config.image_shape).items():
        stays = mask if keep == "inside" else ~mask
        rows[name] = {"tokenizer alone": psnr(decoded, given, stays)}
        for coverage in COVERAGES:
            edited = pipeline.edit(images, mask, labels=labels, keep=keep, coverage=coverage)
            rows[name][f"coverage {coverage}"] = psnr(edited.images, given, stays)
    return rows


def likelihood(pipeline: Pipeline, data: str, count: int) -> dict[str, Any]:
    """Likelihoods of digits under every class."""
    images = ImageRows(open_images(data), pipeline.config.image_shape)
    chosen = np.random.default_rng(0).permutation(len(images))[:count]

    def batches():
        for start in range(0, len(chosen), 32):
            pixels, labels = images.batch(chosen[start : start + 32])
            yield torch.cat([pipeline.encode(image) for image in pixels.split(1)]), labels

    report = measure_likelihood(pipeline.transformer, pipeline.quantizer, batches(), pipeline.config, classes=range(10))
    return report.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="runs/quickstart/mvar")
    parser.add_argument("--images", type=int, default=100)
    given = parser.parse_args()
    if machine.SMOKE:
        config = load_config("digits").model
        pipeline, images, digits = Pipeline(config, random_tokenizer(config), random_transformer(config)), 2, 2
    else:
        pipeline = Pipeline.from_pretrained(given.checkpoint, device="cpu", dtype="float32")
        images, digits = given.images, 360
    result = {
        "model": pipeline.config.name,
        "images": images,
        "psnr_of_what_stays": editing(pipeline, images),
        "held_out": likelihood(pipeline, "digits:test", digits),
        "training": likelihood(pipeline, "digits", digits),
    }
    machine.save("editing", result)


if __name__ == "__main__":
    main()
