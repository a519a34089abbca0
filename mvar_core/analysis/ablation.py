"""Which models an ablation of scale prefixes and of windows compares, and what their rows show over seeds; no torch.

What differences mean next to the noise of seeds: Welch's test, Holm's correction, in words. Letters: S scales, n seeds,
m comparisons of one table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from mvar_core.config import RunConfig
from mvar_core.errors import ConfigError
from mvar_core.evaluation.scores import METRICS
from mvar_core.pyramid import ScalePrefixes, ScalePyramid, auto_windows, check_attention, spread_window

WHOLE = "whole"
WindowEntry = int | str | tuple[int, ...]
"""One window for all windowed scales, "whole" for none, "auto" or "auto:K", or one window per scale (0 = whole)."""
FROM_ROW = ("loss", "validation_loss", "validation_scale_loss", "validation_scale_accuracy", "training_seconds")
FROM_SCORES = (*METRICS, "classifier_accuracy", "pixel_diversity", "nearest_distance")
LEVEL = 0.05
"""Probability of calling any difference of a table real where none is."""
PLANNED = ("parameters", "attention_gmacs", "total_gmacs", "kv_cache_bytes")


@dataclass(frozen=True)
class Setting:
    """What decides what a model attends to: the scales that a token sees, and one window per scale (0 = whole)."""

    scale_prefixes: ScalePrefixes
    windows: tuple[int, ...]

    @classmethod
    def of(cls, pyramid: ScalePyramid, scale_prefixes: ScalePrefixes, windows: Sequence[int]) -> Setting:
        """The setting in a form that equal models share: "all" where all are seen, 0 where a window covers a scale."""
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
class Ablation:
    """One table, of `kind` "prefixes" or "windows"; the settings are compared with the `baseline`.

    Attributes:
        entries: Its lines: what the user asked for, with the setting that it amounts to where that is written
            differently, and what is trained; several may name one setting.
    """

    kind: str
    title: str
    entries: tuple[tuple[str, Setting], ...]
    baseline: Setting

    @property
    def labels(self) -> dict[Setting, str]:
        """Every setting once, in order, and its shortest label."""
        return shortest_labels(self.entries)


Key = TypeVar("Key")


def shortest_labels(entries: Iterable[tuple[str, Key]]) -> dict[Key, str]:
    """What is labelled once, in order, and the shortest of its labels."""
    found: dict[Key, str] = {}
    for label, key in entries:
        found[key] = min(found.get(key, label), label, key=len)
    return found


def plan_ablations(
    config: RunConfig, prefixes: Sequence[ScalePrefixes], windows: Sequence[WindowEntry]
) -> tuple[Ablation, ...]:
    """The tables of an ablation: prefixes with whole scales, and windows at one scale prefix; one may be empty.

    Where an entry of windows is one number, those scales are windowed that have a window in `config`, else the last
    two.
    """
    if not prefixes and not windows:
        raise ConfigError("There is nothing to compare.", "Use --prefixes, --windows, or both.")
    pyramid = config.pyramid
    whole = (0,) * pyramid.num_scales
    tables = []
    if prefixes:
        settings = {count: Setting.of(pyramid, count, whole) for count in prefixes}
        entries = [(str(n) if s.scale_prefixes == n else f"{n} = all", s) for n, s in settings.items()]
        tables.append(("prefixes", "Scale prefixes, whole scales", entries, Setting("all", whole)))
    if windows:
        windowed = zip(pyramid.grids, spread_window(3, config.windows), strict=True)
        sides = ", ".join(str(grid) for grid, window in windowed if window)
        title = f"Windows, one scale prefix; a single number is the window on {sides}"
        entries = [_window_entry(config, window) for window in dict.fromkeys(windows)]
        tables.append(("windows", title, entries, Setting.of(pyramid, 1, whole)))
    return tuple(
        Ablation(kind, title, tuple(entries), baseline if baseline in dict(entries).values() else entries[0][1])
        for kind, title, entries, baseline in tables
    )


def settings_of(ablations: Iterable[Ablation]) -> tuple[Setting, ...]:
    """Every setting of some tables once, in order: what several tables show is trained once."""
    return tuple(dict.fromkeys(setting for ablation in ablations for setting in ablation.labels))


def _window_entry(config: RunConfig, window: WindowEntry) -> tuple[str, Setting]:
    pyramid = config.pyramid
    if isinstance(window, tuple):
        sides, label = window, ",".join(map(str, window))
    elif isinstance(window, int):
        sides, label = tuple(spread_window(window, config.windows)), str(window)
    else:
        sides = (0,) * pyramid.num_scales if window == WHOLE else tuple(auto_windows(window, pyramid))
        label = window
    setting = Setting.of(pyramid, 1, sides)
    if not any(setting.windows) and label != WHOLE:
        label = f"{label} = {WHOLE}"
    elif setting.windows != sides or (isinstance(window, str) and window != WHOLE):
        label = f"{label} = {','.join(map(str, setting.windows))}"
    return label, setting


def aggregate(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping per setting: what all its rows share, and the spread of what they measured over seeds."""
    found = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        found.append(
            {key: own[0][key] for key in ("setting", "scale_prefixes", "windows", *PLANNED, "cost")}
            | {"seeds": [row["seed"] for row in own]}
            | over_seeds(own, FROM_ROW)
            | over_seeds([row["scores"] for row in own], FROM_SCORES)
        )
    return found


