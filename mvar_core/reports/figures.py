"""Figures: one look for all of them. matplotlib is loaded with the first figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvar_core.errors import DataError
from mvar_core.io.files import atomic_path
from mvar_core.training.metrics import read_metrics

COLOURS = ("#c44e52", "#2a6fbb", "#7a7a7a", "#4c9f70", "#8c6bb1", "#d98c21")
"""Distinct for people with colour vision deficiencies, and legible on white; the markers differ too."""
MARKERS = ("o", "s", "^", "D", "v", "P")
MODELS = ("VAR", "MVAR", "VAR, published style")
"""Models that look the same in every figure."""
FAINT = "#8a8a89"


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches, without global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, as SVG where the name ends so, otherwise as PNG; the same figure is the same bytes."""
    from matplotlib import rc_context

    # The format is explicit because the temporary name does not end like the final one.
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    with rc_context({"svg.hashsalt": path.stem}), atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=140, metadata={"Date": None} if kind == "svg" else None)


def ordered_colours(count: int) -> list[Any]:
    """Colours of lines that have an order, dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * order / max(1, count - 1)) for order in range(count)]


def plot_metrics(
    metrics: Path, path: Path, *, keys: Sequence[str] = ("loss", "val_loss"), title: str = "Training"
) -> None:
    """Plot some quantities of a run's metrics.jsonl over its steps, in a .png or .svg."""
    if not metrics.is_file():
        raise DataError(f"{metrics} does not exist.", "Pass the metrics.jsonl of a run directory.")
    lines = read_metrics(metrics)
    shown = {key: known for key in keys if (known := [line for line in lines if line.get(key) is not None])}
    if not shown:
        raise DataError(f"There is nothing to plot in {path.name}: no values of {', '.join(keys)}.")
    figure = new_figure(7.2, 4.0)
    axes = figure.add_subplot()
    for (key, known), colour in zip(shown.items(), ordered_colours(len(shown)), strict=True):
        steps, values = ([line[name] for line in known] for name in ("step", key))
        marker = "o" if len(steps) < 12 else None
        axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=4, label=key)
    _label(axes, "step", "loss", title)
    if len(shown) > 1:
        axes.legend(frameon=False)
    save_figure(figure, path)


def plot_batches(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Peak memory and images per second against the batch size, one line per model, of `rows` of `bench`."""
    measured = _measured(rows, path)
    figure = new_figure(9.2, 4.2)
    batches = sorted({row["batch_size"] for row in measured})
    names = list(dict.fromkeys(row["name"] for row in measured))
    styles = {name: order for order, name in enumerate(dict.fromkeys([*MODELS, *names]))}
    memory, throughput = figure.subplots(1, 2)
    for axes, key, unit, y_label, heading in (
        (memory, "peak_memory_bytes", 2**30, "peak memory (GiB)", "Memory"),
        (throughput, "images_per_second", 1, "images per second", "Throughput"),
    ):
        for name in names:
            points = [(row["batch_size"], row[key] / unit) for row in measured if row["name"] == name]
            _line(axes, points, name, styles[name])
        if len(batches) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        _label(axes, "batch size (images)", y_label, heading)
    memory.legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_attention(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds of one attention call against the side of the scale, one panel per window, one line per backend.

    Of `rows` of `attention_sweep.sweep` only those of the largest batch are plotted.
    """
    batch = max((row["batch"] for row in rows), default=0)
    measured = _measured([row for row in rows if row["batch"] == batch], path)
    windows = sorted({row["window"] for row in measured})
    figure = new_figure(max(5.2, 4.2 * len(windows)), 4.2)
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for axes, window in zip(panels, windows, strict=True):
        shown = [row for row in measured if row["window"] == window]
        for order, backend in enumerate(dict.fromkeys(row["backend"] for row in measured)):
            points = [(row["tokens"] ** 0.5, 1000 * row["seconds"]) for row in shown if row["backend"] == backend]
            _line(axes, points, backend, order)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = {row["tokens"] ** 0.5: str(row["side"]).strip("[]").replace(", ", "×") for row in shown}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        heading = f"{window}×{window} window" if window else "whole scale"
        _label(axes, "side of the scale (tokens)", "milliseconds" if axes is panels[0] else "", heading)
    panels[0].legend(frameon=False)
    images = f"{batch} image" + ("s" if batch > 1 else "")
    figure.suptitle(f"Attention of one layer, {images}, {measured[0]['dtype']} on {measured[0]['device']}")
    save_figure(figure, path)


def _measured(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Mapping[str, Any]]:
    measured = [row for row in rows if row["seconds"] is not None]
    if not measured:
        raise DataError(f"There is nothing to plot in {path.name}: no row was measured.")
    return measured


def _line(axes: Any, points: Sequence[tuple[float, float]], label: str, order: int) -> None:
    colour, marker = COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)]
    xs, ys = ([point[axis] for point in sorted(points)] for axis in (0, 1))
    axes.plot(xs, ys, label=label, color=colour, marker=marker, markersize=5, linewidth=1.6)


def _label(axes: Any, x_label: str, y_label: str, title: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
