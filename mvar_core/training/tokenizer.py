"""Training of the tokenizer: reconstruction and quantizer losses, and a codebook that stays in use."""

# Shape suffixes: B batch, C channels, H W pixels, S scales, V codebook entries.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mvar_core.config import RunConfig, TokenizerTrainConfig
from mvar_core.errors import DataError
from mvar_core.models.directory import save_model
from mvar_core.models.vqvae import VQVAE
from mvar_core.runtime import generator
from mvar_core.training.codebook import count_codes, perplexity, revive_dead_codes, start_codebook
from mvar_core.training.engine import optimise
from mvar_core.training.objective import BatchPart, OnStep, Plan, comparable_settings
from mvar_core.training.order import batch_rows

_COMPARED_SECTIONS = ("image_size", "patch_sizes", "tokenizer", "data")
_MEASURED_IMAGES = 2048


class ImageBatchSource(Protocol):
    """Images to train on, with whatever views of them there are."""

    def __len__(self) -> int:
        """Rows: images times views."""
        ...

    def batch(self, rows: np.ndarray, step: int = 0) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of rows, float32; what is drawn at random, as crops, is the step's."""
        ...


@dataclass(frozen=True)
class TokenizerMeasures:
    """How well a tokenizer reconstructs, and how it uses its codes.

    Attributes:
        psnr: Mean over images, in dB, on clamped reconstructions.
        usage_per_scale: Part of the codebook that each scale uses.
        perplexity_per_scale: How many codes each scale uses as if evenly.
        code_usage: Part of the codebook that some scale uses.
        images: How many images were measured.
    """

    psnr: float
    usage_per_scale: tuple[float, ...]
    perplexity_per_scale: tuple[float, ...]
    code_usage: float
    images: int


@dataclass(frozen=True)
class TokenizerTrainResult:
    """How the training of a tokenizer ended.

    Attributes:
        steps: Steps done.
        loss: Training loss, averaged over the last line of metrics.jsonl.
        psnr: In dB, on the validation images where there are any; nan where the run was interrupted, as the next two.
        usage_per_scale: Part of the codebook that each scale uses.
        code_usage: Part of the codebook that some scale uses.
        seconds: Time spent, over all sessions of the run.
        interrupted: Whether Ctrl-C ended it early; run the same again to go on.
        skipped: Steps left out because their loss or gradient was not finite.
    """

    steps: int
    loss: float
    psnr: float
    usage_per_scale: tuple[float, ...]
    code_usage: float
    seconds: float
    interrupted: bool
    skipped: int


def psnr(images: Float[Tensor, "B C H W"], others: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each pair, in dB, for images in [-1, 1]."""
    errors_B = (images - others).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / errors_B.clamp_min(1e-12))


@torch.no_grad()
def measure_tokenizer(
    vqvae: VQVAE, images: ImageBatchSource, *, batch_size: int = 64, limit: int = _MEASURED_IMAGES
) -> TokenizerMeasures:
    """Reconstruct up to `limit` images, evenly spread over the source, and count what they use.

    Raises:
        DataError: There are no images.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(np.int64))
    if len(rows) == 0:
        raise DataError("There are no images to measure the tokenizer on.")
    codebook = vqvae.quantizer.codebook
    pyramid, codes = vqvae.quantizer.pyramid, codebook.shape[0]
    counts_SV = torch.zeros(pyramid.num_scales, codes, dtype=torch.long, device=codebook.device)
    ratios = []
    for start in range(0, len(rows), batch_size):
        images_BCHW = images.batch(rows[start : start + batch_size]).to(codebook.device)
        tokens_BL = vqvae.encode(images_BCHW)
        ratios.append(psnr(vqvae.decode(tokens_BL).float(), images_BCHW))
        counts_SV += count_codes(tokens_BL, pyramid, codes)
    return TokenizerMeasures(
        psnr=float(torch.cat(ratios).mean()),
        usage_per_scale=tuple((counts_SV > 0).double().mean(dim=1).tolist()),
        perplexity_per_scale=tuple(perplexity(counts_SV).tolist()),
        code_usage=float((counts_SV.sum(dim=0) > 0).double().mean()),
        images=len(rows),
    )


