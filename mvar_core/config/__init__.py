"""Configuration: one frozen class for each thing that can be set, the presets, and how they merge."""

from mvar_core.config.machine import Machine
from mvar_core.config.model import (
    AttentionConfig,
    ConditioningConfig,
    ModelConfig,
    PublishedResult,
    RunConfig,
    TokenizerConfig,
    TransformerConfig,
)
from mvar_core.config.sampling import GuidanceSchedule, SamplingConfig, recorded

__all__ = [
    "AttentionConfig",
    "ConditioningConfig",
    "GuidanceSchedule",
    "Machine",
    "ModelConfig",
    "PublishedResult",
    "RunConfig",
    "SamplingConfig",
    "TokenizerConfig",
    "TransformerConfig",
    "recorded",
]
