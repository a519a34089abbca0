"""Configuration: what a model is, and how it is trained and sampled.

Unknown keys fail with the nearest names, values are frozen, derived values are properties. How presets, settings and
flags become a configuration is mvar_core.config.presets. Nothing here loads torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mvar_core.config.sampling import SamplingConfig
from mvar_core.config.section import Section
from mvar_core.config.training import DataConfig, TokenizerTrainConfig, TrainConfig
from mvar_core.pyramid import (
    AttentionPattern,
    PatchSize,
    ScalePrefixes,
    ScalePyramid,
    check_attention,
    read_size,
    read_sizes,
    write_size,
)

# Limits: far above every published model, and low enough that checks, tables and modules without values are built at
# once, whatever a file from outside asks for. What fits a machine is another question, which `mvar plan` answers.
Depth = Annotated[int, Field(ge=1, le=512)]
"""Of a transformer; the deepest published one has 36 blocks."""
Blocks = Annotated[int, Field(ge=1, le=64)]
"""Of a tokenizer's level, and its convolutions φ; the published one has 3 and 4."""
Width = Annotated[int, Field(ge=1, le=2**16)]
"""Channels, heads, values of a vector; the widest published transformer has 2304 channels."""
Entries = Annotated[int, Field(ge=1, le=2**24)]
"""Rows of a table: codes or classes; published codebooks have 4096, ImageNet-21k has 21,841 classes."""
Multiplier = Annotated[int, Field(ge=1, le=64)]
"""Of the tokenizer's channels; 4 at most in the published one, which has 5 levels."""
MOST_LEVELS = 10


class TokenizerConfig(Section):
    """The multi-scale residual VQVAE. The defaults are the published tokenizer's (108.95 M parameters)."""

    codebook_size: Entries = Field(4096, ge=2, description="entries in the codebook, V")
    latent_channels: Width = Field(32, description="channels of the latent features, Z")
    base_channels: Width = Field(160, description="channels at full resolution")
    channel_multipliers: tuple[Multiplier, ...] = Field(
        (1, 1, 2, 2, 4), min_length=1, max_length=MOST_LEVELS, description="times base_channels, one per level"
    )
    encoder_blocks: Blocks = Field(2, description="residual blocks per encoder level")
    decoder_blocks: Blocks = Field(3, description="residual blocks per decoder level")
    middle_blocks: Blocks = Field(2, description="residual blocks at the coarsest resolution, between the levels")
    attention: bool = Field(True, description="self-attention at the coarsest level and in the middle")
    norm_groups: Width = Field(32, description="groups of GroupNorm")
    residual_convs: Blocks = Field(4, description="convolutions φ shared by the scales, K")
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

    depth: Depth = Field(16, description="number of blocks")
    embed_dim: Width = Field(1024, description="width of the residual stream, C")
    num_heads: Width = Field(16, description="attention heads, H")
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="hidden width of the MLP over embed_dim")
    num_classes: Entries = Field(1000, description="class labels, without the null label; for vectors only of scores")
    shared_adaln: bool = Field(False, description="one AdaLN projection for all blocks plus an offset per block")
    l2_attention: bool = Field(True, description="normalise queries and keys, with a learned scale per head")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block; grows linearly")
    class_dropout: float = Field(0.1, ge=0, lt=1, description="how often training uses the null condition")
    gate_init: float = Field(1e-3, ge=0, description="scale of the initial AdaLN gates γ (VAR 1e-5, MVAR 1e-3)")

    @model_validator(mode="after")
    def _check_heads(self) -> TransformerConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        if self.hidden_dim < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP no hidden channel")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D."""
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        return round(self.embed_dim * self.mlp_ratio)


