"""The base of every section of the configuration: frozen, and unknown keys fail with the nearest names; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from mvar_core.errors import ConfigError, nearest


class Section(BaseModel):
    """A section of the configuration: unknown keys are refused, values cannot be changed after the merge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """As the constructor.

        Raises:
            ConfigError: An unknown key or a value that does not fit, in one line.
        """
        built: Self = validate(cls, values, cls.__name__)
        return built


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
    for name in path:
        field = section.model_fields.get(name)
        for kind in [field.annotation, *get_args(field.annotation)] if field else []:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                section = kind
                break
    return list(section.model_fields)