def qualities(features: str | None, settings: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Names of the measures that decide, by key, less is better: FID where there is one, and the validation loss.

    FID of other `features` than Inception's says so in its name; `settings` are from `aggregate`.
    """
    name = "FID" if features in (None, "inception") else f"{features}-FID"
    scored = any(setting["fid"]["values"] for setting in settings)
    return {**({"fid": name} if scored else {}), "validation_loss": "validation loss"}


def summarize(ablation: Ablation, settings: Iterable[Mapping[str, Any]], features: str | None) -> dict[str, Any]:
    """A table of an ablation as ablation.json holds it, with what its differences mean and what its settings save."""
    found = {setting["setting"]: setting for setting in settings}
    labels, sentences, verdicts = ablation.labels, [], []
    baseline = labels[ablation.baseline]
    for key, quantity in qualities(features, found.values()).items():
        values = {label: found[setting.name][key]["values"] for setting, label in labels.items()}
        verdict = compare(quantity, values, baseline)
        if verdict is not None:
            sentences.append(sentence(verdict, values))
            verdicts.append(verdict)
    costs = {
        setting: {
            "attention": found[setting.name]["attention_gmacs"],
            "time": found[setting.name]["cost"]["seconds_per_image"],
            "allocated memory": found[setting.name]["cost"]["allocated_bytes"],
        }
        for setting in labels
    }
    base, savings = costs.pop(ablation.baseline), []
    for setting, own in costs.items():
        ratios = [f"{own[key] / base[key]:.2f} of the {key}" for key in base if own[key] is not None and base[key]]
        savings.append(f"{labels[setting]} needs {', '.join(ratios)}")
    return {
        "kind": ablation.kind,
        "title": ablation.title,
        "baseline": ablation.baseline.name,
        "entries": [{"label": label, "setting": setting.name} for label, setting in ablation.entries],
        "sentences": sentences,
        "savings": f"Cost compared with {baseline}: {'; '.join(savings)}." if savings else "",
        "verdicts": verdicts,
    }


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1 in the denominator), number and list of the finite values of one quantity."""
    kept = [float(value) for value in values if value is not None and math.isfinite(value)]
    return {
        "mean": float(np.mean(kept)) if kept else None,
        "std": float(np.std(kept, ddof=1)) if len(kept) > 1 else None,
        "n": len(kept),
        "values": kept,
    }


def over_seeds(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The spread of each quantity over rows that differ in their seed alone; of a list, one spread per element."""
    found: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        lists = [value for value in values if isinstance(value, list | tuple)]
        found[name] = [spread(column) for column in zip(*lists, strict=True)] if lists else spread(values)
    return found


def pooled_std(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within groups, each around its own mean: √(Σ(n-1)s² / Σ(n-1)); None without any freedom."""
    repeated = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    squares = sum(float(np.var(group, ddof=1)) * (len(group) - 1) for group in repeated)
    return math.sqrt(squares / freedom) if freedom else None


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p-value of Welch's t test that two groups have one mean; None for a group of fewer than two."""
    if min(len(first), len(second)) < 2:
        return None
    if np.ptp(first) == 0 and np.ptp(second) == 0:  # the test has no value for groups without any spread
        return float(first[0] == second[0])
    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false alarm among all tests stays below the level."""
    order, adjusted = np.argsort(p_values, kind="stable"), np.empty(len(p_values))
    steps = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return list(map(float, adjusted))


def compare(quantity: str, values: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Any] | None:
    """Compare every setting with the baseline by one quantity, of which there is one value per seed.

    Returns:
        None where the baseline or all others have no values. Otherwise `seeds` (fewest of any setting), `noise`
        (standard deviation over seeds, pooled over the settings; None for one seed), `resolution` (the smallest
        difference that this many seeds could show at this noise), and `comparisons`, one for each other setting:
        `name`, `difference` (its mean minus the baseline's), `effect` (the difference in units of the noise), `p_value`
        (Welch's test), `adjusted` (the same after Holm's correction for all comparisons) and `distinguishable` (whether
        `adjusted` is below LEVEL), each None where it is not known.
    """
    known = {name: list(group) for name, group in values.items() if len(group)}
    others = [name for name in known if name != baseline]
    if baseline not in known or not others:
        return None
    noise, seeds = pooled_std(list(known.values())), min(map(len, known.values()))
    p_values = {name: p for name in others if (p := welch(known[name], known[baseline])) is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    differences = {name: float(np.mean(known[name]) - np.mean(known[baseline])) for name in others}
    resolution = None
    if noise is not None and seeds > 1:  # where two groups of n values with this spread reach LEVEL / m
        critical = float(stats.t.ppf(1 - LEVEL / len(others) / 2, 2 * seeds - 2))
        resolution = critical * noise * math.sqrt(2 / seeds)
    comparisons = [
        {
            "name": name,
            "difference": difference,
            "effect": difference / noise if noise else None,
            "p_value": p_values.get(name),
            "adjusted": adjusted.get(name),
            "distinguishable": adjusted[name] < LEVEL if name in adjusted else None,
        }
        for name, difference in differences.items()
    ]
    return {
        "quantity": quantity,
        "baseline": baseline,
        "seeds": seeds,
        "noise": noise,
        "resolution": resolution,
        "comparisons": comparisons,
    }


def sentence(verdict: Mapping[str, Any], values: Mapping[str, Sequence[float]]) -> str:
    """The verdict of `compare` on a quantity of which less is better, in words that a reader can check."""
    means = {name: float(np.mean(group)) for name, group in values.items() if len(group)}
    best, seeds, comparisons = min(means, key=lambda name: means[name]), verdict["seeds"], verdict["comparisons"]
    start = (
        f"{verdict['quantity']}: lowest with {best} ({_number(means[best])})."
        f" Compared with {verdict['baseline']} ({_number(means[verdict['baseline']])})"
    )
    if verdict["noise"] is None or seeds < 2:
        signed = (f"{each['name']} {'−' if each['difference'] < 0 else '+'}{_number(abs(each['difference']))}"
                  for each in comparisons)  # fmt: skip
        return f"{start}: {', '.join(signed)}. One seed shows no noise: no difference can be tested."
    groups = []
    for found, words in ((True, "beyond seed noise"), (False, "within seed noise")):
        group = [_in_words(each) for each in comparisons if each["distinguishable"] is found]
        groups += [f"{words}: {', '.join(group)}"] if group else []
    text = f"{start}, over {seeds} seeds with a seed std of {_number(verdict['noise'])}, {'; '.join(groups)}."
    if verdict["resolution"]:
        text += f" With {seeds} seeds, differences below about {_number(verdict['resolution'])} would hardly show."
    return text


def _in_words(each: Mapping[str, Any]) -> str:
    name, difference, adjusted = each["name"], each["difference"], each["adjusted"]
    if difference == 0:
        return f"{name} is equal"
    size = f"{abs(each['effect']):.1f} seed std" if each["effect"] is not None else "no spread"
    p = "" if adjusted is None else ", p < 0.001" if adjusted < 0.001 else f", p = {adjusted:.2g}"
    return f"{name} is {_number(abs(difference))} {'better' if difference < 0 else 'worse'} ({size}{p})"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.2g}"
