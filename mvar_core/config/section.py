"""Checks of what users set: sections of the configuration and the arguments of public functions; no torch."""

from __future__ import annotations

import errno
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, validate_call

from mvar_core.errors import ConfigError, nearest, shown

LARGEST = 2**63 - 1
"""Of any whole number: what files and tensors can hold, and seeds with them."""

_PydanticClass: Any = type(BaseModel)


class _Reporting(_PydanticClass):
    """Constructors that report what does not fit as a ConfigError, in one line."""

    def __call__(self, **values: Any) -> Any:
        return validate(self, values, self.__name__)


_reporting: Any = _Reporting  # of unknown type for mypy, whose plugin reads pydantic's own metaclass


class Section(BaseModel, metaclass=_reporting):
    """A section of the configuration: numbers are finite, unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        as_text = cls.model_fields[info.field_name or ""].annotation in (str, str | None)
        if isinstance(value, str) and not as_text and re.fullmatch(r"[-+.\de]*_[-+.\de_]*", value):
            raise ValueError("a number here has no underscores")
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(type(one) is int and abs(one) > LARGEST for one in values):
            raise ValueError("a number here is beyond 64 bits")
        return value


def parse_number(text: str) -> float | None:
    """A number as people write it, without underscores, which Python would skip; None where it is something else."""
    plain = re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", text, re.ASCII | re.IGNORECASE)
    return float(text) if plain else None


def validate(section: type[Section], values: Mapping[str, Any], source: str) -> Any:
    """Build a section; ConfigError, which begins with the `source` of the values, for one that does not fit."""
    try:
        return section.model_validate(values)
    except ValidationError as report:
        raise _reported(report, source, lambda path: _keys(section, path)) from None


Function = TypeVar("Function", bound=Callable[..., Any])


def checked(function: Function) -> Function:
    """A public function that first checks its arguments against their annotations: types, finite numbers, seeds.

    ConfigError names an argument that does not fit.
    """
    names = list(inspect.signature(function).parameters)

    @cache
    def checking() -> Callable[..., Any]:  # on the first call: it takes milliseconds
        return validate_call(config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))(function)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if len(arguments) <= len(names) and not named.keys() & set(names[: len(arguments)]):
            arguments, named = (), dict(zip(names, arguments, strict=False)) | named
        for name, value in named.items():
            if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
                named[name] = value = value.item()  # a number of numpy or torch
            if type(value) is int and not (0 if name == "seed" else -LARGEST) <= value <= LARGEST:
                expected = "0 … 2^63 - 1" if name == "seed" else "a number of 64 bits"
                raise ConfigError(f"{function.__name__}: {name} is {shown(value)}; expected {expected}.")
        try:
            return checking()(*arguments, **named)
        except ValidationError as report:
            if report.title != function.__qualname__:  # raised by what the function did
                raise
            kinds = [kind for hint in get_type_hints(function).values() for kind in get_args(hint)]
            keys = [key for kind in kinds for key in getattr(kind, "__optional_keys__", ())]
            raise _reported(report, function.__name__, lambda path: [*names, *keys]) from None
        except (OSError, ValueError) as error:  # paths that no system has
            if getattr(error, "errno", None) != errno.ENAMETOOLONG and "null byte" not in str(error):
                raise
            paths = {name: str(value) for name, value in named.items() if isinstance(value, (str, bytes, Path))}
            name = max(paths, key=lambda name: ("\0" in paths[name] or "\\x00" in paths[name], len(paths[name])))
            raise ConfigError(f"{function.__name__}: {name} is no path: {shown(paths[name])}.") from None

    return call  # type: ignore[return-value]


def _reported(report: ValidationError, source: str, known: Callable[[tuple[str, ...]], Iterable[str]]) -> ConfigError:
    """Pydantic's report as one line, about the first thing that does not fit."""
    first = report.errors()[0]
    kinds = ("int", "str", "constrained-int", "literal[", "lax-or-strict", "json-or-python", "tuple[", "is-instance")
    location = tuple(str(part) for part in first["loc"] if not str(part).startswith(kinds))
    key = ".".join(location)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return ConfigError(f"{source}: unknown key {shown(key)}. {nearest(location[-1][:80], known(location[:-1]))}")
    problem = first["msg"].removeprefix("Value error, ").rstrip(".")
    whole = isinstance(first["input"], dict) or first["type"].startswith("missing")
    found = f" (found {shown(first['input'])})" if key and not whole else ""
    return ConfigError(f"{source}: {key + ': ' if key else ''}{problem}{found}.")


def _keys(section: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """Names of the fields that the section at `path` has."""
    for name in path:
        field = section.model_fields.get(name)
        for kind in [field.annotation, *get_args(field.annotation)] if field else []:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                section = kind
                break
    return list(section.model_fields)
