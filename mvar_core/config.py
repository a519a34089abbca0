"""Configuration: what a model is, and how it is trained and sampled.

Unknown keys fail with the nearest names, values are frozen, derived values are properties. How presets, settings and
flags become a configuration is mvar_core.presets. Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mvar_core.errors import ConfigError, nearest
from mvar_core.scales import AttentionPattern, ScalePrefixes, ScalePyramid, check_attention

PatchSize = int | tuple[int, int]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values cannot be changed after the merge."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerConfig(Section):
    """The multi-scale residual VQVAE. The defaults are the published tokenizer's (108.95 M parameters)."""

    codebook_size: int = Field(4096, ge=2, description="entries in the codebook, V")
    latent_channels: int = Field(32, ge=1, description="channels of the latent features, Z")
    base_channels: int = Field(160, ge=1, description="channels at full resolution")
    channel_multipliers: tuple[int, ...] = Field((1, 1, 2, 2, 4), description="times base_channels, one per level")
    encoder_blocks: int = Field(2, ge=1, description="residual blocks per encoder level")
    decoder_blocks: int = Field(3, ge=1, description="residual blocks per decoder level")
    middle_blocks: int = Field(2, ge=1, description="residual blocks at the coarsest resolution, between the levels")
    attention: bool = Field(True, description="self-attention at the coarsest level and in the middle")
    norm_groups: int = Field(32, ge=1, description="groups of GroupNorm")
    residual_convs: int = Field(4, ge=1, description="convolutions φ shared by the scales, K")
    residual_ratio: float = Field(0.5, ge=0, le=1, description="φ(x) = (1 - ratio)·x + ratio·conv(x)")

    @model_validator(mode="after")
    def _check_groups(self) -> TokenizerConfig:
        for multiplier in self.channel_multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"norm_groups {self.norm_groups} does not divide {self.base_channels * multiplier} channels"
                )
        return self

    @property
    def downsample(self) -> int:
        """Pixels per latent position along one axis."""
        return 2 ** (len(self.channel_multipliers) - 1)