class ConditioningConfig(Section):
    """What tells the model which image is wanted; see mvar_core.models.conditioning."""

    kind: Literal["class", "vector"] = Field("class", description="class labels, or vectors that you compute")
    dim: Width | None = Field(None, description="length of a vector; required by kind vector")
    encoder: str | None = Field(None, description='what makes vectors: "hashed-words", or a name of your choice')

    @model_validator(mode="after")
    def _check_kind(self) -> ConditioningConfig:
        if self.kind == "vector" and self.dim is None:
            raise ValueError("conditioning.kind is vector, but conditioning.dim, the length of a vector, is not set")
        if self.kind == "class" and (self.dim is not None or self.encoder is not None):
            raise ValueError("conditioning.dim and conditioning.encoder are for conditioning.kind=vector")
        return self


class AttentionConfig(Section):
    """Which tokens a token attends to; see mvar_core.pyramid."""

    scale_prefixes: ScalePrefixes = Field("all", description='scales seen, own included: 1 is MVAR, "all" is VAR')
    windows: tuple[int, ...] = Field(
        (),
        description="one odd window per scale, 0 = whole scale; empty = all whole. In a preset also one number for the"
        " windowed scales, or auto (auto:5): 7 (5) on every scale where it pays",
    )

    @field_validator("windows", mode="before")
    @classmethod
    def _empty_when_none(cls, value: Any) -> Any:
        return () if value is None else value


class ModelConfig(Section):
    """Everything that a model directory's config.json records: enough to build the model and to use it."""

    name: str = Field("model", description="what the model is called in tables")
    image_size: PatchSize = Field(256, description="side in pixels, or (height, width), also as 256x384")
    patch_sizes: tuple[PatchSize, ...] = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        description="one side, or (height, width), per scale, in tokens, also as 1,2,3x4; follows image_size where that"
        " alone is set",
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    transformer: TransformerConfig | None = TransformerConfig()
    attention: AttentionConfig = AttentionConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    sampling: SamplingConfig = SamplingConfig()
    class_names: tuple[str, ...] | None = Field(None, description="one name per class label")
    provenance: dict[str, Any] = Field(default_factory=dict, description="source, tokenizer hash, training step …")

    @field_validator("image_size", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> PatchSize:
        return read_size(value)

    @field_validator("patch_sizes", mode="before")
    @classmethod
    def _read_sizes(cls, value: Any) -> tuple[PatchSize, ...]:
        return tuple(read_sizes(value))

    @model_validator(mode="after")
    def _check_geometry(self) -> ModelConfig:
        pyramid = self.pyramid
        downsample = self.tokenizer.downsample
        latent = pyramid.latent_grid
        if (latent.height * downsample, latent.width * downsample) != self.image_shape:
            raise ValueError(
                f"image_size {write_size(self.image_size)} does not fit: the last scale {latent} times the tokenizer's"
                f" downsampling {downsample} is {latent.height * downsample}×{latent.width * downsample} pixels; change"
                " image_size alone, and patch_sizes follow"
            )
        check_attention(pyramid, self.attention.scale_prefixes, self.windows)
        return self

    @property
    def pyramid(self) -> ScalePyramid:
        """The scale pyramid."""
        return _pyramid(self.patch_sizes)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def windows(self) -> tuple[int, ...]:
        """One window per scale, 0 for a whole scale."""
        return self.attention.windows or (0,) * self.pyramid.num_scales

    @property
    def most_conditions(self) -> int | None:
        """How many different conditions there can be, without the null condition; None where they are not bounded."""
        if self.transformer is None:
            return 0
        return self.transformer.num_classes if self.conditioning.dim is None else None

    @property
    def patterns(self) -> tuple[AttentionPattern, ...]:
        """What each scale's tokens attend to."""
        return self.pyramid.attention_patterns(self.attention.scale_prefixes, self.windows)


@lru_cache(maxsize=64)
def _pyramid(patch_sizes: tuple[PatchSize, ...]) -> ScalePyramid:
    """A pyramid, made once: the cost model asks for it thousands of times."""
    return ScalePyramid.from_patch_sizes(patch_sizes)


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
        """What a model directory records of it."""
        return ModelConfig.model_validate(self.model_dump(include=set(ModelConfig.model_fields)))
