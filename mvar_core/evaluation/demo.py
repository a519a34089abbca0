"""A small classifier, trained on the spot, whose features replace Inception's for small bundled images.

Its scores say whether a demonstration works; they are never comparable to published ones.

Letters: B batch, H, W height and width in pixels, F features, K classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from mvar_core.data.evaluation_images import open_evaluation_images, shape_text
from mvar_core.errors import CheckpointError, ConfigError, DataError, one_line
from mvar_core.evaluation.features import Features, check_images, check_labels
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
