"""An attention report: its figures as PNG and SVG files, its page and its tables, from the content of report.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvar_core.analysis.attention import AttentionReport
from mvar_core.analysis.recommendation import share_of
from mvar_core.formatting import format_bytes
from mvar_core.pyramid import ScalePyramid
from mvar_core.reports.figures import FAINT, new_figure, ordered_colours, save_figure
from mvar_core.reports.pages import TableRows, svg_figure, write_page

LABELLED_CELLS = 200
"""A heat map of at most this many cells shows numbers in them."""
MOST_TIMES = 5
"""Colours of the last scale's maps end at 2 to the power of this, above and below an even spread."""


def plot_attention_report(report: AttentionReport, directory: Path) -> dict[str, Path]:
    """Make all figures of a report, each as PNG and as SVG; returns their names and PNG files."""
    paths = {name: directory / f"{name}.png" for name in FIGURES}
    for name, path in paths.items():
        figure = FIGURES[name](report)
        save_figure(figure, path)
        figure.set_layout_engine("none")  # it is laid out already, which takes longer than rendering
        save_figure(figure, path.with_suffix(".svg"))
    return paths


def scale_mass_figure(report: AttentionReport) -> Any:
    """Heat map: where the attention of each scale's tokens goes, by key scale."""
    mass_SS = report.scale_mass
    side = max(4.0, 0.5 * len(mass_SS) + 1.4)
    figure = new_figure(side + 1.3, side)
    axes = figure.add_subplot()
    _heat_map(figure, axes, mass_SS, np.triu(np.ones_like(mass_SS, dtype=bool), k=1), "fraction of the attention")
    _scale_ticks(axes.set_xticks, report.pyramid.names, 90)
    _scale_ticks(axes.set_yticks, report.pyramid.names, 0)
    axes.set(xlabel="attended scale (side in tokens)", ylabel="scale of the queries (side in tokens)")
    axes.set_title("Attention across scales")
    return figure


def window_mass_figure(report: AttentionReport) -> Any:
    """Curves over k, one per scale: the fraction of mass in one scale within k×k around the matching position.

    On the left in the queries' own scale, on the right, where the model sees it, in the scale before.
    """
    grids, mass, even = report.pyramid.grids, report.window_mass_by_scale, report.even
    shown = [scale for scale, grid in enumerate(grids) if max(grid) > 1] or [len(grids) - 1]
    colours = dict(zip(shown, ordered_colours(len(shown)), strict=True))
    before = [scale for scale in shown if scale and even.scale_mass[scale, scale - 1]]
    panels = [("own scale", shown, 0)]
    if any(max(grids[scale - 1]) > 1 for scale in before):
        panels.append(("scale before", before, 1))
    figure = new_figure(4.6 * len(panels) + 1.4, 4.2)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, scales, back) in zip(all_axes, panels, strict=True):
        widest = 3
        for scale in scales:
            side = max(grids[scale - back])
            covered = [k for k in mass if k < side] + [k for k in mass if k >= side][:1]
            widest = max(widest, covered[-1])
            values = [share_of(mass[k], report.scale_mass)[scale, scale - back] for k in covered]
            label = None if back else report.pyramid.names[scale]
            axes.plot(covered, values, color=colours[scale], marker="o", markersize=4, label=label)
        last, ticks = scales[-1], [k for k in mass if k <= widest]
        spread = [share_of(even.window_mass_by_scale[k], even.scale_mass)[last, last - back] for k in ticks]
        label = None if back else f"{report.pyramid.names[last]}, even spread"
        axes.plot(ticks, spread, color=FAINT, linestyle="--", linewidth=1.2, label=label)
        axes.set(xticks=ticks, xlim=(0.5, widest + 0.5), ylim=(0, 1.04), xlabel="window side k (tokens)")
        axes.set_title(f"Within k×k of the {title}")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("fraction of the attention to that scale")
    figure.legend(title="queries of scale", loc="outside right center", frameon=False)
    return figure


def last_scale_figure(report: AttentionReport) -> Any:
    """Maps of the last scale's attention to every scale that it sees, as multiples of an even spread.

    Above by the key's position; below by its displacement from the query's matching position, which is marked.
    """
    from matplotlib.colors import TwoSlopeNorm

    even, grids = report.even, report.pyramid.grids
    seen = [scale for scale, mass in enumerate(even.scale_mass[-1]) if mass]
    maps = [
        [_log_ratio(masses[scale], even_masses[scale]) for scale in seen]
        for masses, even_masses in (
            (report.last_scale_keys, even.last_scale_keys),
            (report.last_scale_displacements, even.last_scale_displacements),
        )
    ]
    largest = max(float(np.abs(values.filled(0)).max()) for row in maps for values in row)
    limit = min(MOST_TIMES, max(1.0, np.ceil(largest)))
    figure = new_figure(max(4.6, 1.15 * len(seen) + 1.5), 3.5 if len(seen) > 4 else 4.6)
    panels = figure.subplots(2, len(seen), squeeze=False)
    for axes_row, maps_row in zip(panels, maps, strict=True):
        for axes, values in zip(axes_row, maps_row, strict=True):
            norm = TwoSlopeNorm(0, -limit, limit)
            image = axes.imshow(values.clip(-limit, limit), cmap="RdBu_r", norm=norm, interpolation="none")
            axes.set(xticks=[], yticks=[])
    for scale, above, below in zip(seen, *panels, strict=True):
        above.set_title(f"{grids[scale]}\n{_short(report.scale_mass[-1, scale])}", fontsize=9)
        below.plot(grids[scale].width - 1, grids[scale].height - 1, "k+", markersize=5, markeredgewidth=0.7)
    panels[0, 0].set_ylabel("by position", fontsize=9)
    panels[1, 0].set_ylabel("from the\nmatching position", fontsize=9)
    bar = figure.colorbar(image, ax=list(panels.flat), shrink=0.8, pad=0.02)
    step = 1 if limit < 4 else 2
    powers = [step * times for times in range(-int(limit // step), int(limit // step) + 1)]
    bar.set_ticks(powers, labels=[f"{2**power}" if power >= 0 else f"1/{2**-power}" for power in powers])
    bar.set_label("times an even spread")
    figure.suptitle(f"What the last scale ({grids[-1]}) attends to", fontsize=11)
    return figure


def layers_figure(report: AttentionReport) -> Any:
    """Heat maps of layer × scale: mass in the own scale, and entropy as a fraction of its maximum."""
    own_NS = np.diagonal(report.scale_mass_by_head.mean(axis=1), axis1=1, axis2=2)
    most_S = report.even.entropy_by_head[0, 0]
    entropy_NS = report.entropy_by_head.mean(axis=1)
    spread_NS = np.divide(entropy_NS, most_S, out=np.zeros_like(entropy_NS), where=most_S > 0)
    layers, scales = own_NS.shape
    figure = new_figure(2 * max(3.2, 0.42 * scales + 1.2) + 1, max(2.6, 0.3 * layers + 1.5))
    left, right = figure.subplots(1, 2)
    _heat_map(figure, left, own_NS, np.zeros_like(own_NS, dtype=bool), "fraction of the attention")
    _heat_map(figure, right, spread_NS, np.broadcast_to(most_S == 0, own_NS.shape), "entropy / maximum")
    left.set_title("On the own scale")
    right.set_title("How evenly it is spread")
    ticks = range(0, layers, max(1, layers // 12))
    for axes in (left, right):
        _scale_ticks(axes.set_xticks, report.pyramid.names, 90)
        axes.set_yticks(ticks, [str(layer + 1) for layer in ticks])
        axes.set(xlabel="scale of the queries (side in tokens)", ylabel="layer")
    return figure


FIGURES: dict[str, Callable[[AttentionReport], Any]] = {
    "scale_mass": scale_mass_figure,
    "window_mass": window_mass_figure,
    "last_scale": last_scale_figure,
    "layers": layers_figure,
}
"""The function that makes each figure."""


def _log_ratio(mass: np.ndarray, even: np.ndarray) -> np.ma.MaskedArray:
    """Binary logarithm of the attention to each key relative to an even spread; masked where there can be none."""
    ratio = np.divide(mass, even, out=np.zeros_like(mass), where=even > 0)
    return np.ma.log2(np.ma.masked_less_equal(ratio, 0))


def _heat_map(figure: Any, axes: Any, values: np.ndarray, hidden: np.ndarray, label: str) -> None:
    """A matrix of values from 0 to 1, with numbers in its cells if there are few enough."""
    shown = np.ma.masked_array(values, hidden)
    image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="none")
    if values.size <= LABELLED_CELLS:
        for (row, column), value in np.ndenumerate(values):
            if not hidden[row, column] and value >= 0.005:
                colour = "black" if value > 0.6 else "white"
                size = 8 if values.size <= 120 else 7
                axes.text(column, row, _short(value), ha="center", va="center", size=size, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.85, label=label)


def _scale_ticks(set_ticks: Callable[..., object], names: Sequence[str], rotation: int) -> None:
    set_ticks(range(len(names)), names, rotation=rotation if max(map(len, names)) > 3 else 0)


def _short(value: float) -> str:
    """Two decimals without the leading zero."""
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"


def write_attention_page(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page from the content of report.json; the figures that it names exist."""
    write_page(
        path,
        "attention.html.j2",
        **values,
        names=_scale_names(values),
        scales=scale_rows(values),
        svg=lambda name, caption: svg_figure(Path(values["plots_svg"][name]), caption),
        recommendation=recommendation_sentence(values),
        saved=saving_rows(values["savings"]),
    )


def _scale_names(values: Mapping[str, Any]) -> tuple[str, ...]:
    return ScalePyramid.from_patch_sizes(values["patch_sizes"]).names


def scale_rows(values: Mapping[str, Any]) -> TableRows:
    """Each scale's attention to itself and to the scale before, compared with an even spread, and within windows."""
    near, mass, even = values["reading"]["window"], values["scale_mass"], values["even_scale_mass"]
    inside, even_inside = (values[f"{kind}window_mass_by_scale"][str(near)] for kind in ("", "even_"))
    shown = [k for k in (3, 7, 15) if k < max(np.ravel(values["patch_sizes"][-1]))]
    rows = [["scale", "own", "before", "both", "even", *(f"in {k}×{k} of own" for k in shown), f"even {near}×{near}",
             f"in {near}×{near} of all"]]  # fmt: skip
    for scale, name in enumerate(_scale_names(values)):
        before, even_before = (masses[scale][scale - 1] if scale else 0.0 for masses in (mass, even))
        cells = [
            mass[scale][scale],
            before if scale else None,
            mass[scale][scale] + before,
            even[scale][scale] + even_before,
            *(values["window_share"][str(k)][scale] for k in shown),
            even_inside[scale][scale] / even[scale][scale],
            sum(inside[scale]),
        ]
        rows.append([name, *("" if value is None else f"{value:.3f}" for value in cells)])
    return rows


def saving_rows(savings: Mapping[str, Any]) -> TableRows:
    """What the recommendation saves."""
    together = f"{savings['batch_size']} images"
    rows = [["", "as it is", "recommended", "ratio"]]
    for key, label in (
        ("attention_gmacs", "attention, one image (GMACs)"),
        ("kv_cache_bytes", f"KV cache, {together}"),
        ("sample_peak_bytes", f"peak memory of sampling, {together}"),
    ):
        found = savings[key]
        both = [found["model"], found["recommended"]]
        shown = [f"{value:,.4g}" if key == "attention_gmacs" else format_bytes(value) for value in both]
        rows.append([label, *shown, "–" if found["part"] is None else f"{found['part']:.3f}"])
    return rows


def recommendation_sentence(values: Mapping[str, Any]) -> str:
    """The recommended settings in a line."""
    best = values["recommended"]
    windows = ",".join(map(str, best["windows"]))
    return (
        f"To keep {best['keep']:g} of the attention: scale_prefixes {best['scale_prefixes']}, windows {windows}"
        f" (0 is a whole scale); together they keep {best['kept']:.4f}."
    )
