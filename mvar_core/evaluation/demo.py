"""A small classifier, trained on the spot, whose features replace Inception's for small bundled images.

Its scores say whether a demonstration works; they are never comparable to published ones. Distances are Euclidean
between pixels in [-1, 1], divided by the root of the number of channels. So gray images count once, however many equal
channels they are stored in, and a distance is that of one channel's H·W pixels.

Letters: B batch, N, M images of two sets, C channels, H, W height and width in pixels, F features, K classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from mvar_core.data.evaluation_images import open_evaluation_images, shape_text
from mvar_core.errors import CheckpointError, ConfigError, DataError, one_line
from mvar_core.evaluation.features import Features, check_images, check_labels, described, is_dense
from mvar_core.evaluation.scores import frechet_distance
from mvar_core.evaluation.statistics import Statistics, collect
from mvar_core.io.files import atomic_path
from mvar_core.io.weights import open_safetensors, read_weights
from mvar_core.runtime import generator
from mvar_core.untrusted import check_whole, parse_json

FORMAT = "mvar-demo-classifier-1"
CLASSIFIER_FILE = "classifier.safetensors"
"""Name of a classifier next to a model."""
CHANNELS = (16, 32, 64)
FEATURES = 64
POOLED_SIDE = 4
BATCH = 64
PEAK_RATE = 4e-3
WEIGHT_DECAY = 0.01
LARGEST_SHIFT = 2

BLOCK_IMAGES, BLOCK_VALUES = 1024, 2**23
"""Most images, and values of them, that are compared with as many others at once."""

Images = Shaped[Tensor, "N C H W"]
"""uint8 in 0 … 255, or floating point in [-1, 1]."""

logger = logging.getLogger("mvar")


class DemoClassifier(nn.Module):
    """Three strided convolutions and a hidden layer, whose outputs are the demo features, for images of `image_shape`.

    `measured_accuracy` is the fraction of held-out images that it classifies right, where that was measured.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int], measured_accuracy: float | None = None):
        super().__init__()
        self.num_classes = num_classes
        self.image_shape = image_shape
        self.measured_accuracy = measured_accuracy
        # The layers' usual initial values would come from the global generator.
        self.convolutions = nn.ModuleList(
            nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, stride=2, padding=1)
            for inputs, outputs in pairwise((3, *CHANNELS))
        )
        self.hidden = nn.utils.skip_init(nn.Linear, CHANNELS[-1] * POOLED_SIDE**2, FEATURES)
        self.head = nn.utils.skip_init(nn.Linear, FEATURES, num_classes)

    def initialise(self, source: torch.Generator) -> None:
        """Sample the weights, scaled for rectified units (He et al. 2015)."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=source)
            else:
                nn.init.zeros_(parameter)

    def check_shape(self, image_shape: tuple[int, ...]) -> None:
        """Raise DataError for images of another size than the classifier's."""
        if image_shape != self.image_shape:
            raise DataError(
                f"The demo classifier is for {shape_text(self.image_shape)} images, found {shape_text(image_shape)}.",
                "Train one on images of this size, or use --features inception.",
            )

    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """The hidden layer's outputs; DataError for what is not uint8 images of the classifier's size."""
        check_images(images)
        self.check_shape(tuple(images.shape[2:]))
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        x = F.adaptive_avg_pool2d(x, POOLED_SIDE)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        logits: Tensor = self.head(self.features(images))
        return logits

    @torch.inference_mode()
    def accuracy(self, images: UInt8[Tensor, "B 3 H W"], labels: Int64[Tensor, " B"]) -> float:
        """Fraction of the images that are classified as their labels say."""
        check_images(images)
        check_labels(images, labels, self.num_classes)
        predictions = [self(batch.to(self.head.weight.device)).argmax(dim=1).cpu() for batch in images.split(512)]
        return (torch.cat(predictions) == labels.cpu()).double().mean().item()

    @property
    def weights_hash(self) -> str:
        """SHA-256 of names, shapes and values of the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write weights and description to a safetensors file, whole or not at all."""
        description = {
            "num_classes": self.num_classes,
            "image_shape": self.image_shape,
            "accuracy": self.measured_accuracy,
            "weights_hash": self.weights_hash,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "description": json.dumps(description)})

    @classmethod
    def load(cls, path: Path) -> DemoClassifier:
        """Read a classifier that `save` wrote; CheckpointError for other files, and weights that were not saved."""
        again = "Delete it to have it trained again."
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            found = f"its format is {metadata.get('format')!r}, expected {FORMAT!r}"
            raise CheckpointError(f"{path} is not a demo classifier of this version: {found}.", again)
        tensors = read_weights(path)
        description = parse_json(metadata.get("description", ""), f"{path}, description", CheckpointError)
        try:
            height, width = (check_whole("image_shape", side, 1, 2**16) for side in description["image_shape"])
            classes = check_whole("num_classes", description["num_classes"], 1, tensors["head.bias"].numel())
            accuracy = description["accuracy"]
            classifier = cls(classes, (height, width), None if accuracy is None else float(accuracy))
            classifier.load_state_dict(tensors)
            intact = classifier.weights_hash == description["weights_hash"]
        except (ConfigError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {one_line(error)[:200]}.", again) from None
        if not intact:
            raise CheckpointError(f"{path} is damaged: its weights are not those that were saved.", again)
        return classifier.eval()


class DemoExtractor:
    """Features of a demo classifier, on the CPU; its classes replace Inception's in the inception score."""

    name = "demo"
    dim = FEATURES
    comparable_to_papers = False

    def __init__(self, classifier: DemoClassifier):
        self.classifier = classifier.cpu().eval()
        self.weights_hash = classifier.weights_hash

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> Features:
        """Features of a batch of images; see `DemoClassifier.features`."""
        pool = self.classifier.features(images)
        return Features(pool, self.classifier.head(pool))


def train_classifier(
    images: UInt8[Tensor, "B 3 H W"],
    labels: Int64[Tensor, " B"],
    num_classes: int,
    seed: int = 0,
    *,
    steps: int = 400,
    test: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoClassifier:
    """Train a classifier on the CPU in seconds; on one machine, equal seeds give equal weights.

    The seed decides initial weights, order and shifts. A step takes 64 images, each shifted by up to two pixels; the
    accuracy on the held-out images and labels of `test` is measured and recorded. DataError for no images, images of
    the wrong kind, or labels that do not fit.
    """
    check_images(images)
    check_labels(images, labels, num_classes)
    height, width = images.shape[2:]
    source = generator("demo-classifier", seed)
    classifier = DemoClassifier(num_classes, (height, width))
    classifier.initialise(source)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=source)])
        rows, order = order[:BATCH], order[BATCH:]
        with torch.enable_grad():
            loss = F.cross_entropy(classifier(_shifted(images[rows], source)), labels[rows], label_smoothing=0.05)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if progress:
            progress(step + 1, steps)
    classifier.eval()
    if test is not None:
        classifier.measured_accuracy = classifier.accuracy(*test)
    return classifier


