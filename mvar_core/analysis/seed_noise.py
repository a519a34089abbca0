"""What differences between settings mean next to the noise of seeds: Welch's test, Holm's correction, in words.

Letters: n seeds, m comparisons of one table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.05
"""Probability of calling any difference of a table real where none is."""


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
