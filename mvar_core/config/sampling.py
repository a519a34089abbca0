"""How to sample: guidance and filters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mvar_core.config.section import Section, parse_number

GuidanceSchedule = Literal["linear", "constant", "cosine"] | tuple[float, ...]

LARGEST_GUIDANCE = 1e6
"""Far beyond any use; above it, guided logits overflow."""
FIRST_SETTINGS = {"cfg", "top_k", "top_p", "cfg_schedule", "cfg_scales", "more_smooth"}
"""Settings that every record of unfinished work holds. Those added later have a default that changes nothing."""


class SamplingConfig(Section):
    """Sampling settings: those that a model recommends, or those that a caller asks for.

    In the latter, fields that are not set are as the model recommends (`over`).
    """

    cfg: float = Field(1.5, ge=0, le=LARGEST_GUIDANCE, description="guidance at the last scale; 0 is unguided")
    top_k: int = Field(900, ge=0, description="keep the k most likely codes; 0 keeps all")
    top_p: float = Field(
        0.96, ge=0, le=1, description="keep the most likely codes of this total probability; 0 or 1 keep all"
    )
    min_p: float = Field(
        0, ge=0, le=1, description="keep codes at least this fraction as likely as the likeliest; 0 keeps all"
    )
    cfg_schedule: GuidanceSchedule = Field(
        "linear", description="how cfg grows over the scales: linear, constant, cosine, or one number per scale"
    )
    cfg_scales: tuple[int, int] | None = Field(None, description="first and last guided scale, from 0; null guides all")
    more_smooth: bool = Field(False, description="Gumbel-softmax mixtures of codes: for looks, never for metrics")

    @field_validator("cfg_schedule", mode="before")
    @classmethod
    def _read_schedule(cls, value: Any) -> Any:
        """One number per scale also as text: 1,1,2."""
        if not isinstance(value, str) or value in ("linear", "constant", "cosine"):
            return value
        numbers = [parse_number(part) for part in value.split(",")]
        if None in numbers:
            raise ValueError(f"{value!r} is not linear, constant, cosine, or a comma list of numbers")
        return tuple(numbers)

    @field_validator("cfg_scales", mode="before")
    @classmethod
    def _read_scales(cls, value: Any) -> Any:
        """First and last scale also as text: 4-9, or 9."""
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", value, re.ASCII)
        if found is None:
            raise ValueError(f"{value!r} is not a range of scales such as 4-9")
        return int(found[1]), int(found[2] or found[1])

    @model_validator(mode="after")
    def _check_guidance(self) -> SamplingConfig:
        numbers = () if isinstance(self.cfg_schedule, str) else self.cfg_schedule
        if not all(0 <= strength <= LARGEST_GUIDANCE for strength in numbers):
            raise ValueError(f"cfg_schedule {numbers} holds a number that is negative or above {LARGEST_GUIDANCE:g}")
        if self.cfg_scales is not None and not 0 <= self.cfg_scales[0] <= self.cfg_scales[1]:
            raise ValueError(f"cfg_scales {self.cfg_scales} is not a first and a last scale, counted from 0")
        return self

    @property
    def guided(self) -> bool:
        """Whether any scale may be guided."""
        if isinstance(self.cfg_schedule, str):
            return self.cfg > 0
        return any(strength > 0 for strength in self.cfg_schedule)

    @property
    def summary(self) -> str:
        """The settings that people compare, in words."""
        plain = {"cfg", "top_k", "top_p"}
        changed = {name for name, field in SamplingConfig.model_fields.items() if getattr(self, name) != field.default}
        shown = [name for name in SamplingConfig.model_fields if name in plain | changed]
        return ", ".join(f"{name.replace('_', '-')} {getattr(self, name)}" for name in shown)

    def over(self, recommended: SamplingConfig) -> SamplingConfig:
        """These settings, with what is not set here as recommended."""
        return recommended.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})


def recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings as the record of unfinished work holds them: later ones only where they change something.

    So work that was begun before there was a setting is the same work while the setting is off.
    """
    off = {n: f.default for n, f in SamplingConfig.model_fields.items() if n not in FIRST_SETTINGS}
    return {name: value for name, value in settings.items() if name not in off or value != off[name]}
