"""Configuration: one frozen class for each thing that can be set, the presets, and how they merge."""

from mvar_core.config.model import (
    AttentionConfig,
    ConditioningConfig,
    GuidanceSchedule,
    ModelConfig,
    PublishedResult,
    RunConfig,
    SamplingConfig,
    TokenizerConfig,
    TransformerConfig,
)

__all__ = [
    "AttentionConfig",
    "ConditioningConfig",
    "GuidanceSchedule",
    "ModelConfig",
    "PublishedResult",
    "RunConfig",
    "SamplingConfig",
    "TokenizerConfig",
    "TransformerConfig",
]
