"""Presets, and how they merge with settings and flags into a configuration.

Defaults ← preset ← `--set a.b=c` ← flags: later wins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mvar_core.config import ModelConfig, RunConfig
from mvar_core.errors import ConfigError, nearest
from mvar_core.scales import spread_window
from mvar_core.sections import validate


def presets_directory() -> Path:
    """The folder of presets: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "preset_files"
    return packaged if packaged.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """Names that `--preset` takes, sorted."""
    return sorted(path.stem for path in presets_directory().glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The mapping of a preset, by name or by path of a YAML file, with the presets it `extends` merged in.

    Raises:
        ConfigError: No such preset or file, or not a YAML mapping.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else presets_directory() / f"{name}.yaml"
    if not path.is_file():
        if is_path:
            raise ConfigError(f"{path} does not exist.", "`--preset` takes a preset's name or a YAML file.")
        raise ConfigError(f"There is no preset {name!r}. {nearest(name, preset_names())}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected a mapping of settings.")
    parent = values.pop("extends", None)
    return merge(read_preset(parent), values) if parent else values


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping; anything else is replaced whole."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def parse_setting(text: str) -> tuple[tuple[str, ...], Any]:
    """Split `a.b=c` into its path and its value, read as YAML.

    Raises:
        ConfigError: There is no "=", or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {text!r} has no value; write --set key.name=value.")
    try:
        return tuple(path.strip().split(".")), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: {value!r} is not a YAML value.") from None


def load_config(
    preset: str | None = None,
    settings: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge defaults, a preset, `--set` settings and flags, in this order, and check the result.

    Args:
        preset: Name of a preset or path of a YAML file.
        base: What to start from where there is no preset.
        settings: Texts of the form `a.b=c`.
        overrides: A mapping laid over everything else; None values are left out.

    Raises:
        ConfigError: An unknown preset or key (with the nearest names), or a value that does not fit.
    """
    values = read_preset(preset) if preset else dict(base or {})
    if preset:
        values.setdefault("name", Path(preset).stem if preset.endswith((".yaml", ".yml")) else preset)
    changes = [_as_mapping(*parse_setting(setting)) for setting in settings]
    for change in [*changes, _without_none(overrides or {})]:
        values = _spread_single_window(merge(values, change), values)
    return validate(RunConfig, values, preset or "configuration")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            if inner := _without_none(value):
                kept[key] = inner
        elif value is not None:
            kept[key] = value
    return kept


def _as_mapping(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def _spread_single_window(values: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Let `attention.windows` be one number: the window of every scale that had one, or of the last two."""
    attention = values.get("attention")
    window = attention.get("windows") if isinstance(attention, dict) else None
    if not isinstance(window, int) or isinstance(window, bool):
        return values
    patch_sizes = values.get("patch_sizes", ModelConfig.model_fields["patch_sizes"].default)
    current = before.get("attention", {}).get("windows") or (0,) * len(patch_sizes)
    return merge(values, {"attention": {"windows": list(spread_window(window, current))}})