def default_demo_path(image_shape: tuple[int, int] = (32, 32)) -> Path:
    """Where the classifier of the bundled digits is kept: ${MVAR_CACHE or ~/.cache/mvar}/demo-digits-32.safetensors."""
    directory = Path(os.environ.get("MVAR_CACHE") or "~/.cache/mvar").expanduser()
    height, width = image_shape
    return directory / f"demo-digits-{height if height == width else f'{height}x{width}'}.safetensors"


def _shifted(images: Tensor, source: torch.Generator) -> Tensor:
    """Each image moved by its own few pixels; the border's pixels are repeated."""
    count, _, height, width = images.shape
    shifts = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (2, count, 1), generator=source)
    rows = (torch.arange(height) + shifts[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + shifts[1]).clamp(0, width - 1)
    index = torch.arange(count)
    return images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def read_digits(split: str, image_shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bundled digits: uint8 (N, 3, H, W) and labels (N,)."""
    images = open_evaluation_images(f"digits:{split}", image_shape)
    assert images.labels is not None
    return torch.cat(list(images.batches(512))), torch.from_numpy(images.labels)


def train_digits_classifier(path: Path, image_shape: tuple[int, int], seed: int = 0) -> DemoClassifier:
    """Train a classifier on the bundled digits and save it."""
    images, labels = read_digits("train", image_shape)
    test = read_digits("test", image_shape)
    classifier = train_classifier(images, labels, int(labels.max()) + 1, seed, test=test)
    classifier.save(path)
    accuracy = 100 * (classifier.measured_accuracy or 0)
    logger.info("Trained the demo classifier of the bundled digits: %.1f %% of test digits are classified correctly;"
                " saved as %s.", accuracy, path)  # fmt: skip
    return classifier


def find_classifier(nearby: Sequence[Path], image_shape: tuple[int, int]) -> DemoClassifier:
    """The classifier next to the model, in a directory `nearby`, else the cached one, trained where it is absent."""
    cached = default_demo_path(image_shape)
    found = next((path for path in [*(folder / CLASSIFIER_FILE for folder in nearby), cached] if path.is_file()), None)
    return train_digits_classifier(cached, image_shape) if found is None else DemoClassifier.load(found)


@dataclass(frozen=True, kw_only=True)
class DemoScores:
    """Scores that only together show that a model is good: each alone can be good for a bad model.

    `classifier_accuracy` is the fraction of the samples that the classifier assigns to their class; `demo_fid` the
    Fréchet distance of the samples' demo features to the training images', also of training images resampled with
    replacement (`floor`: the least to expect) and of the mean image of each class (`class_means`: what a model without
    diversity gets). Names that end in `_real` are of real test images; nan is what was not measured. Distances are
    as in the functions below.
    """

    classifier_accuracy: float = math.nan
    classifier_accuracy_real: float = math.nan
    demo_fid: float = math.nan
    demo_fid_floor: float = math.nan
    demo_fid_real: float = math.nan
    demo_fid_class_means: float = math.nan
    pixel_diversity: float = math.nan
    pixel_diversity_real: float = math.nan
    nearest_distance: float = math.nan
    nearest_distance_real: float = math.nan


def score_samples(
    classifier: DemoClassifier,
    samples: tuple[Tensor, Tensor],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> DemoScores:
    """Scores of samples against training and test images; each is images uint8 (N, 3, H, W) and labels (N,)."""
    extractor = DemoExtractor(classifier)

    def gaussian(images: Tensor) -> Statistics:
        statistics = collect(extractor, images.split(512), len(images)).statistics
        assert statistics is not None
        return statistics

    reference = gaussian(train[0])
    resampled = torch.randint(len(train[0]), (len(samples[0]),), generator=generator("floor"))
    return DemoScores(
        classifier_accuracy=classifier.accuracy(*samples),
        classifier_accuracy_real=classifier.accuracy(*test),
        demo_fid=frechet_distance(gaussian(samples[0]), reference),
        demo_fid_floor=frechet_distance(gaussian(train[0][resampled]), reference),
        demo_fid_real=frechet_distance(gaussian(test[0]), reference),
        demo_fid_class_means=frechet_distance(gaussian(class_mean_images(*train)), reference),
        pixel_diversity=pixel_diversity(*samples),
        pixel_diversity_real=pixel_diversity(*test),
        nearest_distance=nearest_neighbour_distance(samples[0], train[0]),
        nearest_distance_real=nearest_neighbour_distance(test[0], train[0]),
    )


def pixel_diversity(images: Images, labels: Int64[Tensor, " N"]) -> float:
    """Mean distance between two different images of a class, averaged over the classes that have two."""
    means = []
    for label in _classes(images, labels):
        vectors = _vectors(images[labels == label])
        if (count := len(vectors)) > 1:
            total = sum(float(torch.cdist(block, vectors).sum()) for block in vectors.split(BLOCK_IMAGES))
            means.append(total / (count * (count - 1)))
    if not means:
        raise DataError("Pixel diversity needs a class with at least 2 images.")
    return sum(means) / len(means)


def nearest_neighbour_distance(images: Images, reference: Shaped[Tensor, "M C H W"]) -> float:
    """Mean distance from an image to the nearest reference image: small where images repeat the reference."""
    return float(nearest_neighbours(images, reference)[0].mean())


def nearest_neighbours(images: Images, reference: Shaped[Tensor, "M C H W"]) -> tuple[Tensor, Tensor]:
    """Distance (N,) from each image to the nearest reference image, and which (N,) that is."""
    _check_pixels(images)
    _check_pixels(reference)
    if len(images) == 0 or len(reference) == 0 or images.shape[1:] != reference.shape[1:]:
        raise DataError(
            "Nearest neighbours need two sets of images of one size, found"
            f" {tuple(images.shape)} and {tuple(reference.shape)}."
        )
    at_once = max(1, min(BLOCK_IMAGES, BLOCK_VALUES // images[0].numel()))
    found = []
    for block in images.split(at_once):
        vectors = _vectors(block)
        parts = [torch.cdist(vectors, _vectors(part)).cpu().min(dim=1) for part in reference.split(at_once)]
        best = torch.stack([part.values for part in parts]).min(dim=0)
        places = torch.stack([part.indices + number * at_once for number, part in enumerate(parts)])
        found.append((best.values, places.gather(0, best.indices[None])[0]))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def class_mean_images(images: Images, labels: Int64[Tensor, " N"]) -> Images:
    """The images, each replaced by the mean image of its class: what a sampler without diversity would generate."""
    classes, means = _classes(images, labels), torch.empty_like(images)
    for label in classes:
        members = labels == label
        mean = images[members].double().mean(dim=0)
        means[members] = (mean if images.is_floating_point() else mean.round()).to(images.dtype)
    return means


def _classes(images: Tensor, labels: Tensor) -> list[int]:
    _check_pixels(images)
    check_labels(images, labels)
    return labels.unique().tolist()


def _check_pixels(images: Tensor) -> None:
    if not is_dense(images, 4) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        expected = "images (N, C, H, W), uint8, or floating point in [-1, 1]"
        raise DataError(f"Distances are of {expected}; found {described(images)}.")


def _vectors(images: Tensor) -> Tensor:
    # float64: torch finds distances through products, which loses those much smaller than the vectors' lengths.
    pixels = images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
    vectors: Tensor = pixels.flatten(1) / float(images.shape[1]) ** 0.5
    return vectors
