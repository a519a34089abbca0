"""Training of the transformer on a token cache: its loss, and the curriculum, which scales a step trains.

The joint curriculum trains all scales in one packed pass. The interleaved one is what MVAR was published with: most
steps train the first scales together, the others one of the last scales alone. Given the tokens the scales' losses
simply add up, so both follow the same gradient on average; the joint one follows it in every step.
"""

# Shape suffixes: B batch, L tokens of all scales, l tokens of the trained scales, Z latent channels,
# V codebook entries, S scales, X values of a vector that the model is conditioned on, N all tokens, n those of a chunk.

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mvar_core.config import RunConfig
from mvar_core.config.training import TrainConfig
from mvar_core.errors import ConfigError, DataError
from mvar_core.kernels import check_backend
from mvar_core.models.compilation import check_compiler, compiled_blocks
from mvar_core.models.directory import save_model
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import AttentionPattern, ScalePyramid
from mvar_core.runtime import RowDraws, generator
from mvar_core.training.parallel import BatchPart, Parallel, choose_parallel
from mvar_core.training.trainer import (
    Objective,
    OnSample,
    OnStep,
    Outcome,
    Plan,
    Trainer,
    comparable_settings,
    planned_steps,
)

_MODEL_SECTIONS = ("image_size", "patch_sizes", "tokenizer", "transformer", "attention")

CHUNK_ELEMENTS = 1 << 21
"""Logits that are turned into gradients at a time."""
WORTHWHILE_ELEMENTS = 1 << 22
"""Logits below which the three buffers of the usual cross-entropy do not matter."""


