"""Presets, and how they merge with settings and flags into a configuration.

Defaults ← preset ← `--set a.b=c` ← flags: later wins. Where an image size is changed and no pyramid is given with it,
the pyramid follows (`ScalePyramid.for_image`), and so do windows that were listed for the pyramid before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvar_core.config.model import ModelConfig, RunConfig, TokenizerConfig
from mvar_core.config.section import validate
from mvar_core.errors import ConfigError, nearest, shown
from mvar_core.pyramid import PatchSize, ScalePyramid, auto_windows, read_size, read_sizes, spread_window
from mvar_core.untrusted import parse_yaml, read_yaml

MOST_PARENTS = 16


def presets_directory() -> Path:
    """The folder of presets: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "preset_files"
    return packaged if packaged.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """Names that `--preset` accepts, sorted."""
    return sorted(path.stem for path in presets_directory().glob("*.yaml"))


def read_preset(name: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """The mapping of a preset, by name or by path of a YAML file, with the presets it `extends` merged in.

    `extended_by` are the presets that lead to this one. ConfigError where there is no such preset or file, it is not a
    YAML mapping, or presets extend each other in a circle.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else presets_directory() / f"{name}.yaml"
    if not is_path and name not in preset_names():
        raise ConfigError(f"There is no preset {shown(name)}. {nearest(name[:80], preset_names())}")
    if name in extended_by or len(extended_by) > MOST_PARENTS:
        raise ConfigError(f"{extended_by[0]} extends itself: {' → '.join((*extended_by, name)[:MOST_PARENTS])}.")
    values = read_yaml(path, ConfigError) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected a mapping of settings.")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends is {shown(parent)}; expected the name of a preset or of a YAML file.")
    return _lay_over(read_preset(parent, (*extended_by, name)), values)


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
    """Split `a.b=c` into its path and its value, read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {shown(text)} has no value; use --set key.name=value.")
    return tuple(path.strip().split(".")), parse_yaml(value, f"The value of --set {shown(text)}", ConfigError)


def load_config(
    preset: str | None = None,
    settings: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge defaults, a preset (or else `base`), settings `a.b=c` and overrides, in this order, and check the result.

    In overrides None is as if it were not there. ConfigError for an unknown preset or key, with the nearest names, or a
    value that does not fit.
    """
    values = read_preset(preset) if preset is not None else dict(base or {})
    if preset is not None:
        values.setdefault("name", Path(preset).stem if preset.endswith((".yaml", ".yml")) else preset)
    changes: list[Any] = []
    for setting in settings:
        path, value = parse_setting(setting)
        for key in reversed(path):
            value = {key: value}
        changes.append(value)
    asked: dict[str, Any] = {}
    # One number goes to the scales that have windows before it: it waits until they and the pyramid are known.
    listed = number = None
    for change in [*changes, _without_none(overrides or {})]:
        asked = merge(asked, change)
        windows = _windows(change)
        if type(windows) is int:
            number = windows
        elif windows is not None:
            listed, number = windows, None
    if _windows(asked) is not None:
        asked["attention"].pop("windows")
    if listed is not None:
        asked = merge(asked, {"attention": {"windows": listed}})
    values = _with_windows(_with_pyramid(_lay_over(values, asked), preset), number)
    return validate(RunConfig, values, preset or "configuration")


def _lay_over(values: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` over `values`. Another image size removes a pyramid that was made for the one before.

    Windows that were listed for another pyramid become `auto`, with the widest of them.
    """
    merged = merge(values, change)
    windows, sizes = _windows(merged), change.get("patch_sizes", 0)
    fits = not isinstance(sizes, str | list | tuple) or _scales(sizes) == len(windows or ())
    if "image_size" in change and "patch_sizes" not in change and _size(change) != _size(values):
        merged.pop("patch_sizes", None)
        fits = False
    if not fits and _windows(change) is None and isinstance(windows, list | tuple):
        widest = max(windows, default=0)
        merged = merge(merged, {"attention": {"windows": f"auto:{widest}" if widest else []}})
    return merged


def _with_pyramid(values: dict[str, Any], source: str | None) -> dict[str, Any]:
    """The pyramid that follows from the image size, where there is none."""
    size = _size(values)
    if size is None or "patch_sizes" in values:
        return values
    tokenizer = validate(TokenizerConfig, values.get("tokenizer") or {}, source or "tokenizer")
    height, width = (size, size) if isinstance(size, int) else size
    return {**values, "patch_sizes": list(ScalePyramid.for_image(height, width, tokenizer.downsample).patch_sizes)}


def _with_windows(values: dict[str, Any], number: int | None) -> dict[str, Any]:
    """`attention.windows` as a list: what `auto` chooses, and one number spread over the scales that have windows."""
    windows = _windows(values)
    if number is None and not isinstance(windows, str) and type(windows) is not int:
        return values
    try:
        patch_sizes = read_sizes(values.get("patch_sizes", ModelConfig.model_fields["patch_sizes"].default))
        pyramid = ScalePyramid.from_patch_sizes(patch_sizes)
    except (ValueError, TypeError):
        return values  # which the validation reports
    whole = (0,) * pyramid.num_scales
    if isinstance(windows, str):
        windows = auto_windows(windows, pyramid)
    elif type(windows) is int:
        windows = spread_window(windows, whole)
    if number is not None:
        windows = spread_window(number, windows or whole)
    return merge(values, {"attention": {"windows": list(windows)}})


def _windows(values: Mapping[str, Any]) -> Any:
    """`attention.windows`, a list where it is null; None where it is not set."""
    attention = values.get("attention")
    if not isinstance(attention, Mapping) or "windows" not in attention:
        return None
    return [] if attention["windows"] is None else attention["windows"]


def _size(values: Mapping[str, Any]) -> PatchSize | None:
    """`image_size`; None where it is not set or not a size, which the validation reports."""
    try:
        return read_size(values.get("image_size"))
    except ValueError:
        return None


def _scales(sizes: str | Sequence[Any]) -> int:
    return len(sizes.split(",")) if isinstance(sizes, str) else len(sizes)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    inner = (
        (key, _without_none(value) or None if isinstance(value, Mapping) else value) for key, value in values.items()
    )
    return {key: value for key, value in inner if value is not None}