class TransformerConfig(Section):
    """The next-scale transformer. Published models have embed_dim 64·depth and num_heads = depth."""

    depth: int = Field(16, ge=1, description="number of blocks")
    embed_dim: int = Field(1024, ge=1, description="width of the residual stream, C")
    num_heads: int = Field(16, ge=1, description="attention heads, H")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP over embed_dim")
    num_classes: int = Field(1000, ge=1, description="class labels, without the one that stands for no class")
    shared_adaln: bool = Field(False, description="one AdaLN projection for all blocks plus an offset per block")
    l2_attention: bool = Field(True, description="normalise queries and keys, with a learned scale per head")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block; grows linearly")
    class_dropout: float = Field(0.1, ge=0, lt=1, description="how often training replaces the label by no class")
    gate_init: float = Field(1e-3, ge=0, description="scale of the initial AdaLN gates γ (VAR 1e-5, MVAR 1e-3)")

    @model_validator(mode="after")
    def _check_heads(self) -> TransformerConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D."""
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        return round(self.embed_dim * self.mlp_ratio)


class AttentionConfig(Section):
    """Which tokens a token attends to; see mvar_core.scales."""

    scale_prefixes: ScalePrefixes = Field("all", description='scales seen, own included: 1 is MVAR, "all" is VAR')
    windows: tuple[int, ...] = Field((), description="one odd window per scale, 0 = whole scale; empty = all whole")

    @field_validator("windows", mode="before")
    @classmethod
    def _empty_when_none(cls, value: Any) -> Any:
        return () if value is None else value


GuidanceSchedule = Literal["linear", "constant", "cosine"] | tuple[float, ...]


class SamplingConfig(Section):
    """Recommended sampling settings of a model; `mvar sample` uses them unless told otherwise."""

    cfg: float = Field(1.5, ge=0, description="guidance at the last scale; 0 is unguided")
    top_k: int = Field(900, ge=0, description="keep the k most likely codes; 0 keeps all")
    top_p: float = Field(
        0.96, ge=0, le=1, description="keep the most likely codes of this total probability; 0 or 1 keep all"
    )
    cfg_schedule: GuidanceSchedule = Field(
        "linear", description="how cfg grows over the scales: linear, constant, cosine, or one number per scale"
    )
    cfg_scales: tuple[int, int] | None = Field(None, description="first and last guided scale, from 0; null guides all")
    more_smooth: bool = Field(False, description="Gumbel-softmax mixtures of codes: for looks, never for metrics")

    @model_validator(mode="after")
    def _check_guidance(self) -> SamplingConfig:
        if not isinstance(self.cfg_schedule, str) and any(strength < 0 for strength in self.cfg_schedule):
            raise ValueError(f"cfg_schedule {self.cfg_schedule} holds a negative number")
        if self.cfg_scales is not None and not 0 <= self.cfg_scales[0] <= self.cfg_scales[1]:
            raise ValueError(f"cfg_scales {self.cfg_scales} is not a first and a last scale, counted from 0")
        return self

    @property
    def guided(self) -> bool:
        """Whether any scale may be guided."""
        if isinstance(self.cfg_schedule, str):
            return self.cfg > 0
        return any(strength > 0 for strength in self.cfg_schedule)


class ModelConfig(Section):
    """Everything that a model directory's config.json records: enough to build the model and to use it."""

    name: str = Field("model", description="what the model is called in tables")
    image_size: PatchSize = Field(256, description="side in pixels, or (height, width)")
    patch_sizes: tuple[PatchSize, ...] = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), description="one side, or (height, width), per scale, in tokens"
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    transformer: TransformerConfig | None = TransformerConfig()
    attention: AttentionConfig = AttentionConfig()
    sampling: SamplingConfig = SamplingConfig()
    class_names: tuple[str, ...] | None = Field(None, description="one name per class label")
    provenance: dict[str, Any] = Field(default_factory=dict, description="source, tokenizer hash, training step …")

    @model_validator(mode="after")
    def _check_geometry(self) -> ModelConfig:
        pyramid = self.pyramid
        downsample = self.tokenizer.downsample
        latent = pyramid.latent_grid
        if (latent.height * downsample, latent.width * downsample) != self.image_shape:
            raise ValueError(
                f"image_size {self.image_shape} does not fit: the last scale {latent} times the tokenizer's"
                f" downsampling {downsample} is {latent.height * downsample}×{latent.width * downsample} pixels"
            )
        check_attention(pyramid, self.attention.scale_prefixes, self.windows)
        return self

    @property
    def pyramid(self) -> ScalePyramid:
        """The scale pyramid."""
        return ScalePyramid.from_patch_sizes(self.patch_sizes)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def windows(self) -> tuple[int, ...]:
        """One window per scale, 0 for a whole scale."""
        return self.attention.windows or (0,) * self.pyramid.num_scales

    @property
    def patterns(self) -> tuple[AttentionPattern, ...]:
        """What each scale's tokens attend to."""
        return self.pyramid.attention_patterns(self.attention.scale_prefixes, self.windows)


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate at a batch of lr_batch images")
    lr_batch: int | None = Field(256, description="scale lr by batch_size / lr_batch; null leaves lr as it is")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0, description="not applied to 1-D parameters, biases and tables")
    grad_clip: float = Field(2.0, ge=0, description="clip the gradient's norm; 0 does not clip")
    schedule: Literal["lin0", "cosine", "constant"] = Field("lin0", description="shape after the warm-up")
    warmup: float = Field(0.02, ge=0, description="part of the steps (below 1) or number of steps (1 and above)")
    warmup_start: float = Field(0.005, ge=0, le=1, description="first learning rate over the peak")
    end: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak (wpe)")