class TokenizerObjective:
    """Reconstruction and quantizer loss, with k-means at the start and restarts of unused codes."""

    def __init__(
        self,
        vqvae: VQVAE,
        images: ImageBatchSource,
        validation: ImageBatchSource | None,
        train: TokenizerTrainConfig,
        *,
        total_steps: int,
        device: torch.device,
        seed: int,
    ):
        self.vqvae = vqvae
        self.images = images
        self.validation = validation
        self.train = train
        self.device = device
        self.seed = seed
        self.revival_end = train.revive_until * total_steps if train.revive_every else 0
        self.pyramid = vqvae.quantizer.pyramid
        self.metric_names: tuple[str, ...] = ("reconstruction", "quantizer", "psnr")
        self.num_rows = len(images)
        self.tokens_per_image = self.pyramid.num_tokens
        codes = vqvae.quantizer.codebook.shape[0]
        self.line_counts_SV = torch.zeros(self.pyramid.num_scales, codes, dtype=torch.long, device=device)
        self.revival_counts_V = torch.zeros(codes, dtype=torch.long, device=device)
        self.revived = torch.zeros((), dtype=torch.long)

    def fetch(self, rows: np.ndarray, step: int) -> Tensor:
        """Images of rows, with the crops of a step."""
        return self.images.batch(rows, step)

    def loss(self, model: nn.Module, batch: Tensor, step: int, part: BatchPart) -> tuple[Tensor, Tensor]:
        """Weighted loss; reconstruction loss, quantizer loss and PSNR of the batch."""
        images_BCHW = self._on_device(batch)
        output = model(images_BCHW, self.train.commitment)
        distance = F.l1_loss if self.train.reconstruction == "l1" else F.mse_loss
        reconstruction = distance(output.images_BCHW, images_BCHW)
        counts_SV = count_codes(output.tokens_BL, self.pyramid, self.line_counts_SV.shape[1])
        self.line_counts_SV += counts_SV
        self.revival_counts_V += counts_SV.sum(dim=0)
        with torch.no_grad():
            ratio = psnr(output.images_BCHW.clamp(-1, 1), images_BCHW).mean()
        values = torch.stack([reconstruction.detach(), output.quantizer_loss.detach(), ratio])
        return reconstruction + self.train.vq_weight * output.quantizer_loss, values

    @torch.no_grad()
    def prepare(self) -> None:
        """Start the codebook by k-means on the features of the first batches."""
        batches = self.train.kmeans_batches
        if batches == 0:
            return
        features = [
            self.vqvae.encode_features(
                self._on_device(
                    self.images.batch(batch_rows(step, self.train.batch_size, self.num_rows, self.seed), step)
                )
            )
            for step in range(batches)
        ]
        start_codebook(self.vqvae.quantizer, torch.cat(features), self.seed)

    @torch.no_grad()
    def after_step(self, batch: Tensor, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Restart the codes that were not used since the last restart."""
        done = step + 1
        if not self.train.revive_every or done % self.train.revive_every or done > self.revival_end:
            return
        features = self.vqvae.encode_features(self._on_device(batch))
        source = generator("revive", self.seed, step)
        self.revived += revive_dead_codes(self.vqvae.quantizer, features, self.revival_counts_V, optimizer, source)
        self.revival_counts_V.zero_()

    def describe(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Mean losses and PSNR, and the use of codes since the last line."""
        counts_SV = self.line_counts_SV
        line = {
            **{name: means[name] for name in self.metric_names},
            "usage_per_scale": (counts_SV > 0).double().mean(dim=1).tolist(),
            "perplexity_per_scale": perplexity(counts_SV).tolist(),
            "code_usage": float((counts_SV.sum(dim=0) > 0).double().mean()),
            "revived": int(self.revived),
        }
        self.line_counts_SV = torch.zeros_like(counts_SV)
        return line

    def validate(self) -> dict[str, Any]:
        """PSNR and use of codes on held-out images."""
        if self.validation is None or len(self.validation) == 0:
            return {}
        measures = measure_tokenizer(self.vqvae, self.validation, batch_size=self.train.batch_size)
        return {"val_psnr": measures.psnr, "val_code_usage": measures.code_usage}

    def score(self, measures: Mapping[str, Any]) -> float | None:
        """The PSNR, negated."""
        return -measures["val_psnr"] if "val_psnr" in measures else None

    def state(self) -> dict[str, Tensor]:
        """Counts since the last line and the last restart."""
        return {"line": self.line_counts_SV, "revival": self.revival_counts_V, "revived": self.revived}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.line_counts_SV = state["line"].to(self.device)
        self.revival_counts_V = state["revival"].to(self.device)
        self.revived = state["revived"]

    def _on_device(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.to(self.device, non_blocking=True, memory_format=torch.channels_last)


def train_tokenizer(
    vqvae: VQVAE,
    images: ImageBatchSource,
    config: RunConfig,
    out: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    resume: bool = True,
    validation: ImageBatchSource | None = None,
    provenance: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> TokenizerTrainResult:
    """Train a tokenizer and leave a run directory that is also a model directory without a transformer.

    Running it again in the same `out` goes on from the last checkpoint; a finished run is only measured again.

    Args:
        vqvae: What is trained, float32; it is moved to `device`, channels last, and left there in eval mode.
        images: Training images.
        config: The run's configuration; `config.train_tokenizer` says how to train.
        out: The run directory.
        device: Where to compute; by default where the tokenizer is.
        dtype: Type that autocast computes the convolutions in.
        seed: Of the order of the data, of k-means and of restarts; by default `config.seed`.
        resume: Whether to go on from a checkpoint in `out`; otherwise the checkpoints there are forgotten.
        validation: Held-out images for the measures; without them, training images are measured.
        provenance: Further facts for config.json.
        on_step: Called after every step.

    Raises:
        CheckpointError: The checkpoint in `out` is damaged or belongs to a run with other settings.
        DataError: No images, or images of another size than the model's.
        MvarError: Ten steps in a row were not finite.
    """
    train = config.train_tokenizer
    device = device or next(vqvae.parameters()).device
    seed = config.seed if seed is None else seed
    check_images(images, config)
    vqvae.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = TokenizerObjective(vqvae, images, validation, train, total_steps=train.steps, device=device, seed=seed)
    settings = comparable_settings(config, _COMPARED_SECTIONS, train)
    plan = Plan(
        total_steps=train.steps,
        train=train,
        device=device,
        dtype=dtype,
        seed=seed,
        settings={**settings, "seed": seed, "rows": len(images)},
        resume=resume,
    )
    outcome = optimise(vqvae, objective, plan, config, out, no_decay={"quantizer.codebook"}, on_step=on_step)
    measures = None
    if not outcome.interrupted:
        measures = measure_tokenizer(vqvae, validation or images, batch_size=train.batch_size)
        facts = {**config.provenance, **(provenance or {}), "tokenizer_steps": outcome.steps, "seed": seed}
        save_model(out, config.model.model_copy(update={"provenance": facts}), tokenizer=vqvae.state_dict())
    return TokenizerTrainResult(
        steps=outcome.steps,
        loss=outcome.loss,
        psnr=measures.psnr if measures else math.nan,
        usage_per_scale=measures.usage_per_scale if measures else (),
        code_usage=measures.code_usage if measures else math.nan,
        seconds=outcome.seconds,
        interrupted=outcome.interrupted,
        skipped=outcome.skipped,
    )


def check_images(images: ImageBatchSource, config: RunConfig) -> None:
    """Refuse images that do not fit the model, judged by the first row.

    Raises:
        DataError: No images, or images of another shape.
    """
    if len(images) == 0:
        raise DataError("There are no images to train on.", "Check --data.")
    found, wanted = tuple(images.batch(np.zeros(1, dtype=np.int64)).shape[1:]), (3, *config.image_shape)
    if found != wanted:
        raise DataError(
            f"The images are {'×'.join(map(str, found))}; the model takes {'×'.join(map(str, wanted))}.",
            "Set image_size (and patch_sizes) to fit.",
        )
