"""Digits generated from words: how many a classifier takes for what was asked, phrasing by phrasing.

    python benchmarks/words.py RUN --classifier FILE

RUN is a run of `mvar train --preset digits-words`. The baseline is the classifier's accuracy on real test images.
"""

import argparse
from pathlib import Path

import machine
import numpy as np
import torch

from mvar_core import Pipeline
from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config.presets import load_config
from mvar_core.data.vectors import embed_words, phrasings
from mvar_core.evaluation.demo import DemoClassifier, find_classifier, read_digits

TRAINED = {"seven": 0, "a seven": 1, "the digit seven": 2, "7": 3}
UNSEEN = ("number {}", "my {}", "please draw the {}", "a handwritten {}", "{}s")
if machine.SMOKE:
    TRAINED, UNSEEN = {"seven": 0}, ("number {}",)
IMAGES = 1 if machine.SMOKE else 100
"""Of each digit and phrasing."""


def accuracies(pipeline: Pipeline, classifier: DemoClassifier, texts: list[str], seed: int) -> list[float]:
    """Fraction of the images that the classifier takes for the digit, for each of the ten texts."""
    dim = pipeline.config.conditioning.dim
    assert dim is not None
    vectors = embed_words(texts, dim).repeat(IMAGES, axis=0)
    labels = np.arange(10).repeat(IMAGES)
    images = pipeline.sample(labels=labels, conditions=vectors, seed=seed, batch_size=100).images
    with torch.no_grad():
        found = classifier(images.permute(0, 3, 1, 2).contiguous()).argmax(dim=1).numpy()
    return [round(float((found == labels)[labels == digit].mean()), 3) for digit in range(10)]


def random_model() -> tuple[Pipeline, DemoClassifier]:
    """A model and a classifier of random weights, for a smoke run."""
    config = load_config("digits-words").model
    classifier = DemoClassifier(10, config.image_shape)
    classifier.initialise(torch.Generator())
    return Pipeline(config, random_tokenizer(config), random_transformer(config)), classifier


def main() -> None:
    """Measure and save."""
    if machine.SMOKE:
        pipeline, classifier = random_model()
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("run", type=Path)
        parser.add_argument("--classifier", type=Path)
        arguments = parser.parse_args()
        pipeline = Pipeline.from_pretrained(arguments.run, device="cpu", dtype="float32")
        classifier = find_classifier(arguments.classifier, [arguments.run.parent], pipeline.config.image_shape)
    words = [phrasings(str(digit)) for digit in range(10)]
    rows = {name: [texts[index] for texts in words] for name, index in TRAINED.items()}
    rows |= {shape.format("seven"): [shape.format(texts[0]) for texts in words] for shape in UNSEEN}
    result = {}
    for name, texts in rows.items():
        of_words = accuracies(pipeline, classifier, texts, seed=0)
        result[name] = {"trained_on": name in TRAINED, "mean": round(float(np.mean(of_words)), 4), "of_words": of_words}
    real = classifier.accuracy(*read_digits("test", pipeline.config.image_shape))
    machine.save("words", {"images_of_each": IMAGES, "real_test_images": round(real, 4), "phrasings": result})


if __name__ == "__main__":
    main()
