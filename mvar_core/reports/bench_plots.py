"""Pictures of measured cost: memory and speed against the batch, and attention's time against the side of a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvar_core.errors import DataError
from mvar_core.reports.plots import new_figure, save_figure

COLOURS = ("#c44e52", "#2a6fbb", "#7a7a7a", "#4c9f70", "#8c6bb1", "#d98c21")
"""Told apart by people who see colours differently, and legible on white; the markers differ too."""
PLACES = {"VAR": 0, "MVAR": 1, "VAR, published style": 2}
"""Models that look the same in every picture."""
MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_batches(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Peak memory and images per second against the batch size, one line per model.

    Args:
        rows: With name, batch_size, peak_memory_bytes and images_per_second; rows without figures are left out.
        path: A .png or .svg file.
        title: Above the picture.

    Raises:
        DataError: No row has figures.
    """
    drawn = [row for row in rows if row["seconds"] is not None]
    if not drawn:
        raise DataError(f"There is nothing to draw in {path.name}: no row was measured.")
    figure = new_figure(9.2, 4.2)
    memory, speed = figure.subplots(1, 2)
    batches = sorted({row["batch_size"] for row in drawn})
    names = list(dict.fromkeys(row["name"] for row in drawn))
    others = [name for name in names if name not in PLACES]
    for name in names:
        own = sorted((row for row in drawn if row["name"] == name), key=lambda row: row["batch_size"])
        sizes = [row["batch_size"] for row in own]
        style = _style(PLACES[name] if name in PLACES else len(PLACES) + others.index(name))
        memory.plot(sizes, [row["peak_memory_bytes"] / 2**30 for row in own], label=name, **style)
        speed.plot(sizes, [row["images_per_second"] for row in own], label=name, **style)
    memory.set_ylabel("peak memory (GiB)")
    memory.set_title("Memory")
    speed.set_ylabel("images per second")
    speed.set_title("Throughput")
    for axes in (memory, speed):
        if len(batches) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xlabel("batch size (images)")
        axes.grid(alpha=0.3)
    memory.legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_attention(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds of one attention call against the side of the scale, one panel per window, one line per backend.

    Args:
        rows: As `attention_sweep.sweep` gives them; only those of the largest batch are drawn.
        path: A .png or .svg file.

    Raises:
        DataError: No row has figures.
    """
    batch = max((row["batch"] for row in rows), default=0)
    drawn = [row for row in rows if row["seconds"] is not None and row["batch"] == batch]
    if not drawn:
        raise DataError(f"There is nothing to draw in {path.name}: no row was measured.")
    windows = sorted({row["window"] for row in drawn})
    backends = list(dict.fromkeys(row["backend"] for row in drawn))
    figure = new_figure(max(5.2, 4.2 * len(windows)), 4.2)
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for axes, window in zip(panels, windows, strict=True):
        shown = [row for row in drawn if row["window"] == window]
        ticks = {row["tokens"] ** 0.5: _side(row) for row in shown}
        for order, backend in enumerate(backends):
            own = sorted((row for row in shown if row["backend"] == backend), key=lambda row: row["tokens"])
            sides = [row["tokens"] ** 0.5 for row in own]
            axes.plot(sides, [1000 * row["seconds"] for row in own], label=backend, **_style(order))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set_xlabel("side of the scale (tokens)")
        axes.set_title(f"{window}×{window} window" if window else "whole scale")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(frameon=False)
    images = f"{batch} image" + ("s" if batch > 1 else "")
    figure.suptitle(f"Attention of one layer, {images}, {drawn[0]['dtype']} on {drawn[0]['device']}")
    save_figure(figure, path)


def _side(row: Mapping[str, Any]) -> str:
    side = row["side"]
    return str(side) if isinstance(side, int) else "×".join(map(str, side))


def _style(order: int) -> dict[str, Any]:
    return {
        "color": COLOURS[order % len(COLOURS)],
        "marker": MARKERS[order % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }
