"""Training of the tokenizer: reconstruction, quantizer, perceptual and adversarial losses, a codebook in use."""

# Shape suffixes: B batch, C channels, H W pixels, L tokens of all scales, N vectors, S scales, V codebook entries,
# Z latent channels, h w the latent grid.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mvar_core.config import RunConfig
from mvar_core.errors import ConfigError, DataError
from mvar_core.models.directory import save_model
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import ScalePyramid
from mvar_core.runtime import generator
from mvar_core.training.discriminator import Adversary, balance, under
from mvar_core.training.parallel import BatchPart, Parallel, choose_parallel
from mvar_core.training.perceptual import SMALLEST_SIDE, PerceptualLoss
from mvar_core.training.trainer import Objective, OnStep, Outcome, Plan, Trainer, batch_rows, comparable_settings

_ADVERSARY = "adversary."
_VECTORS_PER_CODE = 256  # more do not move k-means' centres noticeably
_REFINEMENTS = 2  # rounds of k-means after the first one that has seen every scale
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
    """How well a tokenizer reconstructs `images`, and how it uses its codes.

    `psnr` is the mean over images, clamped, in dB; `psnr_by_scales` that of what the first scale, the first two, …
    decode to, empty where not asked for. Each scale uses a fraction `usage_per_scale` of the codebook, as many codes as
    `perplexity_per_scale` if it used them evenly; some scale uses `code_usage` of it.
    """

    psnr: float = math.nan
    usage_per_scale: tuple[float, ...] = ()
    perplexity_per_scale: tuple[float, ...] = ()
    code_usage: float = math.nan
    images: int = 0
    psnr_by_scales: tuple[float, ...] = ()


@dataclass(eq=False)
class TokenizerObjective(Objective):
    """What a tokenizer is trained on: its losses, a k-means start of the codebook and restarts of unused codes.

    The loss is reconstruction + perceptual + adversarial + quantizer loss, each with its weight. With `keep_codebook`
    the codebook is one that was trained before, and k-means does not touch it.
    """

    vqvae: VQVAE
    images: ImageBatchSource
    validation: ImageBatchSource | None
    config: RunConfig
    _: KW_ONLY
    device: torch.device
    seed: int
    dtype: torch.dtype = torch.float32
    perceptual: PerceptualLoss | None = None
    keep_codebook: bool = False
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        vqvae, device, dtype = self.vqvae, self.device, self.dtype
        train = self.train = self.config.train_tokenizer
        self._autocasts = dtype != torch.float32
        self.revival_end = train.revive_until * train.steps if train.revive_every else 0
        self.pyramid = vqvae.quantizer.pyramid
        if self.perceptual is not None:
            self.perceptual = self.perceptual.to(device) if train.perceptual.weight else None
        self.adversary = None
        if train.adversarial.weight:
            self.adversary = Adversary(self.config, device=device, dtype=dtype, seed=self.seed)
        self.metric_names: tuple[str, ...] = (
            *("reconstruction", "quantizer", "psnr"),
            *(("perceptual",) if self.perceptual else ()),
            *(("adversarial", "adversarial_weight") if self.adversary else ()),
        )
        self.watched = ("reconstruction", "quantizer")  # an adversarial loss may rise
        self.num_rows = len(self.images)
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
                if step >= self.train.adversarial.start:
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
        self.line_counts_SV = torch.zeros_like(counts_SV)
        line = {name: means[name] for name in self.metric_names} | code_usage(counts_SV)
        return line | {"revived": int(self.revived)} | (self.adversary.describe() if self.adversary else {})

    def validate(self) -> tuple[dict[str, Any], float]:
        """PSNR and use of codes on held-out images; the highest PSNR is the best."""
        if self.validation is None or len(self.validation) == 0:
            return {}, math.inf
        by_scales = self.train.scale_dropout > 0
        measures = measure_tokenizer(self.vqvae, self.validation, batch_size=self.train.batch_size, by_scales=by_scales)
        line: dict[str, Any] = {"val_psnr": measures.psnr, "val_code_usage": measures.code_usage}
        more = {"val_psnr_by_scales": measures.psnr_by_scales} if by_scales else {}
        return line | more, -measures.psnr

    def state(self) -> dict[str, Tensor]:
        """Counts since the last line and the last restart, and the discriminator with its optimizer."""
        total = self.parallel.world.all_reduce_sum
        adversary = self.adversary.state() if self.adversary else {}
        counts = {"line": total(self.line_counts_SV), "revival": total(self.revival_counts_V), "revived": self.revived}
        return counts | {_ADVERSARY + name: value for name, value in adversary.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        own = int(self.parallel.world.is_rank_zero)  # one of them keeps the counts of all processes
        self.line_counts_SV = state["line"].to(self.device) * own
        self.revival_counts_V = state["revival"].to(self.device) * own
        self.revived = state["revived"]
        if self.adversary is not None:
            self.adversary.load_state(under(_ADVERSARY, state))

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

    The tokenizer is float32; it is moved to `device` (by default its own), channels last, and left there in eval mode.
    Measures are of `validation`, or else of training images; those of an interrupted run are nan. `perceptual` is
    needed where the configuration gives that loss a weight; `started_from` identifies the files that the run started
    from, on which a resumed run must agree; `keep_codebook` keeps the codebook rather than start it by k-means. `seed`
    is by default that of `config`; for `dtype`, `resume` and `provenance`, and what is raised, see `train_transformer`.
    ConfigError also where the losses do not fit the size of the images, or the perceptual one is missing.
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

    trainer.leave(outcome, save, best=False)
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
    quantizer, codebook = vqvae.quantizer, vqvae.quantizer.codebook
    pyramid, codes = quantizer.pyramid, codebook.shape[0]
    counts_SV = torch.zeros(pyramid.num_scales, codes, dtype=torch.long, device=codebook.device)
    ratios, partial = [], []
    for start in range(0, len(rows), batch_size):
        images_BCHW = images.batch(rows[start : start + batch_size]).to(codebook.device)
        tokens_BL = vqvae.encode(images_BCHW)
        ratios.append(psnr(vqvae.decode(tokens_BL).float(), images_BCHW))
        counts_SV += count_codes(tokens_BL, pyramid, codes)
        if by_scales:
            decoded = (vqvae.decode_features(fhat_BZhw) for fhat_BZhw in quantizer.partial_features(tokens_BL))
            partial.append(torch.stack([psnr(made.clamp(-1, 1).float(), images_BCHW) for made in decoded], dim=1))
    return TokenizerMeasures(
        psnr=float(torch.cat(ratios).mean()),
        images=len(rows),
        **code_usage(counts_SV),
        psnr_by_scales=tuple(torch.cat(partial).mean(dim=0).tolist()) if by_scales else (),
    )


def kmeans_centres(vectors_NZ: Float[Tensor, "N Z"], count: int, seed: int) -> Float[Tensor, "V Z"]:
    """Centres of `count` clusters, V; where there are fewer distinct vectors, slightly moved copies fill up."""
    from sklearn.cluster import MiniBatchKMeans

    distinct_NZ = torch.unique(vectors_NZ, dim=0)
    if len(distinct_NZ) <= count:
        source = generator("k-means", seed)
        extra = torch.randint(len(distinct_NZ), (count - len(distinct_NZ),), generator=source)
        spread = 0.01 * vectors_NZ.std(unbiased=False).clamp_min(1e-4)
        noise_NZ = torch.randn(len(extra), vectors_NZ.shape[1], generator=source).to(vectors_NZ) * spread
        return torch.cat([distinct_NZ, distinct_NZ[extra.to(vectors_NZ.device)] + noise_NZ])
    clusters = MiniBatchKMeans(
        n_clusters=count, random_state=seed, n_init=1, batch_size=max(1024, 4 * count), max_iter=20
    )
    clusters.fit(vectors_NZ.cpu().double().numpy())
    return torch.from_numpy(clusters.cluster_centers_).to(vectors_NZ)


@torch.no_grad()
def start_codebook(quantizer: MultiScaleQuantizer, features: Float[Tensor, "B Z h w"], seed: int) -> None:
    """Set the codebook to k-means centres of what the scales have to quantize.

    What a scale quantizes is what the codes of the scales before it leave over, so the codebook grows with the scales:
    round s clusters the vectors of scales 1 … s. Scales weigh equally, or the few coarse vectors would get no codes.
    """
    codes, scales = quantizer.codebook.shape[0], quantizer.pyramid.num_scales
    for turn in range(scales + _REFINEMENTS):
        vectors = quantizer.residual_vectors(features)[: turn + 1]
        pooled_NZ = balanced_sample(vectors, _VECTORS_PER_CODE * codes, generator("k-means vectors", seed, turn))
        quantizer.codebook.copy_(kmeans_centres(pooled_NZ, codes, seed))


def balanced_sample(
    vectors: Sequence[Float[Tensor, "N Z"]], count: int, source: torch.Generator
) -> Float[Tensor, "N Z"]:
    """Up to `count` vectors, the same number from each scale as far as it has them."""
    share = max(1, count // len(vectors))
    chosen = []
    for vectors_NZ in vectors:
        order = torch.randperm(len(vectors_NZ), generator=source)[:share]
        chosen.append(vectors_NZ[order.to(vectors_NZ.device)])
    return torch.cat(chosen)


def count_codes(tokens_BL: Int[Tensor, "B L"], pyramid: ScalePyramid, codes: int) -> Int[Tensor, "S V"]:
    """How often each scale uses each code."""
    return torch.stack([torch.bincount(tokens_BL[:, span].flatten(), minlength=codes) for span in pyramid.spans])


def code_usage(counts_SV: Int[Tensor, "S V"]) -> dict[str, Any]:
    """Fraction of the codebook that each scale uses, the perplexity of its use, and the fraction in any use."""
    return {
        "usage_per_scale": tuple((counts_SV > 0).double().mean(dim=1).tolist()),
        "perplexity_per_scale": tuple(perplexity(counts_SV).tolist()),
        "code_usage": float((counts_SV.sum(dim=0) > 0).double().mean()),
    }


def perplexity(counts_SV: Tensor) -> Float[Tensor, " S"]:
    """Exponential of the entropy of each scale's use of codes: how many codes it uses as if evenly."""
    shares_SV = counts_SV.double() / counts_SV.sum(dim=1, keepdim=True).clamp_min(1)
    entropies_S: Tensor = torch.special.entr(shares_SV).sum(dim=1)
    return entropies_S.exp()


@torch.no_grad()
def revive_dead_codes(
    quantizer: MultiScaleQuantizer,
    features: Float[Tensor, "B Z h w"],
    counts_V: Int[Tensor, " V"],
    optimizer: torch.optim.Optimizer,
    source: torch.Generator,
) -> int:
    """Move codes that nothing used onto vectors of the current batch, and reset their optimizer state.

    `counts_V` counts uses since the last call; `source` chooses the vectors. Returns how many codes were moved.
    """
    dead = (counts_V == 0).nonzero().flatten()
    if len(dead) == 0:
        return 0
    vectors = quantizer.residual_vectors(features)
    pooled_NZ = balanced_sample(vectors, len(dead) * len(vectors), source)
    order = torch.randint(len(pooled_NZ), (len(dead),), generator=source)
    quantizer.codebook[dead] = pooled_NZ[order.to(pooled_NZ.device)]
    moments = optimizer.state.get(quantizer.codebook, {})
    for name in ("exp_avg", "exp_avg_sq"):
        if name in moments:
            moments[name][dead] = 0
    return len(dead)
