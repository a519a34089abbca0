"""`mvar evaluate reconstruction`: how well a tokenizer reconstructs images, and how much of its codebook it uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mvar_core.config import Machine
from mvar_core.data.evaluation_images import EvaluationImages
from mvar_core.distributed import connect
from mvar_core.errors import ConfigError
from mvar_core.evaluation.extractors import ExtractorChoice, Network
from mvar_core.evaluation.measure import Measurer, Reference, check_values, open_measured_images
from mvar_core.evaluation.published import comparability, input_reasons
from mvar_core.evaluation.reconstruction import ReconstructionMeter
from mvar_core.evaluation.scores import evaluate_features
from mvar_core.io.pixels import from_uint8, to_uint8
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress
from mvar_core.results import DryRun
from mvar_core.runtime import resolve_device
from mvar_core.workflows.evaluate import Measured, circumstances, load_pipeline, model_description


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Measured):
    """What a tokenizer makes of images.

    Attributes:
        rfid: FID of the reconstructions against their originals; None where `reasons` says why.
        psnr: Peak signal-to-noise ratio in dB, the mean over the images of each one's own.
        code_usage: Fraction of the codebook that some scale uses.
        usage_per_scale: Fraction of the codebook that each scale uses.
        scales: The scales, as height×width of their grids of tokens.
    """

    rfid: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    code_usage: float | None = None
    usage_per_scale: tuple[float, ...] = ()
    scales: tuple[str, ...] = ()
    images: int = 0


def evaluate_reconstruction(
    *,
    checkpoint: str | Path,
    reference: str | Path,
    num_samples: int | None = None,
    features: Network = "auto",
    inception_weights: str | Path | None = None,
    download: bool = False,
    cache: str | Path | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Reconstruction:
    """rFID, PSNR and SSIM of a tokenizer's reconstructions, and how much of its codebook it uses; in one process.

        mvar.evaluate_reconstruction(checkpoint="runs/tokenizer", reference="digits:test").psnr

    Args:
        checkpoint: A model directory with a tokenizer.
        reference: Images to reconstruct: a folder, an npz, "digits" or "digits:test".
        num_samples: At most so many of them.
        features: As of `evaluate`.
        inception_weights: As of `evaluate`.
        download: As of `evaluate`.
        cache: As of `evaluate`; only the originals' features are saved.
        tokenizer: The published tokenizer, where `checkpoint` is a .pth file.
        batch_size: Images at a time; decides speed and memory, never the result.
        machine: Device and dtype.
        progress: Called as images are measured.
        dry_run: Check everything, and measure nothing.

    Raises:
        ConfigError: Several processes, or an unknown network.
        DataError: Images or weights that cannot be used, or too few images.
    """
    machine = machine or Machine()
    check_values(cache, num_samples=num_samples, batch_size=batch_size)
    with connect(machine.device) as here:
        if here.world_size > 1:
            raise ConfigError(f"Reconstructions are measured in one process, found {here.world_size}.")
        choice = ExtractorChoice(
            features,
            str(reference),
            inception_weights=inception_weights,
            download=download and not dry_run,
            progress=progress,
        )
        pipeline = load_pipeline(checkpoint, tokenizer, machine)
        originals = open_measured_images(str(reference), num_samples, pipeline.config.image_shape, machine.max_pixels)
        if dry_run:
            steps = (
                f"encode and decode {originals.count} images of {reference}",
                f"measure rFID, PSNR, SSIM and code usage with {choice.name} features",
            )
            facts = {"num_samples": originals.count, "features": choice.name}
            return Reconstruction(dry_run=DryRun(configuration={}, steps=steps, facts=facts))
        start = time.monotonic()
        images = ReconstructedImages(str(checkpoint), pipeline, originals)
        known = Reference(str(reference), originals)
        nearby = [Path(checkpoint), Path(checkpoint).parent]
        extractor = choice.load(originals.image_shape, resolve_device(machine.device), nearby)
        measurer = Measurer(extractor, cache, False, batch_size, progress)
        reference_set = known.measure(measurer)
        scores = evaluate_features(measurer.measure(images, "reconstructions"), reference_set, ("fid",))
        # Papers compare reconstructions with their originals too, so a reference of images is no reason.
        why_not = comparability(extractor, images.count) + input_reasons(images, known)
        fields = circumstances(images, known, extractor, reference_set, machine, 0, why_not)
        return Reconstruction(
            **{**fields, "sampling": model_description(pipeline)},
            rfid=scores["fid"],
            **images.meter.result(),
            scales=tuple(f"{grid.height}×{grid.width}" for grid in pipeline.config.pyramid.grids),
            reasons={"rfid": scores["reasons"]["fid"]} if "fid" in scores["reasons"] else {},
            seconds=time.monotonic() - start,
        )


class ReconstructedImages:
    """Reconstructions of images; each is compared with its original as it is made."""

    def __init__(self, name: str, pipeline: Pipeline, originals: EvaluationImages):
        self.name = name
        self.pipeline = pipeline
        self.originals = originals
        self.count, self.image_shape = originals.count, originals.image_shape
        self.labels, self.class_names = originals.labels, originals.class_names
        config = pipeline.config
        self.meter = ReconstructionMeter(config.pyramid.spans, config.tokenizer.codebook_size)

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """The reconstructions `start` up to `stop`, uint8 (B, 3, H, W)."""
        # One by one on a CPU, where convolutions choose their algorithm, and so their rounding, by the batch size.
        size = 1 if self.pipeline.device.type == "cpu" else batch_size
        for originals in self.originals.batches(batch_size, start, stop):
            pieces = originals.permute(0, 2, 3, 1).split(size)
            tokens = torch.cat([self.pipeline.encode(from_uint8(piece)) for piece in pieces])
            pixels = torch.cat([to_uint8(self.pipeline.decode(piece)) for piece in tokens.split(size)])
            images = pixels.cpu().permute(0, 3, 1, 2).contiguous()
            self.meter.update(originals, images, tokens.cpu())
            yield images

    def fingerprint(self) -> None:
        """None: every image must be decoded, as its pixels are compared as well as its features."""
