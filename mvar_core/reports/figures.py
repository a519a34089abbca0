"""Figures: one look for all of them, on light and dark pages. matplotlib is loaded with the first figure.

A figure is made once, in LIGHT. Its colours of text and lines occur nowhere else in it, so that in a page they can be
replaced by CSS variables, for which the page holds a light and a dark value (`colour_rules`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_core.errors import DataError
from mvar_core.io.files import atomic_path

COLOURS = ("#c44e52", "#2a6fbb", "#7a7a7a", "#4c9f70", "#8c6bb1", "#d98c21")
"""Distinct for people with colour vision deficiencies, and legible on white; the markers differ too."""
MARKERS = ("o", "s", "^", "D", "v", "P")
PLACES = {"VAR": 0, "MVAR": 1, "VAR, published style": 2}
"""Models that look the same in every figure."""


@dataclass(frozen=True)
class Palette:
    """Colours that depend on what is behind the figure.

    Attributes:
        ink: Text, ticks and axes.
        faint: Grid lines and lines to compare with.
        background: Behind the figure.
        lines: Positions of the first and the last of several ordered lines on the colour map viridis.
    """

    ink: str
    faint: str
    background: str
    lines: tuple[float, float]

    def line(self, order: int, count: int) -> str:
        """The colour of one of `count` ordered lines."""
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        first, last = self.lines
        return to_hex(colormaps["viridis"](first + (last - first) * order / max(1, count - 1)))

    def settings(self, name: str) -> dict[str, Any]:
        """Matplotlib's settings; a figure of the same `name` has the same bytes again."""
        return {
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color"),
                self.ink,
            ),
            "grid.color": self.faint,
            "axes.facecolor": "none",
            "figure.facecolor": self.background,
            "savefig.facecolor": self.background,
            "svg.hashsalt": name,
        }

    def variables(self, lines: int = 0) -> dict[str, str]:
        """CSS variables of the colours, `lines` ordered lines among them."""
        named = {"--ink": self.ink, "--faint": self.faint, "--background": self.background}
        return named | {f"--line-{order + 1}-of-{lines}": self.line(order, lines) for order in range(lines)}


LIGHT = Palette("#1b1b1a", "#8a8a89", "#fefefe", (0.0, 0.85))
DARK = Palette("#e6e6e5", "#8b8b8c", "#16181d", (0.3, 1.0))


@contextmanager
def style(name: str, palette: Palette = LIGHT) -> Iterator[None]:
    """Figures made and saved in the block have a palette's colours."""
    from matplotlib import rc_context

    with rc_context(palette.settings(name)):
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches, without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, as SVG where the name ends so, otherwise as PNG."""
    # The format is explicit because the temporary name does not end like the final one.
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    with atomic_path(path) as temporary:
        # Without the date the same figure is the same bytes.
        figure.savefig(temporary, format=kind, dpi=140, metadata={"Date": None} if kind == "svg" else None)


def page_svg(path: Path, label: str, lines: int = 0) -> str:
    """An SVG file as an element of a page; its ids start with the file's name, so that figures share none.

    Args:
        path: The file, made in LIGHT.
        label: What the figure shows, for screen readers.
        lines: How many ordered lines it has.
    """
    name, svg = path.stem, path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    width = re.search(r'<svg[^>]*?\bwidth="([\d.]+)pt"', svg)
    assert width is not None
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", opening)
    opening += f' role="img" aria-label="{label}" style="width:{float(width[1]) * 4 / 3:.0f}px"'
    for variable, value in LIGHT.variables(lines).items():
        rest = rest.replace(value, f"var({variable})")
    return f"{opening}>{rest}".strip()


def colour_rules(*lines: int) -> str:
    """The CSS that `page_svg` needs, light and dark, for figures of so many ordered lines each."""

    def declarations(palette: Palette) -> str:
        variables = {name: value for count in (0, *lines) for name, value in palette.variables(count).items()}
        return "".join(f"{name}:{value};" for name, value in variables.items())

    return f":root{{{declarations(LIGHT)}}}\n@media (prefers-color-scheme: dark){{:root{{{declarations(DARK)}}}}}"


def plot_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, title: str, y_label: str = "loss"
) -> int:
    """Lines over steps, for example losses.

    Args:
        series: Name of each line and its (steps, values); those without a point are left out.
        path: The .png or .svg to write.
        title: Above the figure.
        y_label: Of the vertical axis.

    Returns:
        The number of lines.

    Raises:
        DataError: No line has a point.
    """
    shown = {name: points for name, points in series.items() if len(points[0])}
    if not shown:
        raise DataError(f"There is nothing to plot in {path.name}: no values of {', '.join(series) or 'anything'}.")
    with style(path.stem):
        figure = new_figure(7.2, 4.0)
        axes = figure.add_subplot()
        for order, (name, (steps, values)) in enumerate(shown.items()):
            marker = "o" if len(steps) < 12 else None
            colour = LIGHT.line(order, len(shown))
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=4, label=name)
        _labelled(axes, "step", y_label, title)
        if len(shown) > 1:
            axes.legend(frameon=False)
        save_figure(figure, path)
    return len(shown)


def plot_metrics(
    metrics: Path, path: Path, *, keys: Sequence[str] = ("loss", "val_loss"), title: str = "Training"
) -> int:
    """Plot some quantities of a run's metrics.jsonl over its steps; see `plot_curves`.

    Raises:
        DataError: The file is missing or damaged, or has none of the quantities.
    """
    return plot_curves({key: read_metric(metrics, key) for key in keys}, path, title=title)


def read_metric(metrics: Path, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity in a metrics.jsonl; lines without it are skipped.

    Raises:
        DataError: The file is missing, or a line is not a JSON object.
    """
    if not metrics.is_file():
        raise DataError(f"{metrics} does not exist.", "Pass the metrics.jsonl of a run directory.")
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


def plot_batches(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Peak memory and images per second against the batch size, one line per model.

    Args:
        rows: With name, batch_size, peak_memory_bytes and images_per_second; rows without figures are left out.
        path: A .png or .svg file.
        title: Above the figure.

    Raises:
        DataError: No row has figures.
    """
    measured = _measured(rows, path)
    figure = new_figure(9.2, 4.2)
    memory, speed = figure.subplots(1, 2)
    batches = sorted({row["batch_size"] for row in measured})
    names = list(dict.fromkeys(row["name"] for row in measured))
    others = [name for name in names if name not in PLACES]
    for name in names:
        own = sorted((row for row in measured if row["name"] == name), key=lambda row: row["batch_size"])
        sizes = [row["batch_size"] for row in own]
        line = _line_style(PLACES[name] if name in PLACES else len(PLACES) + others.index(name))
        memory.plot(sizes, [row["peak_memory_bytes"] / 2**30 for row in own], label=name, **line)
        speed.plot(sizes, [row["images_per_second"] for row in own], label=name, **line)
    for axes, y_label, heading in (
        (memory, "peak memory (GiB)", "Memory"),
        (speed, "images per second", "Throughput"),
    ):
        if len(batches) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        _labelled(axes, "batch size (images)", y_label, heading)
    memory.legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_attention(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds of one attention call against the side of the scale, one panel per window, one line per backend.

    Args:
        rows: As `attention_sweep.sweep` returns them; only those of the largest batch are plotted.
        path: A .png or .svg file.

    Raises:
        DataError: No row has figures.
    """
    batch = max((row["batch"] for row in rows), default=0)
    measured = _measured([row for row in rows if row["batch"] == batch], path)
    windows = sorted({row["window"] for row in measured})
    backends = list(dict.fromkeys(row["backend"] for row in measured))
    figure = new_figure(max(5.2, 4.2 * len(windows)), 4.2)
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for axes, window in zip(panels, windows, strict=True):
        shown = [row for row in measured if row["window"] == window]
        for order, backend in enumerate(backends):
            own = sorted((row for row in shown if row["backend"] == backend), key=lambda row: row["tokens"])
            sides = [row["tokens"] ** 0.5 for row in own]
            axes.plot(sides, [1000 * row["seconds"] for row in own], label=backend, **_line_style(order))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = {row["tokens"] ** 0.5: _side(row["side"]) for row in shown}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        heading = f"{window}×{window} window" if window else "whole scale"
        _labelled(axes, "side of the scale (tokens)", "milliseconds" if axes is panels[0] else "", heading)
    panels[0].legend(frameon=False)
    images = f"{batch} image" + ("s" if batch > 1 else "")
    figure.suptitle(f"Attention of one layer, {images}, {measured[0]['dtype']} on {measured[0]['device']}")
    save_figure(figure, path)


def _measured(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Mapping[str, Any]]:
    measured = [row for row in rows if row["seconds"] is not None]
    if not measured:
        raise DataError(f"There is nothing to plot in {path.name}: no row was measured.")
    return measured


def _labelled(axes: Any, x_label: str, y_label: str, title: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(alpha=0.3)


def _side(side: int | Sequence[int]) -> str:
    return str(side) if isinstance(side, int) else "×".join(map(str, side))


def _line_style(order: int) -> dict[str, Any]:
    return {
        "color": COLOURS[order % len(COLOURS)],
        "marker": MARKERS[order % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }
