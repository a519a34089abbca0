"""What differences between settings mean next to the noise of seeds: Welch's test, Holm's correction, in words.

Letters: n seeds, m comparisons of one table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.05
"""Probability of calling any difference of a table real where none is."""


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1 in the denominator), number and list of one quantity's values over seeds.

    None and values that are not finite are left out; without any there is no mean, of fewer than two no deviation.
    """
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


@dataclass(frozen=True)
class Comparison:
    """A setting compared with the baseline, by one quantity.

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


@dataclass(frozen=True)
class Verdict:
    """All settings of a table compared with its baseline, by one quantity.

    Attributes:
        quantity: Its name.
        baseline: The setting that the others are compared with.
        seeds: Fewest seeds of any setting.
        noise: Standard deviation over seeds, pooled over the settings; None for one seed.
        resolution: The smallest difference that this many seeds could show at this noise.
        comparisons: One per other setting.
    """

    quantity: str
    baseline: str
    seeds: int
    noise: float | None
    resolution: float | None
    comparisons: tuple[Comparison, ...]


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
    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false alarm among all tests stays below the level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[int(index)] = largest
    return adjusted


def compare(quantity: str, values: Mapping[str, Sequence[float]], baseline: str) -> Verdict | None:
    """Compare every setting with the baseline.

    Args:
        quantity: The quantity's name.
        values: One value per seed, by setting.
        baseline: One of the settings.

    Returns:
        The verdict; None where the baseline or all others have no values.
    """
    known = {name: list(group) for name, group in values.items() if len(group)}
    others = [name for name in known if name != baseline]
    if baseline not in known or not others:
        return None
    noise = pooled_std(list(known.values()))
    p_values = {name: p for name in others if (p := welch(known[name], known[baseline])) is not None}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    comparisons = []
    for name in others:
        difference = float(np.mean(known[name]) - np.mean(known[baseline]))
        comparisons.append(
            Comparison(
                name,
                difference,
                difference / noise if noise else None,
                p_values.get(name),
                adjusted.get(name),
                adjusted[name] < LEVEL if name in adjusted else None,
            )
        )
    seeds = min(map(len, known.values()))
    resolution = None
    if noise is not None and seeds > 1:  # where two groups of n values with this spread reach LEVEL / m
        critical = float(stats.t.ppf(1 - LEVEL / len(others) / 2, 2 * seeds - 2))
        resolution = critical * noise * math.sqrt(2 / seeds)
    return Verdict(quantity, baseline, seeds, noise, resolution, tuple(comparisons))


def sentence(verdict: Verdict, values: Mapping[str, Sequence[float]]) -> str:
    """A verdict on a quantity of which less is better, in words that a reader can check against the table.

    Args:
        verdict: From `compare`.
        values: What it was made from.
    """
    means = {name: float(np.mean(group)) for name, group in values.items() if len(group)}
    best = min(means, key=lambda name: means[name])
    start = f"{verdict.quantity}: lowest with {best} ({_number(means[best])})."
    base = f"{verdict.baseline} ({_number(means[verdict.baseline])})"
    if verdict.noise is None or verdict.seeds < 2:
        shown = ", ".join(
            f"{item.name} {'+' if item.difference >= 0 else '−'}{_number(abs(item.difference))}"
            for item in verdict.comparisons
        )
        return f"{start} Compared with {base}: {shown}. One seed shows no noise: no difference can be tested."
    groups = []
    for found, words in ((True, "beyond seed noise"), (False, "within seed noise")):
        group = [item for item in verdict.comparisons if item.distinguishable is found]
        if group:
            groups.append(f"{words}: " + ", ".join(map(_in_words, group)))
    resolution = (
        f" With {verdict.seeds} seeds, differences below about {_number(verdict.resolution)} would hardly show."
        if verdict.resolution
        else ""
    )
    return (
        f"{start} Compared with {base}, over {verdict.seeds} seeds with a seed std of {_number(verdict.noise)}, "
        f"{'; '.join(groups)}.{resolution}"
    )


def _in_words(item: Comparison) -> str:
    if item.difference == 0:
        return f"{item.name} is equal"
    size = f"{abs(item.effect):.1f} seed std" if item.effect is not None else "no spread"
    p = "" if item.adjusted is None else ", p < 0.001" if item.adjusted < 0.001 else f", p = {item.adjusted:.2g}"
    return f"{item.name} is {_number(abs(item.difference))} {'better' if item.difference < 0 else 'worse'} ({size}{p})"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.2g}"
