"""Which models an ablation of scale prefixes and of windows compares, and what their rows show over seeds; no torch.

Letters: S scales, n seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mvar_core.analysis.seed_noise import compare, over_seeds, sentence
from mvar_core.config import RunConfig
from mvar_core.errors import ConfigError
from mvar_core.evaluation.scores import METRICS
from mvar_core.pyramid import ScalePrefixes, ScalePyramid, auto_windows, check_attention, spread_window

WHOLE = "whole"
WindowEntry = int | str | tuple[int, ...]
"""One window for all windowed scales, "whole" for none, "auto" or "auto:K", or one window per scale (0 = whole)."""
FROM_ROW = ("loss", "validation_loss", "validation_scale_loss", "validation_scale_accuracy", "training_seconds")
FROM_SCORES = (*METRICS, "classifier_accuracy", "pixel_diversity", "nearest_distance")
PLANNED = ("parameters", "attention_gmacs", "total_gmacs", "kv_cache_bytes")


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
        label: What the user asked for, and the setting that it amounts to where that is written differently.
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
    def labels(self) -> dict[Setting, str]:
        """Every setting once, in order, and its shortest label."""
        found: dict[Setting, str] = {}
        for entry in self.entries:
            found[entry.setting] = min(found.get(entry.setting, entry.label), entry.label, key=len)
        return found


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
    if not prefixes and not windows:
        raise ConfigError("There is nothing to compare.", "Give --prefixes, --windows, or both.")
    tables = []
    pyramid = config.pyramid
    whole = (0,) * pyramid.num_scales
    if prefixes:
        settings = [(count, Setting.of(pyramid, count, whole)) for count in dict.fromkeys(prefixes)]
        entries = [Entry(str(n) if s.scale_prefixes == n else f"{n} = all", s) for n, s in settings]
        tables.append(_table("prefixes", "Scale prefixes, whole scales", entries, Setting("all", whole)))
    if windows:
        windowed = zip(pyramid.grids, spread_window(3, config.windows), strict=True)
        title = (
            f"Windows, one scale prefix; a single number is the window on {', '.join(str(g) for g, k in windowed if k)}"
        )
        entries = [_window_entry(config, window) for window in dict.fromkeys(windows)]
        tables.append(_table("windows", title, entries, Setting.of(pyramid, 1, whole)))
    return tuple(tables)


def settings_of(ablations: Iterable[Ablation]) -> tuple[Setting, ...]:
    """Every setting of some tables once, in order: what several tables show is trained once."""
    return tuple(dict.fromkeys(setting for ablation in ablations for setting in ablation.labels))


def _table(kind: str, title: str, entries: Sequence[Entry], baseline: Setting) -> Ablation:
    settings = [entry.setting for entry in entries]
    return Ablation(kind, title, tuple(entries), baseline if baseline in settings else settings[0])


def _window_entry(config: RunConfig, window: WindowEntry) -> Entry:
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
    return Entry(label, setting)


def aggregate(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping per setting: what all its rows share, and the spread of what they measured over seeds."""
    found = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        found.append(
            {
                "setting": name,
                "scale_prefixes": own[0]["scale_prefixes"],
                "windows": own[0]["windows"],
                "seeds": [row["seed"] for row in own],
                **{key: own[0][key] for key in PLANNED},
                **over_seeds(own, FROM_ROW),
                **over_seeds([row["scores"] for row in own], FROM_SCORES),
                "cost": own[0]["cost"],
            }
        )
    return found


def qualities(features: str | None, settings: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Names of the measures that decide, by key, less is better: FID where there is one, and the validation loss.

    Args:
        features: What FID is computed from; other than Inception's, its name says so.
        settings: From `aggregate`.
    """
    name = "FID" if features in (None, "inception") else f"{features}-FID"
    scored = any(setting["fid"]["values"] for setting in settings)
    return {**({"fid": name} if scored else {}), "validation_loss": "validation loss"}


def summarize(ablation: Ablation, settings: Iterable[Mapping[str, Any]], features: str | None) -> dict[str, Any]:
    """A table of an ablation as ablation.json holds it, with what its differences mean and what its settings save."""
    found = {setting["setting"]: setting for setting in settings}
    baseline = ablation.labels[ablation.baseline]
    sentences, verdicts = [], []
    for key, quantity in qualities(features, found.values()).items():
        values = {label: found[setting.name][key]["values"] for setting, label in ablation.labels.items()}
        verdict = compare(quantity, values, baseline)
        if verdict is not None:
            sentences.append(sentence(verdict, values))
            verdicts.append(asdict(verdict))
    base = found[ablation.baseline.name]
    savings = [
        f"{label} needs {', '.join(_ratios(found[setting.name], base))}"
        for setting, label in ablation.labels.items()
        if setting != ablation.baseline
    ]
    return {
        "kind": ablation.kind,
        "title": ablation.title,
        "baseline": ablation.baseline.name,
        "entries": [{"label": entry.label, "setting": entry.setting.name} for entry in ablation.entries],
        "sentences": sentences,
        "savings": f"Cost compared with {baseline}: {'; '.join(savings)}." if savings else "",
        "verdicts": verdicts,
    }


def _ratios(found: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    quantities = {
        "attention": (found["attention_gmacs"], base["attention_gmacs"]),
        "time": (found["cost"]["seconds_per_image"], base["cost"]["seconds_per_image"]),
        "allocated memory": (found["cost"]["allocated_bytes"], base["cost"]["allocated_bytes"]),
    }
    return [f"{a / b:.2f} of the {what}" for what, (a, b) in quantities.items() if a is not None and b]
