"""The figures of an attention report, as PNG and SVG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvar_core.analysis.attention import AttentionReport
from mvar_core.analysis.recommendation import share_of
from mvar_core.reports.figures import LIGHT, Palette, new_figure, save_figure, style

LABELLED_CELLS = 200
"""A heat map of at most this many cells shows numbers in them."""

MOST_TIMES = 5
"""Colours of the last scale's maps end at 2 to the power of this, above and below an even spread."""


def plot_attention_report(report: AttentionReport, directory: Path, palette: Palette = LIGHT) -> dict[str, Path]:
    """Make all figures of a report, each as PNG and as SVG.

    Returns:
        Name of each figure and its PNG file: scale_mass (which scales are attended to), window_mass (how near),
        last_scale (where in each scale the last scale attends to), layers (how layers differ).
    """
    paths = {}
    for name, draw in FIGURES.items():
        paths[name] = path = directory / f"{name}.png"
        with style(name, palette):
            figure = draw(report, palette)
            save_figure(figure, path)
            figure.set_layout_engine("none")  # it is laid out already, which takes longer than drawing
            save_figure(figure, path.with_suffix(".svg"))
    return paths


def line_count(report: AttentionReport) -> int:
    """How many ordered lines the figure of windows has, for its colours."""
    return len(_scales_with_neighbours(report))


def draw_scale_mass(report: AttentionReport, palette: Palette) -> Any:
    """Heat map: where the attention of each scale's tokens goes, by key scale."""
    mass_SS = report.scale_mass
    scales = len(mass_SS)
    side = max(4.0, 0.5 * scales + 1.4)
    figure = new_figure(side + 1.3, side)
    axes = figure.add_subplot()
    _heat_map(figure, axes, mass_SS, np.triu(np.ones_like(mass_SS, dtype=bool), k=1), "fraction of the attention")
    _scale_ticks(axes, report.scale_names, "x")
    _scale_ticks(axes, report.scale_names, "y")
    axes.set_xlabel("attended scale (side in tokens)")
    axes.set_ylabel("scale of the queries (side in tokens)")
    axes.set_title("Attention across scales")
    return figure


