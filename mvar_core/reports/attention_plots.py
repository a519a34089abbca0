"""The figures of an attention report, as PNG and SVG files. matplotlib is loaded when the first is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvar_core.analysis.locality_report import LocalityReport
from mvar_core.analysis.recommendation import part_of
from mvar_core.reports.figure_style import LIGHT, Palette, drawing
from mvar_core.reports.plots import new_figure, save_figure

LABELLED_CELLS = 200
"""A heat map of at most so many cells carries numbers in them."""

MOST_TIMES = 5
"""Colours of the last scale's maps end at 2 to the power of this, above and below an even spread."""


def plot_locality(report: LocalityReport, directory: Path, palette: Palette = LIGHT) -> dict[str, Path]:
    """Draw all figures of a report, each as PNG and as SVG beside it.

    Returns:
        Name of each figure and its PNG file: scale_mass (which scales are looked at), window_mass (how near),
        last_scale (where in each scale the last scale looks), layers (what layers do).
    """
    return {name: _plot(name, report, directory, palette) for name in FIGURES}


def plot_lines(report: LocalityReport) -> int:
    """How many ordered lines the figure of windows has, for its colours."""
    return len(_scales_with_neighbours(report))


def _plot(name: str, report: LocalityReport, directory: Path, palette: Palette) -> Path:
    path = directory / f"{name}.png"
    with drawing(name, palette):
        figure = FIGURES[name](report, palette)
        save_figure(figure, path)
        figure.set_layout_engine("none")  # it stands already, and laying out takes longer than drawing
        save_figure(figure, path.with_suffix(".svg"))
    return path


def draw_scale_mass(report: LocalityReport, palette: Palette) -> Any:
    """Heat map: where the attention of each scale's tokens goes, by key scale."""
    mass_SS = report.scale_mass
    scales = len(mass_SS)
    side = max(4.0, 0.5 * scales + 1.4)
    figure = new_figure(side + 1.3, side)
    axes = figure.add_subplot()
    _heat_map(figure, axes, mass_SS, np.triu(np.ones_like(mass_SS, dtype=bool), k=1), "part of the attention")
    _scale_ticks(axes, report.scale_names, "x")
    _scale_ticks(axes, report.scale_names, "y")
    axes.set_xlabel("scale that is looked at (side in tokens)")
    axes.set_ylabel("scale that looks (side in tokens)")
    axes.set_title("Attention across scales")
    return figure


def draw_window_mass(report: LocalityReport, palette: Palette) -> Any:
    """Curves over k, one per scale: part of the mass in one scale that falls within k×k around the matching position.

    On the left in the own scale, on the right, where the model sees it, in the scale before.
    """
    shown = _scales_with_neighbours(report)
    before = [scale for scale in shown if scale and report.even_scale_mass[scale, scale - 1]]
    panels: list[tuple[str, list[int], int]] = [("own scale", shown, 0)]
    if any(max(report.pyramid.grids[scale - 1]) > 1 for scale in before):
        panels.append(("scale before", before, 1))
    figure = new_figure(4.6 * len(panels) + 1.4, 4.2)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    mass, even = report.window_mass_by_scale, report.even_window_mass
    for axes, (title, scales, back) in zip(all_axes, panels, strict=True):
        widest = 3
        for scale in scales:
            side = max(report.pyramid.grids[scale - back])
            covered = [k for k in mass if k < side] + [k for k in mass if k >= side][:1]
            widest = max(widest, covered[-1])
            values = [part_of(mass[k], report.scale_mass)[scale, scale - back] for k in covered]
            colour = palette.line(shown.index(scale), len(shown))
            label = report.scale_names[scale] if back == 0 else None
            axes.plot(covered, values, color=colour, marker="o", markersize=4, label=label)
        last = scales[-1]
        spread = [part_of(even[k], report.even_scale_mass)[last, last - back] for k in mass if k <= widest]
        label = f"{report.scale_names[last]}, even spread" if back == 0 else None
        axes.plot(list(mass)[: len(spread)], spread, color=palette.faint, linestyle="--", linewidth=1.2, label=label)
        axes.set_xticks([k for k in mass if k <= widest])
        axes.set_xlim(0.5, widest + 0.5)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("window side k (tokens)")
        axes.set_title(f"Within k×k of the {title}")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("part of the attention to that scale")
    figure.legend(title="scale that looks", loc="outside right center", frameon=False)
    return figure


def draw_last_scale(report: LocalityReport, palette: Palette) -> Any:
    """Maps of the last scale's attention to every scale that it sees, as multiples of an even spread.

    Above by where the key is; below by where it is from the matching position of the query, which is marked.
    """
    from matplotlib.colors import TwoSlopeNorm

    seen = [scale for scale, mass in enumerate(report.even_scale_mass[-1]) if mass]
    maps = [[_above_even(report, scale, by_place) for scale in seen] for by_place in (True, False)]
    largest = max(float(np.abs(values.filled(0)).max()) for row in maps for values in row)
    limit = min(MOST_TIMES, max(1.0, np.ceil(largest)))
    norm = TwoSlopeNorm(0, -limit, limit)
    figure = new_figure(max(4.6, 1.15 * len(seen) + 1.5), 3.5 if len(seen) > 4 else 4.6)
    grid = figure.subplots(2, len(seen), squeeze=False)
    image = None
    for row, by_place in enumerate((True, False)):
        for axes, scale, values in zip(grid[row], seen, maps[row], strict=True):
            image = axes.imshow(values.clip(-limit, limit), cmap="RdBu_r", norm=norm, interpolation="none")
            axes.set_xticks([])
            axes.set_yticks([])
            if by_place:
                axes.set_title(f"{report.pyramid.grids[scale]}\n{_short(report.scale_mass[-1, scale])}", fontsize=9)
            else:
                height, width = report.pyramid.grids[scale]
                axes.plot(width - 1, height - 1, "+", color="#000000", markersize=5, markeredgewidth=0.7)
    grid[0][0].set_ylabel("by place", fontsize=9)
    grid[1][0].set_ylabel("from the\nmatching place", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=list(grid.flat), shrink=0.8, pad=0.02)
    step = 1 if limit < 4 else 2
    powers = [step * times for times in range(-int(limit // step), int(limit // step) + 1)]
    bar.set_ticks(powers, labels=[f"{2**power}" if power >= 0 else f"1/{2**-power}" for power in powers])
    bar.set_label("times an even spread")
    figure.suptitle(f"Where the last scale ({report.pyramid.grids[-1]}) looks", fontsize=11)
    return figure


def draw_layers(report: LocalityReport, palette: Palette) -> Any:
    """Heat maps of layer × scale: mass in the own scale, and entropy as a part of the most there can be."""
    own_NS = np.diagonal(report.scale_mass_by_head.mean(axis=1), axis1=1, axis2=2)
    most_S = report.even_entropy
    entropy_NS = report.entropy_by_head.mean(axis=1)
    spread_NS = np.divide(entropy_NS, most_S, out=np.zeros_like(entropy_NS), where=most_S > 0)
    layers, scales = own_NS.shape
    figure = new_figure(2 * max(3.2, 0.42 * scales + 1.2) + 1, max(2.6, 0.3 * layers + 1.5))
    left, right = figure.subplots(1, 2)
    _heat_map(figure, left, own_NS, np.zeros_like(own_NS, dtype=bool), "part of the attention")
    _heat_map(figure, right, spread_NS, np.broadcast_to(most_S == 0, own_NS.shape), "entropy over its most")
    left.set_title("On the own scale")
    right.set_title("How evenly it is spread")
    step = max(1, layers // 12)
    for axes in (left, right):
        _scale_ticks(axes, report.scale_names, "x")
        axes.set_yticks(range(0, layers, step), [str(layer + 1) for layer in range(0, layers, step)])
        axes.set_xlabel("scale that looks (side in tokens)")
        axes.set_ylabel("layer")
    return figure


FIGURES: dict[str, Callable[[LocalityReport, Palette], Any]] = {
    "scale_mass": draw_scale_mass,
    "window_mass": draw_window_mass,
    "last_scale": draw_last_scale,
    "layers": draw_layers,
}
"""How each figure is drawn, by its name."""


def _scales_with_neighbours(report: LocalityReport) -> list[int]:
    shown = [scale for scale, grid in enumerate(report.pyramid) if max(grid) > 1]
    return shown or [len(report.patch_sizes) - 1]


def _above_even(report: LocalityReport, scale: int, by_place: bool) -> np.ma.MaskedArray:
    """Binary logarithm of attention to a key over what an even spread gives it; masked where nothing can be."""
    if by_place:
        mass, even = report.last_scale_keys[scale], report.even_keys(scale)
    else:
        mass, even = report.last_scale_displacements[scale], report.even_displacements(scale)
    per_key = np.divide(mass, even, out=np.zeros_like(mass), where=even > 0)
    nothing = per_key <= 0
    return np.ma.masked_array(np.log2(np.where(nothing, 1, per_key)), nothing)


def _heat_map(figure: Any, axes: Any, values: np.ndarray, hidden: np.ndarray, label: str) -> None:
    """A matrix of parts, 0 to 1, with numbers in its cells where there are few enough of them."""
    shown = np.ma.masked_array(values, hidden)
    image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="none")
    if values.size <= LABELLED_CELLS:
        for (row, column), value in np.ndenumerate(values):
            if not hidden[row, column] and value >= 0.005:
                colour = "#000000" if value > 0.6 else "#ffffff"
                axes.text(
                    column,
                    row,
                    _short(value),
                    ha="center",
                    va="center",
                    size=8 if values.size <= 120 else 7,
                    color=colour,
                )
    figure.colorbar(image, ax=axes, shrink=0.85, label=label)


def _scale_ticks(axes: Any, names: Sequence[str], axis: str) -> None:
    long = max(map(len, names)) > 3
    if axis == "x":
        axes.set_xticks(range(len(names)), names, rotation=90 if long else 0)
    else:
        axes.set_yticks(range(len(names)), names)


def _short(value: float) -> str:
    """Two decimals without the leading zero."""
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
