"""Sets of images that `mvar evaluate` measures: stored ones, samples, reconstructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.data.evaluation_images import EvaluationImages, open_evaluation_images

if TYPE_CHECKING:
    from mvar_core.config import SamplingConfig
    from mvar_core.pipeline import Pipeline

ImageShape = tuple[int, int]


class ImageSet(Protocol):
    """Images that can be measured: read from disk, or made on the spot.

    Attributes:
        name: What the user calls them.
        verb: How one comes by them.
        count: How many there are, N.
        image_shape: Height and width in pixels.
        labels: (N,) the class of each, or None.
        class_names: One name per class, or None.
    """

    name: str
    verb: str
    count: int
    image_shape: ImageShape
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """The images `start` up to `stop`, uint8 (B, 3, H, W)."""

    def content(self) -> str | None:
        """A fingerprint that stands for the images, or None where there is none before they are made."""


class StoredImages:
    """Images in a folder, an npz, or bundled: the first `limit` of them."""

    verb = "read"

    def __init__(self, images: EvaluationImages, limit: int | None = None):
        self.images = images
        self.name = images.name
        self.count = min(images.count, limit or images.count)
        self.image_shape = images.image_shape
        self.labels = images.labels[: self.count] if images.labels is not None else None
        self.class_names = images.class_names

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """The images `start` up to `stop`, uint8 (B, 3, H, W)."""
        return self.images.batches(batch_size, start, stop)

    def content(self) -> str:
        """SHA-256 of the stored bytes."""
        return self.images.fingerprint()


class DrawnImages:
    """Samples of a checkpoint, balanced over its classes, drawn while they are measured.

    Args:
        name: The checkpoint.
        pipeline: The model.
        count: How many to draw.
        settings: How to draw.
        seed: The run's seed.
        save_to: An npz to write the samples to, class labels included.
    """

    verb = "draw"

    def __init__(
        self, name: str, pipeline: Pipeline, count: int, settings: SamplingConfig, seed: int, save_to: Path | None
    ):
        self.name = name
        self.pipeline = pipeline
        self.count = count
        self.settings = settings
        self.seed = seed
        self.save_to = save_to
        self.image_shape = pipeline.config.image_shape
        self.labels: NDArray[np.int64] | None = np.arange(count) % pipeline.transformer.no_class
        self.class_names = pipeline.config.class_names

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """The samples `start` up to `stop`, uint8 (B, 3, H, W); written as well where that is wanted."""
        from mvar_core.io.files import atomic_path
        from mvar_core.io.npz import NpzWriter
        from mvar_core.sampling.conditions import by_labels

        assert self.labels is not None
        chosen = self.settings
        with ExitStack() as stack:
            writer = None
            if self.save_to is not None:
                path = stack.enter_context(atomic_path(self._part(start, stop)))
                writer = stack.enter_context(NpzWriter(path, stop - start, save_tokens=False))
            for first in range(start, stop, batch_size):
                indices = range(first, min(first + batch_size, stop))
                labels = self.labels[first : indices.stop]
                drawn = self.pipeline.sample(
                    **by_labels(self.pipeline.config, labels.tolist()),
                    cfg=chosen.cfg,
                    top_k=chosen.top_k,
                    top_p=chosen.top_p,
                    more_smooth=chosen.more_smooth,
                    seed=self.seed,
                    indices=indices,
                    batch_size=batch_size,
                )
                if writer is not None:
                    writer.write(drawn.images.numpy(), labels, drawn.tokens.numpy())
                yield drawn.images.permute(0, 3, 1, 2).contiguous()
            if writer is not None:
                writer.close()

    def content(self) -> None:
        """Nothing is known of samples before they are drawn."""

    def _part(self, start: int, stop: int) -> Path:
        assert self.save_to is not None
        if stop - start == self.count:
            return self.save_to
        return self.save_to.with_name(f".{self.save_to.name}.{start}-{stop}.npz")

    def join(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Put the parts that several processes wrote into one file, in order."""
        from mvar_core.io.files import atomic_path
        from mvar_core.io.npz import NpzWriter

        assert self.save_to is not None
        assert self.labels is not None
        with atomic_path(self.save_to) as path, NpzWriter(path, self.count, save_tokens=False) as writer:
            for start, stop in blocks:
                part, position = self._part(start, stop), start
                for batch in open_evaluation_images(str(part)).batches():
                    labels = self.labels[position : position + len(batch)]
                    writer.write(batch.permute(0, 2, 3, 1).numpy(), labels, np.empty((len(batch), 0)))
                    position += len(batch)
                part.unlink()
            writer.close()


class ReconstructedImages:
    """What a tokenizer makes of images; while they pass, each is compared with its original.

    Args:
        pipeline: The tokenizer.
        originals: The images.
    """

    verb = "encode and decode"

    def __init__(self, name: str, pipeline: Pipeline, originals: StoredImages):
        from mvar_core.evaluation.reconstruction import ReconstructionMeter

        self.name = name
        self.pipeline = pipeline
        self.originals = originals
        self.count = originals.count
        self.image_shape = originals.image_shape
        self.labels = originals.labels
        self.class_names = originals.class_names
        config = pipeline.config
        self.meter = ReconstructionMeter(config.pyramid.spans, config.tokenizer.codebook_size)

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """The reconstructions `start` up to `stop`, uint8 (B, 3, H, W)."""
        from mvar_core.io.pixels import from_uint8, to_uint8

        # On a CPU one by one: there convolutions choose their algorithm, and so their rounding, by the batch they see.
        size = 1 if self.pipeline.device.type == "cpu" else batch_size
        for originals in self.originals.batches(batch_size, start, stop):
            parts = originals.permute(0, 2, 3, 1).split(size)
            tokens = torch.cat([self.pipeline.encode(from_uint8(part)) for part in parts])
            pixels = torch.cat([to_uint8(self.pipeline.decode(part)) for part in tokens.split(size)])
            images = pixels.cpu().permute(0, 3, 1, 2).contiguous()
            self.meter.update(originals, images, tokens.cpu())
            yield images

    def content(self) -> None:
        """Every image must be seen: its pixels are compared, not only its features."""


def open_stored(text: str, limit: int | None = None, image_shape: ImageShape | None = None) -> StoredImages:
    """Images to be judged, as they are; digits, which have no size of their own, as the preset shows them."""
    from mvar_core.config.presets import load_config
    from mvar_core.data.images import split_name

    if image_shape is None and split_name(text)[0] == "digits":
        image_shape = load_config("digits").image_shape
    return StoredImages(open_evaluation_images(text, image_shape), limit)