class TokenSource(Protocol):
    """Images as tokens: a token cache, or anything with the same methods."""

    def __len__(self) -> int:
        """Rows: images times views."""
        ...

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64 of rows, and labels (B,) int64 or vectors (B, X) float32 as conditions."""
        ...


@dataclass(eq=False)
class TransformerObjective(Objective):
    """Cross-entropy of the true tokens under teacher forcing, as the curriculum weights it."""

    transformer: Transformer
    quantizer: MultiScaleQuantizer
    tokens: TokenSource
    validation: TokenSource | None
    curriculum: Curriculum
    plan: Plan
    parallel: Parallel = field(default_factory=Parallel)
    attention: str = "auto"
    val_loss: float | None = None

    def __post_init__(self) -> None:
        self.num_scales = self.transformer.pyramid.num_scales
        scales = range(self.num_scales)
        self.metric_names = (*(f"loss_{s}" for s in scales), *(f"accuracy_{s}" for s in scales))
        if self.curriculum.period > 1:  # the loss of a step is that of its scales, more or fewer
            self.watched = tuple(f"loss_{s}" for s in scales)
        self.num_rows = len(self.tokens)
        self.tokens_per_image = round(self.curriculum.tokens_per_step())

    def fetch(self, rows: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and conditions of rows."""
        return self.tokens.batch(rows)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int, part: BatchPart) -> tuple[Tensor, Tensor]:
        """Loss, and each scale's loss and accuracy."""
        draws = RowDraws(generator("train", self.plan.seed, step), part.start, part.total)
        return self._losses(model, batch, step, draws)

    def describe(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Per-scale losses and accuracies as lists."""
        scales = range(self.num_scales)
        return {f"scale_{kind}": [means[f"{kind}_{s}"] for s in scales] for kind in ("loss", "accuracy")}

    @torch.no_grad()
    def validate(self) -> tuple[dict[str, Any], float]:
        """Loss and accuracy on the validation tokens, all of them, with nothing dropped; the loss chooses."""
        if self.validation is None or len(self.validation) == 0:
            return {}, math.inf
        device, dtype, size = self.plan.device, self.plan.dtype, self.plan.train.batch_size
        sums, rows = torch.zeros(1 + 2 * self.num_scales, device=device), len(self.validation)
        for start in range(0, rows, size):
            chosen = np.arange(start, min(start + size, rows))
            part = self.parallel.part(len(chosen))
            # A process without a row computes one that does not count: all must call the model together.
            batch = self.validation.batch(chosen[part.start : part.stop] if part.rows else chosen[:1])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                # No step: all scales, whatever the curriculum.
                mean_loss, by_scale = self._losses(self.transformer, batch, None, None)
            sums += torch.cat([mean_loss.view(1), by_scale]).float() * part.rows
        loss, *rest = (self.parallel.world.all_reduce_sum(sums) / rows).tolist()
        self.val_loss, scales = loss, self.num_scales
        return {"val_loss": loss, "val_scale_loss": rest[:scales], "val_scale_accuracy": rest[scales:]}, loss

    def state(self) -> dict[str, Tensor]:
        """The last validation loss, so that a finished run still knows it."""
        return {} if self.val_loss is None else {"val_loss": torch.tensor(self.val_loss, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.val_loss = float(state["val_loss"]) if "val_loss" in state else None

    def _losses(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int | None, draws: RowDraws | None
    ) -> tuple[Tensor, Tensor]:
        tokens_BL, conditions = (part.to(self.plan.device, non_blocking=True) for part in batch)
        # f̂ is a sum over many scales: it stays in float32 where the transformer runs under autocast.
        with torch.no_grad(), torch.autocast(self.plan.device.type, enabled=False):
            inputs = self.quantizer.teacher_forcing_inputs(tokens_BL)
        losses = self.curriculum.losses(
            cast("Transformer", model), conditions, tokens_BL, inputs, step=step, attention=self.attention,
            generator=draws,
        )  # fmt: skip
        return losses.loss, torch.cat([losses.scale_losses, losses.scale_accuracies])


def train_transformer(
    transformer: Transformer,
    tokenizer: VQVAE,
    tokens: TokenSource,
    config: RunConfig,
    out: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    resume: bool = True,
    validation: TokenSource | None = None,
    provenance: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    on_sample: OnSample | None = None,
    fsdp: bool = False,
) -> Outcome:
    """Train a transformer and leave a run directory that is also a model directory.

    Running it again in the same `out` resumes from the last checkpoint; a finished run is only saved again. Processes
    that torch.distributed connects share every batch; they may be more or fewer than those that wrote the checkpoint.

    The transformer is float32, and the same in all processes; it is moved to `device` (by default its own) and left
    there in eval mode, or sharded with `fsdp`. `tokenizer` made the tokens, and is saved next to the transformer.
    `validation` is measured at every checkpoint and at the end; `on_step` is called after every step, `on_sample` every
    `train.sample_every` steps to make a picture of what is generated. `dtype` is what autocast computes in; without
    `resume` the checkpoints in `out` are forgotten; `provenance` is for config.json.

    Raises:
        CheckpointError: The checkpoint in `out` is damaged or belongs to a run with other settings.
        ConfigError: A tracker is asked for that is not installed, or the processes cannot share the batch.
        DataError: Nothing to train on, or data that do not fit the model.
        BackendError: The attention backend does not exist or cannot train this model here, or `train.compile` is set
            and there is no compiler.
        MvarError: Too many steps in a row were not finite.
    """
    train, quantizer = config.train, tokenizer.quantizer
    device = device or next(transformer.parameters()).device
    check_tokens(tokens, transformer, quantizer)
    check_backend(attention, transformer.patterns, device, dtype, needs_grad=True)
    if train.compile:
        check_compiler(device)
    partial = train.curriculum == "interleaved"
    parallel = choose_parallel(device, dtype, train.batch_size, fsdp=fsdp, partial=partial)
    if fsdp and train.sample_every:
        raise ConfigError(
            "train.sample_every samples from a model that --fsdp has sharded over the processes.",
            "Set train.sample_every=0, and use `mvar sample` on the finished run.",
        )
    if not fsdp:  # which moves shard by shard
        transformer.to(device)
    quantizer.to(device)
    settings = comparable_settings(config, _MODEL_SECTIONS, train)
    if config.conditioning.dim is not None:  # runs on classes have never recorded it
        settings["conditioning"] = config.conditioning.model_dump(mode="json")
    codebook = quantizer.codebook.detach().float().cpu().contiguous().numpy().tobytes()
    settings |= {"seed": config.seed, "rows": len(tokens), "codebook": hashlib.sha256(codebook).hexdigest()[:12]}
    plan = Plan(planned_steps(train, len(tokens)), train, device, dtype, config.seed, settings, resume)
    curriculum = build_curriculum(train, transformer.pyramid, transformer.patterns)
    objective = TransformerObjective(transformer, quantizer, tokens, validation, curriculum, plan, parallel, attention)
    transformer.recompute_blocks = train.activation_checkpointing
    with compiled_blocks(transformer, train.compile):
        on_sample = on_sample if parallel.world.is_rank_zero else None
        trainer = Trainer(
            transformer, objective, plan, out, parallel=parallel, no_decay=transformer.no_decay_names(),
            on_step=on_step, on_sample=on_sample,
        )  # fmt: skip
        outcome = trainer.run(config)

    def save(directory: Path, state: Mapping[str, Tensor], steps: int) -> None:
        facts = {**config.provenance, **(provenance or {}), "training_steps": steps, "seed": config.seed}
        model = config.model.model_copy(update={"provenance": facts})
        save_model(directory, model, transformer=state, tokenizer=tokenizer.state_dict())

    trainer.leave(outcome, save, best=True)
    return replace(outcome, val_loss=objective.val_loss)


def check_tokens(tokens: TokenSource, transformer: Transformer, quantizer: MultiScaleQuantizer) -> None:
    """Refuse tokens or conditions whose first row does not fit the model (DataError)."""
    if len(tokens) == 0:
        raise DataError("The token cache holds no images.", "Run `mvar tokenize` on a folder that has some.")
    tokens_BL, conditions = tokens.batch(np.zeros(1, dtype=np.int64))
    pyramid, codes = transformer.pyramid, quantizer.codebook.shape[0]
    if tokens_BL.shape[1] != pyramid.num_tokens:
        raise DataError(
            f"An image has {tokens_BL.shape[1]} tokens; the model's pyramid ({pyramid}) has {pyramid.num_tokens}.",
            "Tokenize the images again with this model's tokenizer.",
        )
    if int(tokens_BL.max()) >= codes:
        raise DataError(f"The tokens hold code {int(tokens_BL.max())}; the codebook has {codes} entries.")
    transformer.conditioner.check_data(conditions)


class ScaleLosses(NamedTuple):
    """Loss of one batch, with the mean cross-entropy and accuracy (S,) of each scale; nan for scales left out."""

    loss: Tensor
    scale_losses: Tensor
    scale_accuracies: Tensor


def per_scale_means(
    values_Bl: Float[Tensor, "B l"], pyramid: ScalePyramid, scales: range | None = None
) -> Float[Tensor, " S"]:
    """Mean over images and tokens of each scale, from one value per token of `scales` (None: all); nan for others."""
    scales = range(pyramid.num_scales) if scales is None else scales
    offset = pyramid.spans[scales.start].start
    means = values_Bl.new_full((pyramid.num_scales,), math.nan)
    for scale in scales:
        span = pyramid.spans[scale]
        means[scale] = values_Bl[:, span.start - offset : span.stop - offset].mean()
    return means


class Curriculum:
    """Chooses what a step trains; in whichever step a token is trained, its loss weighs 1/L, times its scale's weight.

    With `alone` = n > 0, of every `ratio_k` + n steps `ratio_k` train the first scales together, and n one of the last
    n each. Published are ratio_k = 8 and n = 2 on ten scales: eight steps train scales 1 … 8, the ninth scale 9, the
    tenth scale 10, and so on. Where a scale sees earlier ones (more than one scale prefix, or VAR), those are computed
    in its step too, without a loss of their own but with gradient, so that the steps' gradients always add up to the
    joint one. `alone` is at most all scales but one; 0 trains all of them jointly.

    `label_smoothing` is the probability spread evenly over the codebook; `scale_weights` are relative weights of a
    token's loss, one per scale, scaled so that the mean over an image's tokens is 1, or empty for all alike.
    """

    def __init__(
        self,
        pyramid: ScalePyramid,
        label_smoothing: float = 0.0,
        scale_weights: Sequence[float] = (),
        alone: int = 0,
        ratio_k: int = 1,
    ):
        self.pyramid, self.label_smoothing, self.ratio_k = pyramid, label_smoothing, ratio_k
        self.together = max(1, pyramid.num_scales - alone)
        self.period = ratio_k + pyramid.num_scales - self.together
        self.weights_L: Tensor | None = None
        if scale_weights:
            weights_L = torch.tensor([scale_weights[scale] for scale in pyramid.scale_of_token], dtype=torch.float64)
            self.weights_L = (weights_L / weights_L.mean()).float()

    def trained_scales(self, step: int | None) -> range:
        """The consecutive scales that a step trains, by its place in the period; all of them for None."""
        if step is None:
            return range(self.pyramid.num_scales)
        beyond = step % self.period - self.ratio_k
        return range(self.together) if beyond < 0 else range(self.together + beyond, self.together + beyond + 1)

    def tokens_per_step(self) -> float:
        """Tokens of an image that a step trains, on average over a period."""
        grids = self.pyramid.grids
        trained = (grids[scale].tokens for step in range(self.period) for scale in self.trained_scales(step))
        return sum(trained) / self.period

    def losses(
        self,
        transformer: Transformer,
        conditions: Int[Tensor, " B"] | Float[Tensor, "B X"],
        tokens_BL: Int[Tensor, "B L"],
        inputs_BLZ: Float[Tensor, "B l Z"],
        *,
        step: int | None,
        attention: str,
        generator: torch.Generator | RowDraws | None,
    ) -> ScaleLosses:
        """Losses of one packed pass over the scales that the step trains, or all for step None.

        A pure function of the step, the batch and the generator. The loss is the mean over images of the sum of the
        tokens' losses, each over L: that of a step on some scales is their share of the joint one.
        """
        scales = self.trained_scales(step)
        span = slice(self.pyramid.spans[scales.start].start, self.pyramid.spans[scales.stop - 1].stop)
        chosen = None if len(scales) == self.pyramid.num_scales else scales
        logits_BlV = transformer(conditions, inputs_BLZ, scales=chosen, attention=attention, generator=generator)
        tokens_Bl = tokens_BL[:, span]
        with torch.no_grad():
            hits_Bl = (logits_BlV.argmax(dim=-1) == tokens_Bl).float()
        losses_Bl = cross_entropy(logits_BlV, tokens_Bl, self.label_smoothing)
        del logits_BlV
        by_scale = per_scale_means(losses_Bl.detach(), self.pyramid, scales)
        if self.weights_L is not None:
            losses_Bl = losses_Bl * self.weights_L[span].to(losses_Bl.device)
        share = losses_Bl.shape[1] / self.pyramid.num_tokens
        loss = losses_Bl.mean() if share == 1 else losses_Bl.mean() * share
        return ScaleLosses(loss, by_scale, per_scale_means(hits_Bl, self.pyramid, scales))


def scales_alone(patterns: Sequence[AttentionPattern]) -> int:
    """How many of the last scales the interleaved curriculum trains alone by default.

    Published are the last two, which have windows. So: the windowed scales at the end, two at most; where there are
    none, two.
    """
    windowed = 0
    while windowed < min(2, len(patterns)) and patterns[-1 - windowed].is_windowed:
        windowed += 1
    return windowed or 2


def build_curriculum(
    config: TrainConfig, pyramid: ScalePyramid, patterns: Sequence[AttentionPattern] = ()
) -> Curriculum:
    """The curriculum that the configuration names; `patterns` of attention say which scales are windowed."""
    if config.curriculum == "interleaved":
        alone = config.scales_alone or scales_alone(patterns)
        return Curriculum(pyramid, config.label_smoothing, config.scale_weights, alone, config.ratio_k)
    return Curriculum(pyramid, config.label_smoothing, config.scale_weights)


def cross_entropy(
    logits_NV: Float[Tensor, "*N V"], targets_N: Int[Tensor, " *N"], label_smoothing: float = 0.0
) -> Float[Tensor, " *N"]:
    """Cross-entropy of each token, in float32; `label_smoothing` is the probability spread evenly over the codebook.

    Of many logits that need a gradient, the gradient is written over the logits: they must not be used afterwards, and
    the result can be differentiated once.
    """
    flat_NV, flat_N = logits_NV.flatten(0, -2).float(), targets_N.flatten()
    overwrites = flat_NV.requires_grad and flat_NV.numel() >= WORTHWHILE_ELEMENTS
    if overwrites and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        losses_N: Tensor = _CrossEntropy.apply(flat_NV, flat_N, label_smoothing)
    else:
        losses_N = F.cross_entropy(flat_NV, flat_N, reduction="none", label_smoothing=label_smoothing)
    return losses_N.view_as(targets_N)


class _CrossEntropy(torch.autograd.Function):
    """The gradient by the logits is softmax minus the (smoothed) one-hot target, times that of the loss."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, label_smoothing: float) -> Tensor:
        losses = []
        rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
        uniform = label_smoothing / logits_NV.shape[1]
        gradient_NV = logits_NV.detach()
        for logits_nV, targets_n in zip(gradient_NV.split(rows), targets_N.split(rows), strict=True):
            log_probabilities_nV = logits_nV.log_softmax(dim=-1)
            true_n = log_probabilities_nV.gather(1, targets_n[:, None]).squeeze(1)
            losses.append(-(1 - label_smoothing) * true_n - uniform * log_probabilities_nV.sum(dim=-1))
            torch.exp(log_probabilities_nV, out=logits_nV)
            if uniform:
                logits_nV.sub_(uniform)
            logits_nV.scatter_add_(1, targets_n[:, None], logits_nV.new_full((len(targets_n), 1), label_smoothing - 1))
        ctx.gradient_NV = gradient_NV
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient_NV is None:
            raise RuntimeError("this cross-entropy can be differentiated once: its gradient was written in place")
        gradient_NV, ctx.gradient_NV = ctx.gradient_NV, None
        return gradient_NV.mul_(gradients[0][:, None]), None, None
