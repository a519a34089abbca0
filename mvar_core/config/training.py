"""Configuration of training: optimizers, loops, losses and the views of images; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mvar_core.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate, at a batch of lr_batch images where that is set")
    lr_batch: int | None = Field(256, ge=1, description="scale lr by batch_size / lr_batch; null leaves lr as it is")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0, description="not applied to 1-D parameters, biases and tables")
    grad_clip: float = Field(2.0, ge=0, description="clip the gradient's norm; 0 does not clip")
    schedule: Literal["lin0", "cosine", "constant"] = Field("lin0", description="shape after the warm-up")
    warmup: float = Field(0.02, ge=0, description="fraction of the steps (below 1) or number of steps (1 and above)")
    warmup_start: float = Field(0.005, ge=0, le=1, description="first learning rate over the peak")
    end: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak (wpe)")


class Optimized(Section):
    """A section with an optimizer, whose keys have the defaults of this section where they are not given."""

    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_optimizer(cls, values: Any) -> Any:
        given = values.get("optimizer") if isinstance(values, Mapping) else None
        if not isinstance(given, Mapping):
            return values
        return {**values, "optimizer": {**cls.model_fields["optimizer"].default.model_dump(), **given}}


class LoopConfig(Optimized):
    """What every training loop can do: memory, averages, rhythm, logs."""

    batch_size: int = Field(448, ge=1, description="images per step")
    accumulate: int = Field(1, ge=1, description="micro-batches that add up to a step's gradient")
    micro_batch: int | None = Field(
        None, ge=1, description="images computed together; another way to set accumulate; null = as accumulate is"
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights, which the model gets then; 0 = none")
    max_skipped: int = Field(10, ge=1, description="steps in a row that may be nan or infinite before the run stops")
    max_loss_ratio: float = Field(
        1.5,
        ge=0,
        description="a run that ends with more than this times its first loss has diverged; 0 accepts any end",
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints, and between validations")
    keep: int = Field(2, ge=1, description="checkpoints that are kept, besides that of the best validation loss")
    sample_every: int = Field(0, ge=0, description="steps between pictures of what the model generates; 0 = none")
    tensorboard: bool = Field(False, description="log to TensorBoard too, under the run's tensorboard/")
    wandb: bool = Field(False, description="log to Weights & Biases too")

    @model_validator(mode="after")
    def _check_micro_batches(self) -> LoopConfig:
        if self.micro_batch is not None and self.accumulate > 1:
            raise ValueError(
                f"accumulate is {self.accumulate} and micro_batch {self.micro_batch}; both divide a batch, set one"
            )
        return self


class TrainConfig(LoopConfig):
    """Training of the transformer on a token cache."""

    epochs: float | None = Field(300, gt=0, le=1e9, description="passes over the tokens; ignored where steps is given")
    steps: int | None = Field(None, ge=1, le=10**12, description="optimizer steps")
    curriculum: Literal["joint", "interleaved"] = Field(
        "joint",
        description="joint: all scales in one packed pass; interleaved: the published turns of first and last scales",
    )
    ratio_k: int = Field(8, ge=1, description="interleaved: steps on the first scales per step on each of the last")
    scales_alone: int | None = Field(
        None,
        ge=1,
        description="interleaved: how many of the last scales have steps of their own; null: those of the last two that"
        " are windowed, or both where no scale is",
    )
    scale_weights: tuple[float, ...] = Field(
        (), description="relative weight of a token's loss, one per scale; empty = all alike"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    activation_checkpointing: bool = Field(
        False, description="compute each block's activations again for its gradient instead of keeping them"
    )
    compile: bool = Field(False, description="compile the blocks with torch.compile")


class PerceptualConfig(Section):
    """The tokenizer's perceptual loss, LPIPS; reads weights from local files (see mvar doctor)."""

    weight: float = Field(0.0, ge=0, description="weight of the perceptual loss; 0 = none, and no weights are read")


class AdversarialConfig(Optimized):
    """The tokenizer's adversarial loss: a PatchGAN discriminator with hinge losses."""

    weight: float = Field(0.0, ge=0, description="weight of the adversarial loss; 0 = none, and no discriminator")
    start: int = Field(0, ge=0, description="steps before the discriminator and its loss are used")
    adaptive: bool = Field(True, description="times the ratio of both losses' gradients at the decoder's last layer")
    max_weight: float = Field(1e4, gt=0, description="largest such ratio")
    channels: int = Field(64, ge=1, description="the discriminator's width at half resolution; doubles up to 8 times")
    layers: int = Field(3, ge=1, description="its layers of stride 2: 3 see patches of 70×70 pixels")
    lecam: float = Field(0.0, ge=0, description="weight of LeCam regularisation of the discriminator")
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(
            lr_batch=None, betas=(0.5, 0.9), weight_decay=0.0, grad_clip=1.0, schedule="constant", warmup=0
        ),
        description="the discriminator's; its schedule runs from the adversarial loss's start to the run's end",
    )


class TokenizerTrainConfig(LoopConfig):
    """Training of the tokenizer on images."""

    max_loss_ratio: float = Field(
        2.0,
        ge=0,
        description="a run that ends with more than this times its first loss has diverged; 0 accepts any end",
    )
    batch_size: int = Field(48, ge=1, description="images per step")
    steps: int = Field(10_000, ge=1, description="optimizer steps")
    reconstruction: Literal["l1", "l2"] = "l1"
    vq_weight: float = Field(1.0, ge=0, description="weight of the quantizer's loss")
    commitment: float = Field(0.25, ge=0, description="weight of the encoder's term of the quantizer's loss")
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    scale_dropout: float = Field(
        0.0, ge=0, le=1, description="how often an image is decoded from a random number of its first scales alone"
    )
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=3e-3, lr_batch=None, weight_decay=0.0, grad_clip=1.0, schedule="cosine", warmup=50, warmup_start=0.0, end=0.0
    )
    kmeans_batches: int = Field(8, ge=0, description="batches whose features start the codebook by k-means; 0 = random")
    revive_every: int = Field(20, ge=0, description="steps between restarts of unused codes; 0 = never")
    revive_until: float = Field(0.7, ge=0, le=1, description="fraction of the steps during which codes are restarted")


class DataConfig(Section):
    """How images become training data."""

    crop: Literal["center", "random"] = Field(
        "center",
        description="what a tokenizer is trained on: a picture's centre, or a new crop at each step (flipped, if set)",
    )
    crop_scale: float = Field(
        0.8, ge=0, le=1, description="smallest random crop, as a fraction of the picture's shorter side; never enlarges"
    )
    flip: bool = Field(False, description="a horizontally flipped view of every image")
    crops: int = Field(
        1,
        ge=1,
        le=1000,
        description="crops of every picture in a token cache: its centre, then random ones (see crop_scale)",
    )
    augmented_views: int = Field(0, ge=0, le=1000, description="further views with small shifts, rotations and zooms")
    shift: float = Field(0.03, ge=0, le=1, description="largest shift of an augmented view, as a fraction of the side")
    rotate: float = Field(5.0, ge=0, le=180, description="largest rotation of an augmented view, in degrees")
    zoom: float = Field(0.04, ge=0, le=0.9, description="largest zoom of an augmented view, as a fraction of the side")