def draw_window_mass(report: AttentionReport, palette: Palette) -> Any:
    """Curves over k, one per scale: the fraction of mass in one scale within k×k around the matching position.

    On the left in the queries' own scale, on the right, where the model sees it, in the scale before.
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
            values = [share_of(mass[k], report.scale_mass)[scale, scale - back] for k in covered]
            colour = palette.line(shown.index(scale), len(shown))
            label = report.scale_names[scale] if back == 0 else None
            axes.plot(covered, values, color=colour, marker="o", markersize=4, label=label)
        last = scales[-1]
        spread = [share_of(even[k], report.even_scale_mass)[last, last - back] for k in mass if k <= widest]
        label = f"{report.scale_names[last]}, even spread" if back == 0 else None
        axes.plot(list(mass)[: len(spread)], spread, color=palette.faint, linestyle="--", linewidth=1.2, label=label)
        axes.set_xticks([k for k in mass if k <= widest])
        axes.set_xlim(0.5, widest + 0.5)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("window side k (tokens)")
        axes.set_title(f"Within k×k of the {title}")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("fraction of the attention to that scale")
    figure.legend(title="queries of scale", loc="outside right center", frameon=False)
    return figure


def draw_last_scale(report: AttentionReport, palette: Palette) -> Any:
    """Maps of the last scale's attention to every scale that it sees, as multiples of an even spread.

    Above by the key's position; below by its displacement from the query's matching position, which is marked.
    """
    from matplotlib.colors import TwoSlopeNorm

    seen = [scale for scale, mass in enumerate(report.even_scale_mass[-1]) if mass]
    maps = [[_above_even(report, scale, by_position) for scale in seen] for by_position in (True, False)]
    largest = max(float(np.abs(values.filled(0)).max()) for row in maps for values in row)
    limit = min(MOST_TIMES, max(1.0, np.ceil(largest)))
    norm = TwoSlopeNorm(0, -limit, limit)
    figure = new_figure(max(4.6, 1.15 * len(seen) + 1.5), 3.5 if len(seen) > 4 else 4.6)
    grid = figure.subplots(2, len(seen), squeeze=False)
    image = None
    for row, by_position in enumerate((True, False)):
        for axes, scale, values in zip(grid[row], seen, maps[row], strict=True):
            image = axes.imshow(values.clip(-limit, limit), cmap="RdBu_r", norm=norm, interpolation="none")
            axes.set_xticks([])
            axes.set_yticks([])
            if by_position:
                axes.set_title(f"{report.pyramid.grids[scale]}\n{_short(report.scale_mass[-1, scale])}", fontsize=9)
            else:
                height, width = report.pyramid.grids[scale]
                axes.plot(width - 1, height - 1, "+", color="#000000", markersize=5, markeredgewidth=0.7)
    grid[0][0].set_ylabel("by position", fontsize=9)
    grid[1][0].set_ylabel("from the\nmatching position", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=list(grid.flat), shrink=0.8, pad=0.02)
    step = 1 if limit < 4 else 2
    powers = [step * times for times in range(-int(limit // step), int(limit // step) + 1)]
    bar.set_ticks(powers, labels=[f"{2**power}" if power >= 0 else f"1/{2**-power}" for power in powers])
    bar.set_label("times an even spread")
    figure.suptitle(f"What the last scale ({report.pyramid.grids[-1]}) attends to", fontsize=11)
    return figure


def draw_layers(report: AttentionReport, palette: Palette) -> Any:
    """Heat maps of layer × scale: mass in the own scale, and entropy as a fraction of its maximum."""
    own_NS = np.diagonal(report.scale_mass_by_head.mean(axis=1), axis1=1, axis2=2)
    most_S = report.even_entropy
    entropy_NS = report.entropy_by_head.mean(axis=1)
    spread_NS = np.divide(entropy_NS, most_S, out=np.zeros_like(entropy_NS), where=most_S > 0)
    layers, scales = own_NS.shape
    figure = new_figure(2 * max(3.2, 0.42 * scales + 1.2) + 1, max(2.6, 0.3 * layers + 1.5))
    left, right = figure.subplots(1, 2)
    _heat_map(figure, left, own_NS, np.zeros_like(own_NS, dtype=bool), "fraction of the attention")
    _heat_map(figure, right, spread_NS, np.broadcast_to(most_S == 0, own_NS.shape), "entropy / maximum")
    left.set_title("On the own scale")
    right.set_title("How evenly it is spread")
    step = max(1, layers // 12)
    for axes in (left, right):
        _scale_ticks(axes, report.scale_names, "x")
        axes.set_yticks(range(0, layers, step), [str(layer + 1) for layer in range(0, layers, step)])
        axes.set_xlabel("scale of the queries (side in tokens)")
        axes.set_ylabel("layer")
    return figure


FIGURES: dict[str, Callable[[AttentionReport, Palette], Any]] = {
    "scale_mass": draw_scale_mass,
    "window_mass": draw_window_mass,
    "last_scale": draw_last_scale,
    "layers": draw_layers,
}
"""The function that makes each figure."""


def _scales_with_neighbours(report: AttentionReport) -> list[int]:
    shown = [scale for scale, grid in enumerate(report.pyramid) if max(grid) > 1]
    return shown or [len(report.patch_sizes) - 1]


def _above_even(report: AttentionReport, scale: int, by_position: bool) -> np.ma.MaskedArray:
    """Binary logarithm of the attention to a key relative to an even spread; masked where there can be none."""
    if by_position:
        mass, even = report.last_scale_keys[scale], report.even_keys(scale)
    else:
        mass, even = report.last_scale_displacements[scale], report.even_displacements(scale)
    per_key = np.divide(mass, even, out=np.zeros_like(mass), where=even > 0)
    nothing = per_key <= 0
    return np.ma.masked_array(np.log2(np.where(nothing, 1, per_key)), nothing)


def _heat_map(figure: Any, axes: Any, values: np.ndarray, hidden: np.ndarray, label: str) -> None:
    """A matrix of values from 0 to 1, with numbers in its cells if there are few enough."""
    shown = np.ma.masked_array(values, hidden)
    image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="none")
    if values.size <= LABELLED_CELLS:
        for (row, column), value in np.ndenumerate(values):
            if not hidden[row, column] and value >= 0.005:
                colour = "#000000" if value > 0.6 else "#ffffff"
                size = 8 if values.size <= 120 else 7
                axes.text(column, row, _short(value), ha="center", va="center", size=size, color=colour)
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
