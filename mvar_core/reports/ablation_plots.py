"""The picture of an ablation: quality against cost, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvar_core.errors import DataError
from mvar_core.reports.figures import COLOURS, MARKERS, new_figure, save_figure


@dataclass(frozen=True)
class Point:
    """One setting in one panel.

    Attributes:
        label: The setting.
        cost: Where it stands on the horizontal axis.
        values: Its quality on each seed.
        mean: Their mean.
        std: Their standard deviation; None of a single seed.
    """

    label: str
    cost: float
    values: tuple[float, ...]
    mean: float
    std: float | None


def plot_ablations(
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    paths: Sequence[Path],
    *,
    title: str,
    cost_name: str,
    levels: Mapping[str, tuple[str, float]] | None = None,
) -> None:
    """One column per ablation, one row per quality: mean with its standard deviation, and each seed as a small dot.

    Args:
        panels: Points by title of the ablation, then by name of the quality; lower is better everywhere.
        paths: Files to write, .png or .svg.
        title: Above the picture.
        cost_name: Below the horizontal axes.
        levels: A name and a value to draw as a line, by quality: what samples are compared with.

    Raises:
        DataError: No ablation has points.
    """
    qualities = list(dict.fromkeys(name for found in panels.values() for name, points in found.items() if points))
    if not qualities:
        raise DataError("There is nothing to draw: no row has figures.")
    figure = new_figure(0.8 + 4.9 * len(panels), 0.9 + 3.1 * len(qualities))
    grid = figure.subplots(len(qualities), len(panels), squeeze=False, sharey="row")
    for column, (ablation, found) in enumerate(panels.items()):
        for row, quality in enumerate(qualities):
            axes = grid[row][column]
            for order, point in enumerate(found.get(quality, ())):
                colour, marker = COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)]
                axes.errorbar(
                    point.cost, point.mean, yerr=point.std, fmt=marker, color=colour, markersize=9, capsize=4,
                    linewidth=1.4, label=point.label,
                )  # fmt: skip
                axes.plot(
                    [point.cost] * len(point.values), point.values, "o", color=colour, markersize=5,
                    markeredgecolor="white", markeredgewidth=0.8, zorder=3,
                )  # fmt: skip
            if levels and quality in levels:
                name, value = levels[quality]
                axes.axhline(value, color="#555555", linewidth=1, linestyle=":")
                axes.annotate(name, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                              fontsize=8, color="#555555")  # fmt: skip
            axes.grid(alpha=0.3)
            axes.margins(x=0.12)
            if row == 0:
                axes.set_title(ablation)
                axes.legend(frameon=False, fontsize=8)
            if row == len(qualities) - 1:
                axes.set_xlabel(cost_name)
            if column == 0:
                axes.set_ylabel(f"{quality} (lower is better)")
    figure.suptitle(title)
    for path in paths:
        save_figure(figure, path)
