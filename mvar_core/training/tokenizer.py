"""Training of the tokenizer: reconstruction, quantizer, perceptual and adversarial losses, a codebook in use."""

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

from mvar_core.config import RunConfig
from mvar_core.errors import ConfigError, DataError
from mvar_core.models.directory import save_model
from mvar_core.models.vqvae import VQVAE
from mvar_core.runtime import generator
from mvar_core.training.checkpoints import BEST, best_weights
from mvar_core.training.codebook import code_usage, count_codes, revive_dead_codes, start_codebook
from mvar_core.training.discriminator import Adversary, balance
from mvar_core.training.objective import BatchPart, Objective, OnStep, Outcome, Plan, comparable_settings
from mvar_core.training.order import batch_rows
from mvar_core.training.parallel import Parallel, choose_parallel
from mvar_core.training.perceptual import SMALLEST_SIDE, PerceptualLoss
from mvar_core.training.trainer import Trainer

_ADVERSARY = "adversary."
_MEASURED_IMAGES = 2048
_COMPARED_SECTIONS = ("image_size", "patch_sizes", "tokenizer", "data")


class ImageBatchSource(Protocol):
    """Images to train on, with whatever views of them there are."""

    def __len__(self) -> int:
        """Rows: images times views."""
        ...

    def batch(self, rows: np.ndarray, step: int = 0) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of rows, float32; what is random, as crops, is the step's."""
        ...


@dataclass(frozen=True)
class TokenizerMeasures:
    """How well a tokenizer reconstructs, and how it uses its codes.

    Attributes:
        psnr: Mean over images, clamped, in dB.
        usage_per_scale: Fraction of the codebook that each scale uses.
        perplexity_per_scale: How many codes each scale uses as if evenly.
        code_usage: Fraction of the codebook that some scale uses.
        images: How many images were measured.
        psnr_by_scales: Of what the first scale, the first two, … decode to; empty where not asked for.
    """

    psnr: float = math.nan
    usage_per_scale: tuple[float, ...] = ()
    perplexity_per_scale: tuple[float, ...] = ()
    code_usage: float = math.nan
    images: int = 0
    psnr_by_scales: tuple[float, ...] = ()


