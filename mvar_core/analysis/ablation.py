"""Which models an ablation of scale prefixes and of windows compares, and what their runs come to over seeds; no torch.

Letters: S scales, n seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvar_core.config import RunConfig
from mvar_core.errors import ConfigError
from mvar_core.pyramid import ScalePrefixes, ScalePyramid, auto_windows, check_attention, spread_window

WHOLE = "whole"
WindowEntry = int | str | tuple[int, ...]
"""One window for all windowed scales, "whole" for none, "auto" or "auto:K", or one window per scale (0 = whole)."""


@dataclass(frozen=True)
class Setting:
    """The two settings that decide what a model attends to, written so that equal models are equal settings.

    Attributes:
        scale_prefixes: Scales that a token sees, its own included.
        windows: One per scale, 0 for a whole scale.
    """

    scale_prefixes: ScalePrefixes
    windows: tuple[int, ...]

    @classmethod
    def of(cls, pyramid: ScalePyramid, scale_prefixes: ScalePrefixes, windows: Sequence[int]) -> Setting:
        """The setting, in the form that all ways to write it share.

        A window that covers its scale is written as the whole scale, a prefix count that reaches every scale as "all".

        Raises:
            ConfigError: Prefixes or windows that do not fit the pyramid.
        """
        check_attention(pyramid, scale_prefixes, windows)
        if scale_prefixes != "all" and scale_prefixes >= pyramid.num_scales:
            scale_prefixes = "all"
        patterns = pyramid.attention_patterns(scale_prefixes, windows)
        return cls(scale_prefixes, tuple(pattern.window if pattern.is_windowed else 0 for pattern in patterns))

    @property
    def name(self) -> str:
        """A name for a directory."""
        windows = "-".join(map(str, self.windows)) if any(self.windows) else WHOLE
        return f"prefixes-{self.scale_prefixes}-windows-{windows}"

    def apply(self, config: RunConfig, seed: int) -> RunConfig:
        """The run that trains this setting on one seed; everything else is as in `config`."""
        windows = self.windows if any(self.windows) else ()
        attention = config.attention.model_copy(update={"scale_prefixes": self.scale_prefixes, "windows": windows})
        return config.model_copy(update={"attention": attention, "seed": seed, "name": f"{config.name} {self.name}"})


@dataclass(frozen=True)
class Entry:
    """A line of a table.

    Attributes:
        label: What the user asked for, and what it comes to where that is something else.
        setting: What is trained.
    """

    label: str
    setting: Setting


@dataclass(frozen=True)
class Ablation:
    """One table.

    Attributes:
        kind: "prefixes" or "windows".
        title: What is varied and what is not.
        entries: Its lines; several may name one setting.
        baseline: The setting that the others are compared with.
    """

    kind: str
    title: str
    entries: tuple[Entry, ...]
    baseline: Setting

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every setting once, in order."""
        return tuple(dict.fromkeys(entry.setting for entry in self.entries))

    def label(self, setting: Setting) -> str:
        """The shortest label of a setting in this table."""
        return min((entry.label for entry in self.entries if entry.setting == setting), key=len)


def plan_ablations(
    config: RunConfig, prefixes: Sequence[ScalePrefixes], windows: Sequence[WindowEntry]
) -> tuple[Ablation, ...]:
    """The tables of an ablation.

    Args:
        config: The pyramid, and which scales are windowed where an entry is one number: those that have a window
            there, else the last two.
        prefixes: Scale prefixes to compare, with whole scales; may be empty.
        windows: Windows to compare, at one scale prefix; may be empty.

    Raises:
        ConfigError: Nothing to compare, or an entry that does not fit the pyramid.
    """
    tables = []
    if prefixes:
        tables.append(_prefix_table(config, prefixes))
    if windows:
        tables.append(_window_table(config, windows))
    if not tables:
        raise ConfigError("There is nothing to compare.", "Give --prefixes, --windows, or both.")
    return tuple(tables)


def settings_of(ablations: Iterable[Ablation]) -> tuple[Setting, ...]:
    """Every setting of some tables once, in order: what several tables show is trained once."""
    return tuple(dict.fromkeys(setting for ablation in ablations for setting in ablation.settings))


def _prefix_table(config: RunConfig, prefixes: Sequence[ScalePrefixes]) -> Ablation:
    pyramid = config.pyramid
    whole = (0,) * pyramid.num_scales
    entries = []
    for count in dict.fromkeys(prefixes):
        setting = Setting.of(pyramid, count, whole)
        label = str(count) if setting.scale_prefixes == count else f"{count} = all"
        entries.append(Entry(label, setting))
    every = Setting("all", whole)
    settings = [entry.setting for entry in entries]
    return Ablation(
        "prefixes", "Scale prefixes, whole scales", tuple(entries), every if every in settings else settings[0]
    )


def _window_table(config: RunConfig, windows: Sequence[WindowEntry]) -> Ablation:
    pyramid = config.pyramid
    whole = Setting.of(pyramid, 1, (0,) * pyramid.num_scales)
    entries = []
    for window in dict.fromkeys(windows):
        if isinstance(window, tuple):
            sides, label = window, ",".join(map(str, window))
        elif isinstance(window, str):
            sides, label = whole.windows if window == WHOLE else auto_windows(window, pyramid), window
        else:
            sides, label = spread_window(window, config.windows), str(window)
        setting = Setting.of(pyramid, 1, sides)
        if setting == whole and label != WHOLE:
            label = f"{label} = {WHOLE}"
        elif setting.windows != tuple(sides) or (isinstance(window, str) and window != WHOLE):
            label = f"{label} = {','.join(map(str, setting.windows))}"
        entries.append(Entry(label, setting))
    settings = [entry.setting for entry in entries]
    scales = [number for number, window in enumerate(spread_window(3, config.windows)) if window]
    sides_shown = ", ".join(str(pyramid.grids[scale]) for scale in scales)
    return Ablation(
        "windows",
        f"Windows, one scale prefix; a single number is the window on {sides_shown}",
        tuple(entries),
        whole if whole in settings else settings[0],
    )


@dataclass(frozen=True)
class Spread:
    """One quantity over seeds.

    Attributes:
        values: One per seed that has it.
        mean: Their mean; None without any.
        std: Their standard deviation with n - 1 in the denominator; None of fewer than two.
    """

    values: tuple[float, ...]
    mean: float | None
    std: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """From one value per seed; None and numbers that are not finite are left out."""
        kept = tuple(float(value) for value in values if value is not None and math.isfinite(value))
        mean = float(np.mean(kept)) if kept else None
        return cls(kept, mean, float(np.std(kept, ddof=1)) if len(kept) > 1 else None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"mean": self.mean, "std": self.std, "n": len(self.values), "values": list(self.values)}


def over_seeds(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation of the named quantities over rows that differ in their seed alone.

    A quantity is a number, or a list with one number per scale; of a list, a list of spreads is made.
    """
    found: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        lists = [value for value in values if isinstance(value, list | tuple)]
        if lists:
            found[name] = [Spread.of(column).to_dict() for column in zip(*lists, strict=True)]
        else:
            found[name] = Spread.of(values).to_dict()
    return found
