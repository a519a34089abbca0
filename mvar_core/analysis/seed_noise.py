"""What differences between settings are worth against the noise of seeds: Welch's test, Holm's correction, in words.

Letters: n seeds, m comparisons of one table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEVEL = 0.05
"""Probability of calling any difference of a table real where none is."""


@dataclass(frozen=True)
class Comparison:
    """A setting beside the baseline, by one quantity.

    Attributes:
        name: The setting.
        difference: Its mean minus the baseline's.
        effect: The difference in units of the seed noise; None where that is not known or zero.
        p_value: Welch's two-sided test, unequal variances; None for fewer than two seeds on a side.
        adjusted: The same after Holm's correction for all comparisons of the table.
        distinguishable: Whether `adjusted` is below LEVEL; None where there is no test.
    """

    name: str
    difference: float
    effect: float | None
    p_value: float | None
    adjusted: float | None
    distinguishable: bool | None

    def to_dict(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """All settings of a table beside its baseline, by one quantity.

    Attributes:
        quantity: Its name.
        baseline: The setting that the others are compared with.
        seeds: Fewest seeds of any setting.
        noise: Standard deviation over seeds, pooled over the settings; None for one seed.
        resolution: The smallest difference that this many seeds could show at this noise, where every setting has it.
        comparisons: One per other setting.
    """

    quantity: str
    baseline: str
    seeds: int
    noise: float | None
    resolution: float | None
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


def pooled_std(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within groups, each around its own mean: √(Σ(n-1)s² / Σ(n-1)); None without any freedom."""
    freedom = sum(len(group) - 1 for group in groups if group)
    if freedom < 1:
        return None
    squares = sum(float(np.var(group, ddof=1)) * (len(group) - 1) for group in groups if len(group) > 1)
    return math.sqrt(squares / freedom)


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p-value of Welch's t test that two groups have one mean; None for a group of fewer than two.

    Two groups without any spread have p = 1 where they are equal and 0 where they are not.
    """
    if min(len(first), len(second)) < 2:
        return None
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return 1.0 if first[0] == second[0] else 0.0
    from scipy import stats

    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false alarm among all tests stays below the level."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[int(index)] = largest
    return adjusted


def judge(quantity: str, values: Mapping[str, Sequence[float]], baseline: str) -> Verdict | None:
    """Compare every setting with the baseline.

    Args:
        quantity: The quantity's name.
        values: One value per seed, by setting.
        baseline: One of the settings.

    Returns:
        The verdict; None where the baseline or all others have no values.
    """
    known = {name: list(group) for name, group in values.items() if len(group)}
    if baseline not in known or len(known) < 2:
        return None
    noise = pooled_std(list(known.values()))
    others = [name for name in known if name != baseline]
    p_values = {name: welch(known[name], known[baseline]) for name in others}
    tested = [name for name in others if p_values[name] is not None]
    adjusted = dict(zip(tested, holm([p for p in (p_values[name] for name in tested) if p is not None]), strict=True))
    comparisons = []
    for name in others:
        difference = float(np.mean(known[name]) - np.mean(known[baseline]))
        comparisons.append(
            Comparison(
                name,
                difference,
                difference / noise if noise else None,
                p_values[name],
                adjusted.get(name),
                adjusted[name] < LEVEL if name in adjusted else None,
            )
        )
    seeds = min(len(group) for group in known.values())
    return Verdict(quantity, baseline, seeds, noise, _resolution(noise, seeds, len(others)), tuple(comparisons))


def _resolution(noise: float | None, seeds: int, comparisons: int) -> float | None:
    """The difference at which two groups of n values with this spread reach LEVEL / m."""
    if noise is None or seeds < 2:
        return None
    from scipy import stats

    critical = float(stats.t.ppf(1 - LEVEL / comparisons / 2, 2 * seeds - 2))
    return critical * noise * math.sqrt(2 / seeds)


def sentence(verdict: Verdict, values: Mapping[str, Sequence[float]], *, lower_is_better: bool = True) -> str:
    """What a verdict says, in words that a reader can check against the table.

    Args:
        verdict: From `judge`.
        values: What it was made from.
        lower_is_better: Whether a negative difference is an improvement.
    """
    means = {name: float(np.mean(group)) for name, group in values.items() if len(group)}
    best = (min if lower_is_better else max)(means, key=lambda name: means[name])
    start = f"{verdict.quantity}: {'lowest' if lower_is_better else 'highest'} with {best} ({_number(means[best])})."
    base = f"{verdict.baseline} ({_number(means[verdict.baseline])})"
    if verdict.noise is None or verdict.seeds < 2:
        shown = ", ".join(f"{item.name} {_signed(item.difference)}" for item in verdict.comparisons)
        return f"{start} Beside {base}: {shown}. One seed says nothing about noise: no difference can be judged."
    parts = []
    for found, words in ((True, "beyond seed noise"), (False, "not to be told from seed noise")):
        group = [item for item in verdict.comparisons if item.distinguishable is found]
        if group:
            parts.append(f"{words}: " + ", ".join(_comparison(item, lower_is_better) for item in group))
    resolution = (
        f" With {verdict.seeds} seeds a difference below about {_number(verdict.resolution)} would hardly show."
        if verdict.resolution
        else ""
    )
    return (
        f"{start} Beside {base}, over {verdict.seeds} seeds with a seed std of {_number(verdict.noise)}, "
        f"{'; '.join(parts)}.{resolution}"
    )


def _comparison(item: Comparison, lower_is_better: bool) -> str:
    if item.difference == 0:
        return f"{item.name} is equal"
    better = (item.difference < 0) == lower_is_better
    verb = "better" if better else "worse"
    size = f"{abs(item.effect):.1f} seed std" if item.effect is not None else "no spread"
    adjusted = "" if item.adjusted is None else f", p {_probability(item.adjusted)}"
    return f"{item.name} is {_number(abs(item.difference))} {verb} ({size}{adjusted})"


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "−") + _number(abs(value))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if abs(value) >= 1 else f"{value:.2g}"
