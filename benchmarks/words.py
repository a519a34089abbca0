"""Digits drawn by words: how many a classifier takes for what was said, phrasing by phrasing.

    python benchmarks/words.py RUN --classifier FILE

RUN is what `mvar train --preset digits-words` left. The baseline is what the classifier says of real test images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from machine import save

from mvar_core import Pipeline
from mvar_core.data.vectors import embed_words, phrasings
from mvar_core.evaluation.demo import DemoClassifier, find_classifier, read_digits

TRAINED = {"seven": 0, "a seven": 1, "the digit seven": 2, "7": 3}
UNSEEN = ("number {}", "my {}", "please draw the {}", "a handwritten {}", "{}s")
IMAGES = 100
"""Of each digit and phrasing."""


def accuracies(pipeline: Pipeline, classifier: DemoClassifier, texts: list[str], seed: int) -> list[float]:
    """Part of the images that the classifier takes for the digit, one number for each of the ten texts."""
    dim = pipeline.config.conditioning.dim
    assert dim is not None
    vectors = embed_words(texts, dim).repeat(IMAGES, axis=0)
    labels = np.arange(10).repeat(IMAGES)
    images = pipeline.sample(labels=labels, conditions=vectors, seed=seed, batch_size=100).images
    with torch.no_grad():
        found = classifier(images.permute(0, 3, 1, 2).contiguous()).argmax(dim=1).numpy()
    return [round(float((found == labels)[labels == digit].mean()), 3) for digit in range(10)]


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--classifier", type=Path)
    arguments = parser.parse_args()
    pipeline = Pipeline.from_pretrained(arguments.run, device="cpu", dtype="float32")
    named = arguments.classifier
    nearby = [arguments.run.parent]
    classifier = DemoClassifier.load(named) if named else find_classifier(nearby, pipeline.config.image_shape)
    words = [phrasings(str(digit)) for digit in range(10)]
    rows = {name: [said[place] for said in words] for name, place in TRAINED.items()}
    rows |= {shape.format("seven"): [shape.format(said[0]) for said in words] for shape in UNSEEN}
    result = {}
    for name, texts in rows.items():
        of_words = accuracies(pipeline, classifier, texts, seed=0)
        result[name] = {"trained_on": name in TRAINED, "mean": round(float(np.mean(of_words)), 4), "of_words": of_words}
    real = classifier.accuracy(*read_digits("test", pipeline.config.image_shape))
    save("words", {"images_of_each": IMAGES, "real_test_images": round(real, 4), "phrasings": result})


if __name__ == "__main__":
    main()
