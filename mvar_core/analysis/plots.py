"""Pictures of attention statistics and of training, as PNG files. matplotlib is loaded when the first is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvar_core.errors import DataError
from mvar_core.files import atomic_path

if TYPE_CHECKING:
    from mvar_core.analysis.locality import LocalityReport

LABELLED_CELLS = 16
"""A heat map of at most so many scales carries numbers in its cells."""


def plot_locality(report: LocalityReport, directory: Path) -> dict[str, Path]:
    """Draw all pictures of a report.

    Returns:
        Name of each picture and its file: scale_mass, window_mass.
    """
    paths = {"scale_mass": directory / "scale_mass.png", "window_mass": directory / "window_mass.png"}
    plot_scale_mass(report, paths["scale_mass"])
    plot_window_mass(report, paths["window_mass"])
    return paths


def plot_scale_mass(report: LocalityReport, path: Path) -> None:
    """Heat map: where the attention of each scale's tokens goes, by key scale."""
    mass_SS = report.scale_mass
    scales = len(mass_SS)
    names = _scale_names(report)
    side = max(4.2, 0.56 * scales + 1.6)
    figure = new_figure(side + 1.6, side)
    axes = figure.add_subplot()
    future_SS = np.triu(np.ones_like(mass_SS, dtype=bool), k=1)
    image = axes.imshow(np.ma.masked_array(mass_SS, future_SS), cmap="viridis", vmin=0, vmax=1)
    axes.set_facecolor("#eeeeee")
    axes.set_xticks(range(scales), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(scales), names)
    axes.set_xlabel("scale of the keys (side in tokens)")
    axes.set_ylabel("scale of the queries (side in tokens)")
    axes.set_title("Attention mass by scale")
    if scales <= LABELLED_CELLS:
        for query in range(scales):
            for key in range(query + 1):
                value = mass_SS[query, key]
                if value < 0.005:
                    continue
                text = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
                axes.text(key, query, text, ha="center", va="center", size=8, color="black" if value > 0.6 else "white")
    figure.colorbar(image, ax=axes, shrink=0.8, label="mean attention mass")
    save_figure(figure, path)


def plot_window_mass(report: LocalityReport, path: Path) -> None:
    """Curves, one per scale: part of the scale's own attention within a k×k window, over k."""
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()
    share = report.window_share
    windows = sorted(share)
    names = _scale_names(report)
    grids = [size if isinstance(size, tuple) else (size, size) for size in report.patch_sizes]
    shown = [scale for scale, grid in enumerate(grids) if max(grid) > 1]
    widest = 3
    for order, scale in enumerate(shown):
        covered = [k for k in windows if k < max(grids[scale])]
        covered += [k for k in windows if k >= max(grids[scale])][:1]  # the first that holds the whole scale
        widest = max(widest, covered[-1])
        colour = _colour(order, len(shown))
        values = [share[k][scale] for k in covered]
        axes.plot(covered, values, color=colour, marker="o", markersize=4, label=names[scale])
    keep = report.recommended.keep
    axes.axhline(keep, color="#888888", linestyle="--", linewidth=1, label=f"{keep:g} kept")
    axes.set_xticks(windows)
    axes.set_xlim(0.5, widest + 0.5)
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("window side k (tokens)")
    axes.set_ylabel("part of the scale's own mass")
    axes.set_title("Attention within a k×k window of the own scale")
    axes.grid(alpha=0.3)
    axes.legend(title="scale", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save_figure(figure, path)


def plot_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "loss",
) -> None:
    """Lines over steps, for example losses.

    Args:
        series: Name of each line and its (steps, values).
        path: The PNG to write.
        title: Above the picture.
        x_label: Below the horizontal axis.
        y_label: Beside the vertical axis.

    Raises:
        DataError: No line has a point.
    """
    drawn = {name: points for name, points in series.items() if len(points[0])}
    if not drawn:
        raise DataError(f"There is nothing to draw in {path.name}: no values of {', '.join(series) or 'anything'}.")
    figure = new_figure(7.2, 4.0)
    axes = figure.add_subplot()
    for order, (name, (steps, values)) in enumerate(drawn.items()):
        marker = "o" if len(steps) < 12 else None
        axes.plot(
            steps, values, color=_colour(order, len(drawn)), linewidth=1.4, marker=marker, markersize=4, label=name
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        axes.legend(frameon=False)
    save_figure(figure, path)


def plot_metrics(
    metrics: Path,
    path: Path,
    *,
    keys: Sequence[str] = ("loss", "val_loss"),
    title: str = "Training",
    y_label: str = "loss",
) -> None:
    """Draw some quantities of a run's metrics.jsonl over its steps.

    Raises:
        DataError: The file is missing or damaged, or has none of the quantities.
    """
    plot_curves({key: read_metric(metrics, key) for key in keys}, path, title=title, y_label=y_label)


def read_metric(metrics: Path, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a metrics.jsonl; lines without it are passed over.

    Raises:
        DataError: The file is missing, or a line is not a JSON object.
    """
    if not metrics.is_file():
        raise DataError(f"{metrics} does not exist.", "Give the metrics.jsonl of a run directory.")
    steps: list[float] = []
    values: list[float] = []
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{metrics}, line {number} is not JSON: {error}.") from None
        if not isinstance(entry, dict):
            raise DataError(f"{metrics}, line {number} is not a JSON object.")
        if entry.get(key) is not None and entry.get("step") is not None:
            steps.append(float(entry["step"]))
            values.append(float(entry[key]))
    return steps, values


def _scale_names(report: LocalityReport) -> list[str]:
    return [f"{size[0]}×{size[1]}" if isinstance(size, tuple) else str(size) for size in report.patch_sizes]


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches, which no global state knows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colour(order: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * order / max(1, count - 1))


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, as SVG where the name ends so, otherwise as PNG."""
    # The format is given because the temporary name does not end like the final one.
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=140)