class TokenizerOptimizerConfig(OptimizerConfig):
    """AdamW and its schedule, with the defaults that suit a tokenizer."""

    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    lr_batch: int | None = Field(None, description="scale lr by batch_size / lr_batch; null leaves lr as it is")
    weight_decay: float = Field(0.0, ge=0, description="not applied to 1-D parameters, biases and tables")
    grad_clip: float = Field(1.0, ge=0, description="clip the gradient's norm; 0 does not clip")
    schedule: Literal["lin0", "cosine", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup: float = Field(50, ge=0, description="part of the steps (below 1) or number of steps (1 and above)")
    warmup_start: float = Field(0.0, ge=0, le=1, description="first learning rate over the peak")
    end: float = Field(0.0, ge=0, le=1, description="last learning rate over the peak")


class LoopConfig(Section):
    """What every training loop can do: memory, averages, rhythm, logs."""

    batch_size: int = Field(448, ge=1, description="images per step")
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulate: int = Field(1, ge=1, description="micro-batches that add up to a step's gradient")
    micro_batch: int | None = Field(
        None, ge=1, description="images computed together; another way to say accumulate; null = as accumulate says"
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights, which the model gets then; 0 = none")
    max_skipped: int = Field(10, ge=1, description="steps in a row that may be nan or infinite before the run stops")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints, and between validations")
    keep: int = Field(2, ge=1, description="checkpoints that are kept, beside the one of the best validation loss")
    sample_every: int = Field(0, ge=0, description="steps between pictures of what the model makes; 0 = none")
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

    epochs: float | None = Field(300, gt=0, description="passes over the tokens; ignored where steps is given")
    steps: int | None = Field(None, ge=1, description="optimizer steps")
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


class DiscriminatorOptimizerConfig(OptimizerConfig):
    """The discriminator's AdamW and its schedule, which runs from the adversarial loss's start to the run's end."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_batch: int | None = Field(None, description="scale lr by batch_size / lr_batch; null leaves lr as it is")
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = Field(0.0, ge=0, description="not applied to 1-D parameters, biases and tables")
    grad_clip: float = Field(1.0, ge=0, description="clip the gradient's norm; 0 does not clip")
    schedule: Literal["lin0", "cosine", "constant"] = Field("constant", description="shape after the warm-up")
    warmup: float = Field(0, ge=0, description="part of the steps (below 1) or number of steps (1 and above)")


class AdversarialConfig(Section):
    """The tokenizer's adversarial loss: a PatchGAN discriminator with hinge losses."""

    weight: float = Field(0.0, ge=0, description="weight of the adversarial loss; 0 = none, and no discriminator")
    start: int = Field(0, ge=0, description="steps before the discriminator and its loss take part")
    adaptive: bool = Field(True, description="times the ratio of both losses' gradients at the decoder's last layer")
    max_weight: float = Field(1e4, gt=0, description="largest such ratio")
    channels: int = Field(64, ge=1, description="the discriminator's width at half resolution; doubles up to 8 times")
    layers: int = Field(3, ge=1, description="its layers of stride 2: 3 judge patches of 70×70 pixels")
    lecam: float = Field(0.0, ge=0, description="weight of LeCam regularisation of the discriminator")
    optimizer: DiscriminatorOptimizerConfig = DiscriminatorOptimizerConfig()


class TokenizerTrainConfig(LoopConfig):
    """Training of the tokenizer on images."""

    batch_size: int = Field(48, ge=1, description="images per step")
    steps: int = Field(10_000, ge=1, description="optimizer steps")
    reconstruction: Literal["l1", "l2"] = "l1"
    vq_weight: float = Field(1.0, ge=0, description="weight of the quantizer's loss")
    commitment: float = Field(0.25, ge=0, description="weight of the encoder's part of the quantizer's loss")
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    scale_dropout: float = Field(
        0.0, ge=0, le=1, description="how often an image is decoded from a random number of its first scales alone"
    )
    optimizer: TokenizerOptimizerConfig = TokenizerOptimizerConfig()
    kmeans_batches: int = Field(8, ge=0, description="batches whose features start the codebook by k-means; 0 = random")
    revive_every: int = Field(20, ge=0, description="steps between restarts of unused codes; 0 = never")
    revive_until: float = Field(0.7, ge=0, le=1, description="part of the steps during which codes are restarted")


class DataConfig(Section):
    """How images become training data."""

    crop: Literal["center", "random"] = Field(
        "center",
        description="what of a picture trains a tokenizer: its centre, or a new crop at each step (and a flip, if set)",
    )
    crop_scale: float = Field(
        0.8, ge=0, le=1, description="smallest random crop, as a part of the picture's shorter side; never enlarges"
    )
    flip: bool = Field(False, description="a horizontally flipped view of every image")
    crops: int = Field(
        1, ge=1, description="crops of every picture in a token cache: its centre, then random ones (see crop_scale)"
    )
    augmented_views: int = Field(0, ge=0, description="further views with small shifts, rotations and zooms")
    shift: float = Field(0.03, ge=0, description="largest shift of an augmented view, as a part of the side")
    rotate: float = Field(5.0, ge=0, description="largest rotation of an augmented view, in degrees")
    zoom: float = Field(0.04, ge=0, lt=1, description="largest zoom of an augmented view, as a part of the side")


class PublishedResult(Section):
    """A figure that the model's source reports; None where it reports none."""

    fid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    note: str | None = None


class RunConfig(ModelConfig):
    """A preset, merged: the model and how it is trained."""

    description: str = Field("", description="one line: what this preset is for")
    source: str = Field("", description="where model and settings come from")
    result: PublishedResult | None = None
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    train_tokenizer: TokenizerTrainConfig = TokenizerTrainConfig()

    @model_validator(mode="after")
    def _check_curriculum(self) -> RunConfig:
        scales, train = self.pyramid.num_scales, self.train
        if train.scales_alone is not None and train.scales_alone >= scales:
            raise ValueError(f"train.scales_alone is {train.scales_alone}; expected less than the {scales} scales")
        weights = train.scale_weights
        if weights and (len(weights) != scales or min(weights) < 0 or max(weights) == 0):
            raise ValueError(
                f"train.scale_weights is {list(weights)}; expected one number per scale ({scales}), none below 0, one"
                " above"
            )
        return self

    @property
    def model(self) -> ModelConfig:
        """The part that a model directory records."""
        return ModelConfig.model_validate(self.model_dump(include=set(ModelConfig.model_fields)))


def validate(section: type[Section], values: Mapping[str, Any], source: str) -> Any:
    """Build a section, turning pydantic's report into one line.

    Args:
        section: The class to build.
        values: Its values.
        source: What they came from, for the message.

    Raises:
        ConfigError: An unknown key or a value that does not fit.
    """
    try:
        return section.model_validate(values)
    except ValidationError as report:
        first = report.errors()[0]
        location = tuple(str(part) for part in first["loc"] if part not in ("int", "constrained-int", "literal['all']"))
        key = ".".join(location)
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"{source}: unknown key {key!r}. {nearest(location[-1], _keys(section, location[:-1]))}"
            ) from None
        problem = first["msg"].removeprefix("Value error, ")
        found = f" (found {first['input']!r})" if key and not isinstance(first["input"], dict) else ""
        raise ConfigError(f"{source}: {key + ': ' if key else ''}{problem}{found}.".replace("..", ".")) from None


def _keys(section: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """Names of the fields that the section at `path` has."""
    current: type[BaseModel] = section
    for name in path:
        field = current.model_fields.get(name)
        candidates = [field.annotation, *get_args(field.annotation)] if field else []
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                current = candidate
                break
    return list(current.model_fields)
