"""What one may say about how to sample, written down once for every call that samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from typing_extensions import TypedDict

from mvar_core.config import GuidanceSchedule, ModelConfig, SamplingConfig
from mvar_core.config.section import validate
from mvar_core.errors import ConfigError
from mvar_core.sampling.sampler import check_settings


class GivenSettings(TypedDict, total=False):
    """Settings laid over a model's recommended ones; one that is absent or None is as recommended."""

    cfg: float | None
    """Guidance at the last scale, 0 for none."""
    top_k: int | None
    """Keep the k most likely codes; 0 keeps all."""
    top_p: float | None
    """Keep the most likely codes of this total probability; 0 or 1 keep all."""
    more_smooth: bool | None
    """Mixtures of codes instead of drawn ones: for looks, never for metrics."""
    cfg_schedule: GuidanceSchedule | None
    """How guidance grows over the scales: "linear" as published, "constant", "cosine", or one number per scale."""
    cfg_scales: tuple[int, int] | None
    """First and last guided scale, from 0; by default all."""


class DrawOptions(GivenSettings, total=False):
    """How samples are drawn, as `Pipeline.sample`, `stream` and `edit` take it."""

    seed: int
    """The run's seed, by default 0."""
    indices: Sequence[int] | None
    """Global index of each sample; by default 0 … N-1."""
    batch_size: int | None
    """Samples that advance from scale to scale together; decides speed and memory, never the result."""
    memory: int | None
    """Bytes that sampling may take, weights included, and on a CPU the process as well; by default half of what the
    device has free."""
    stages: bool
    """Also decode each sample after every scale."""
    progress: Callable[[int, int], None] | None
    """Called as progress(done, total), in images; also while images are on their way."""


def sampling_settings(
    config: ModelConfig,
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    more_smooth: bool | None = None,
    cfg_schedule: GuidanceSchedule | None = None,
    cfg_scales: tuple[int, int] | None = None,
) -> SamplingConfig:
    """A model's recommended settings with the given ones laid over them, before its weights are loaded.

    Raises:
        ConfigError: A value out of range, a top-k above the codebook, or scales that the model does not have.
    """
    given: GivenSettings = {
        "cfg": cfg,
        "top_k": top_k,
        "top_p": top_p,
        "more_smooth": more_smooth,
        "cfg_schedule": cfg_schedule,
        "cfg_scales": cfg_scales,
    }
    for name, value, highest in (("cfg", cfg, None), ("top-k", top_k, None), ("top-p", top_p, 1)):
        if value is not None and (value < 0 or (highest is not None and value > highest)):
            limits = "at least 0" if highest is None else f"between 0 and {highest}"
            raise ConfigError(f"{name} is {value}; it must be {limits}.")
    changes = {name: value for name, value in given.items() if value is not None}
    settings: SamplingConfig = validate(
        SamplingConfig, {**config.sampling.model_dump(), **changes}, "sampling settings"
    )
    check_settings(settings, config)
    return settings
