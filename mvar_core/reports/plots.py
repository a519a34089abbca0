"""Pictures of training, and what all pictures share. matplotlib is loaded when the first is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvar_core.errors import DataError
from mvar_core.io.files import atomic_path


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
        # Without the date the same figure is the same bytes.
        figure.savefig(temporary, format=kind, dpi=140, metadata={"Date": None} if kind == "svg" else None)