class TokenizerObjective(Objective):
    """What a tokenizer is trained on: its losses, a k-means start of the codebook and restarts of unused codes.

    The loss is reconstruction + perceptual + adversarial + quantizer loss, each with its weight. With `keep_codebook`
    the codebook is one that was trained before, and k-means does not touch it.
    """

    def __init__(
        self,
        vqvae: VQVAE,
        images: ImageBatchSource,
        validation: ImageBatchSource | None,
        config: RunConfig,
        *,
        device: torch.device,
        seed: int,
        dtype: torch.dtype = torch.float32,
        perceptual: PerceptualLoss | None = None,
        keep_codebook: bool = False,
        parallel: Parallel | None = None,
    ):
        train = config.train_tokenizer
        self.vqvae, self.images, self.validation, self.train = vqvae, images, validation, train
        self.device, self.seed, self.keep_codebook = device, seed, keep_codebook
        self.parallel = parallel or Parallel()
        self._autocasts = dtype != torch.float32
        self.revival_end = train.revive_until * train.steps if train.revive_every else 0
        self.pyramid = vqvae.quantizer.pyramid
        self.perceptual = perceptual.to(device) if perceptual is not None and train.perceptual.weight else None
        self.adversary = None
        if train.adversarial.weight:
            self.adversary = Adversary(config, device=device, dtype=dtype, seed=seed)
        self.metric_names: tuple[str, ...] = (
            *("reconstruction", "quantizer", "psnr"),
            *(("perceptual",) if self.perceptual else ()),
            *(("adversarial", "adversarial_weight") if self.adversary else ()),
        )
        self.watched = ("reconstruction", "quantizer")  # an adversarial loss may rise
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
        """Weighted loss, and its parts as `metric_names` says; PSNR is of the batch."""
        images_BCHW = self._on_device(batch)
        output = model(images_BCHW, self.train.commitment, self.shown_scales(step, part))
        counts_SV = count_codes(output.tokens_BL, self.pyramid, self.line_counts_SV.shape[1])
        self.line_counts_SV += counts_SV
        self.revival_counts_V += counts_SV.sum(dim=0)
        distance = F.l1_loss if self.train.reconstruction == "l1" else F.mse_loss
        reconstruction = distance(output.images_BCHW, images_BCHW)
        with torch.no_grad():
            ratio = psnr(output.images_BCHW.clamp(-1, 1), images_BCHW).mean()
        parts = [reconstruction, output.quantizer_loss, ratio]
        loss = reconstruction
        # In float16 the gradients of these networks, which are not scaled, could be lost.
        half = torch.get_autocast_dtype(self.device.type)
        with torch.autocast(self.device.type, half, enabled=self._autocasts and half != torch.float16):
            if self.perceptual is not None:
                perceptual = self.perceptual(output.images_BCHW, images_BCHW).mean()
                loss = loss + self.train.perceptual.weight * perceptual
                parts.append(perceptual)
            if self.adversary is not None:
                if self.adversary.active(step):
                    adversarial = self.adversary.generator_loss(output.images_BCHW)
                    last_layer = self.vqvae.decoder.output_conv.weight
                    loss, weight = balance(loss, adversarial, output.images_BCHW, last_layer, self.train.adversarial)
                    self.adversary.keep(images_BCHW, output.images_BCHW, step)
                    parts += [adversarial, weight]
                else:
                    parts += [loss.new_tensor(math.nan)] * 2
        values = torch.stack([value.detach().float() for value in parts])
        return loss + self.train.vq_weight * output.quantizer_loss, values

    def shown_scales(self, step: int, part: BatchPart) -> Tensor | None:
        """From how many of its first scales each image of a part is decoded in a step; None is all of them."""
        if not self.train.scale_dropout:
            return None
        source = generator("shown scales", self.seed, step)
        scales = self.pyramid.num_scales
        dropped_B = torch.rand(part.total, generator=source) < self.train.scale_dropout
        fewer_B = torch.randint(1, scales + 1, (part.total,), generator=source)
        return torch.where(dropped_B, fewer_B, scales)[part.start : part.stop].to(self.device)

    @torch.no_grad()
    def prepare(self) -> None:
        """Start the codebook by k-means on the features of the first batches."""
        batches = 0 if self.keep_codebook else self.train.kmeans_batches
        if batches == 0:
            return
        features = []
        for step in range(batches):
            rows = batch_rows(step, self.train.batch_size, self.num_rows, self.seed)
            features.append(self.vqvae.encode_features(self._on_device(self.images.batch(rows, step))))
        start_codebook(self.vqvae.quantizer, torch.cat(features), self.seed)
        # K-means may round differently on another machine.
        self.parallel.world.broadcast_tensor(self.vqvae.quantizer.codebook)

    def after_step(self, batch: Tensor, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Let the discriminator learn, and restart the codes that were not used since the last restart."""
        if self.adversary is not None:
            self.adversary.step(step)
        done = step + 1
        if not self.train.revive_every or done % self.train.revive_every or done > self.revival_end:
            return
        world, quantizer = self.parallel.world, self.vqvae.quantizer
        with torch.no_grad():
            own = self.vqvae.encode_features(self._on_device(batch))
            # The rows of all processes, whose shares of the batch need not be equal.
            part = self.parallel.part(self.train.batch_size)
            features = own.new_zeros(part.total, *own.shape[1:])
            features[part.start : part.stop] = own
            features, counts_V = world.all_reduce_sum(features), world.all_reduce_sum(self.revival_counts_V)
            source = generator("revive", self.seed, step)
            self.revived += revive_dead_codes(quantizer, features, counts_V, optimizer, source)
            world.broadcast_tensor(quantizer.codebook)
        self.revival_counts_V.zero_()

    def describe(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Mean losses and PSNR, and the use of codes since the last line."""
        counts_SV = self.parallel.world.all_reduce_sum(self.line_counts_SV)
        line = {
            **{name: means[name] for name in self.metric_names},
            **code_usage(counts_SV),
            "revived": int(self.revived),
            **(self.adversary.describe() if self.adversary else {}),
        }
        self.line_counts_SV = torch.zeros_like(counts_SV)
        return line

    def validate(self) -> dict[str, Any]:
        """PSNR and use of codes on held-out images."""
        if self.validation is None or len(self.validation) == 0:
            return {}
        by_scales = self.train.scale_dropout > 0
        measures = measure_tokenizer(self.vqvae, self.validation, batch_size=self.train.batch_size, by_scales=by_scales)
        line: dict[str, Any] = {"val_psnr": measures.psnr, "val_code_usage": measures.code_usage}
        return {**line, "val_psnr_by_scales": measures.psnr_by_scales} if by_scales else line

    def score(self, measures: Mapping[str, Any]) -> float | None:
        """The PSNR, negated."""
        return -measures["val_psnr"] if "val_psnr" in measures else None

    def state(self) -> dict[str, Tensor]:
        """Counts since the last line and the last restart, and the discriminator with its optimizer."""
        total = self.parallel.world.all_reduce_sum
        adversary = self.adversary.state() if self.adversary else {}
        return {
            "line": total(self.line_counts_SV),
            "revival": total(self.revival_counts_V),
            "revived": self.revived,
            **{_ADVERSARY + name: value for name, value in adversary.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        own = int(self.parallel.world.is_rank_zero)  # one of them keeps the counts of all processes
        self.line_counts_SV = state["line"].to(self.device) * own
        self.revival_counts_V = state["revival"].to(self.device) * own
        self.revived = state["revived"]
        if self.adversary is not None:
            self.adversary.load_state(
                {name.removeprefix(_ADVERSARY): x for name, x in state.items() if name.startswith(_ADVERSARY)}
            )

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
    perceptual: PerceptualLoss | None = None,
    started_from: Mapping[str, Any] | None = None,
    keep_codebook: bool = False,
) -> tuple[Outcome, TokenizerMeasures]:
    """Train a tokenizer and leave a run directory that is also a model directory without a transformer.

    Running it again in the same `out` resumes from the last checkpoint; a finished run is only measured again.
    Processes that torch.distributed connects share every batch.

    The tokenizer is float32; it is moved to `device`, channels last, and left there in eval mode. Measures are of
    `validation`, or else of training images; those of an interrupted run are nan. `perceptual` is needed where the
    configuration gives that loss a weight; `started_from` identifies the files that the run started from, on which a
    resumed run must agree; `keep_codebook` keeps the codebook rather than start it by k-means. `device` and `seed` are
    by default those of the tokenizer and of `config`; `dtype` is what autocast computes the convolutions in; without
    `resume` the checkpoints in `out` are ignored; `provenance` is for config.json.

    Raises:
        CheckpointError: The checkpoint in `out` is damaged or belongs to a run with other settings.
        ConfigError: The losses do not fit the size of the images, or the perceptual one is missing.
        DataError: No images, or images of another size than the model's.
        MvarError: Ten steps in a row were not finite.
    """
    train = config.train_tokenizer
    device = device or next(vqvae.parameters()).device
    seed = config.seed if seed is None else seed
    _check(images, config, perceptual)
    # A pyramid of few scales does not use all convolutions φ.
    parallel = choose_parallel(device, dtype, train.batch_size, partial=True)
    vqvae.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = TokenizerObjective(
        vqvae, images, validation, config, device=device, seed=seed, dtype=dtype, perceptual=perceptual,
        keep_codebook=keep_codebook, parallel=parallel,
    )  # fmt: skip
    settings = comparable_settings(config, _COMPARED_SECTIONS, train)
    settings |= {"seed": seed, "rows": len(images), "started_from": dict(started_from or {})}
    plan = Plan(train.steps, train, device, dtype, seed, settings, resume)
    no_decay = {"quantizer.codebook"}
    trainer = Trainer(vqvae, objective, plan, out, parallel=parallel, no_decay=no_decay, on_step=on_step)
    outcome = trainer.run(config)
    measures = TokenizerMeasures()
    if not outcome.interrupted and outcome.diverged is None:
        measures = measure_tokenizer(vqvae, validation or images, batch_size=train.batch_size)

    def save(directory: Path, state: Mapping[str, Tensor], steps: int) -> None:
        facts = {**config.provenance, **(provenance or {}), "tokenizer_steps": steps, "seed": seed}
        save_model(directory, config.model.model_copy(update={"provenance": facts}), tokenizer=state)

    if parallel.world.is_rank_zero and outcome.diverged is not None and outcome.best_step is not None:
        save(out / BEST, best_weights(out, outcome.best_step), outcome.best_step)
    elif parallel.world.is_rank_zero and not outcome.interrupted and outcome.diverged is None:
        save(out, vqvae.state_dict(), outcome.steps)
    parallel.world.barrier()
    if outcome.diverged is not None:
        raise outcome.diverged
    return outcome, measures


def _check(images: ImageBatchSource, config: RunConfig, perceptual: PerceptualLoss | None) -> None:
    """Refuse images that do not fit the model, judged by the first row, and a perceptual loss that cannot be."""
    if len(images) == 0:
        raise DataError("There are no images to train on.", "Check --data.")
    found, wanted = tuple(images.batch(np.zeros(1, dtype=np.int64)).shape[1:]), (3, *config.image_shape)
    if found != wanted:
        raise DataError(
            f"The images are {'×'.join(map(str, found))}; the model expects {'×'.join(map(str, wanted))}.",
            "Set image_size (and patch_sizes) to fit.",
        )
    if config.train_tokenizer.perceptual.weight:
        if perceptual is None:
            raise ConfigError("train_tokenizer.perceptual.weight is set, but the loss was not loaded.")
        if min(config.image_shape) < SMALLEST_SIDE:
            raise ConfigError(
                f"The perceptual loss needs images of {SMALLEST_SIDE} pixels or more; these have"
                f" {'×'.join(map(str, config.image_shape))}.",
                "Set train_tokenizer.perceptual.weight=0.",
            )


def psnr(images: Float[Tensor, "B C H W"], others: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each pair, in dB, for images in [-1, 1]."""
    errors_B = (images - others).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / errors_B.clamp_min(1e-12))


@torch.no_grad()
def measure_tokenizer(
    vqvae: VQVAE,
    images: ImageBatchSource,
    *,
    batch_size: int = 64,
    limit: int = _MEASURED_IMAGES,
    by_scales: bool = False,
) -> TokenizerMeasures:
    """Reconstruct up to `limit` images, evenly spread over the source, and count what they use.

    `by_scales` also decodes from the first scale alone, the first two, … DataError where there are no images.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(np.int64))
    if len(rows) == 0:
        raise DataError("There are no images to measure the tokenizer on.")
    codebook = vqvae.quantizer.codebook
    pyramid, codes = vqvae.quantizer.pyramid, codebook.shape[0]
    counts_SV = torch.zeros(pyramid.num_scales, codes, dtype=torch.long, device=codebook.device)
    ratios, partial = [], []
    for start in range(0, len(rows), batch_size):
        images_BCHW = images.batch(rows[start : start + batch_size]).to(codebook.device)
        tokens_BL = vqvae.encode(images_BCHW)
        ratios.append(psnr(vqvae.decode(tokens_BL).float(), images_BCHW))
        counts_SV += count_codes(tokens_BL, pyramid, codes)
        if by_scales:
            partial.append(_psnr_by_scales(vqvae, tokens_BL, images_BCHW))
    return TokenizerMeasures(
        psnr=float(torch.cat(ratios).mean()),
        images=len(rows),
        **code_usage(counts_SV),
        psnr_by_scales=tuple(torch.cat(partial).mean(dim=0).tolist()) if by_scales else (),
    )


def _psnr_by_scales(vqvae: VQVAE, tokens_BL: Tensor, images_BCHW: Tensor) -> Tensor:
    """(B, S): of images decoded from their first 1, 2, … S scales."""
    decoded = (vqvae.decode_features(fhat_BZhw) for fhat_BZhw in vqvae.quantizer.partial_features(tokens_BL))
    return torch.stack([psnr(made.clamp(-1, 1).float(), images_BCHW) for made in decoded], dim=1)
