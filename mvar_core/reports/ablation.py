"""The report of an ablation, made from ablation.json: tables, Markdown, and a figure of quality against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mvar_core.analysis.ablation import qualities, shortest_labels
from mvar_core.formatting import format_bytes, format_count, format_number
from mvar_core.reports.figures import COLOURS, FAINT, MARKERS, new_figure, save_figure
from mvar_core.reports.pages import write_page

FIGURES = ("ablation.png", "ablation.svg")
SCORES = {"fid": "FID", "precision": "precision", "recall": "recall", "classifier_accuracy": "accuracy"}
TINY_GMACS = 0.1
NOT_FOUND = "–"


class ReportTable(NamedTuple):
    """A table as a console or a page shows it."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """One of the two ablations, or, without a title, what a reader of all tables has to know."""

    title: str
    tables: list[ReportTable]
    sentences: list[str]


def ablation_sections(found: Mapping[str, Any]) -> list[Section]:
    """The report of what ablation.json holds."""
    sections = [
        Section(table["title"], _tables(found, table), [*filter(None, (*table["sentences"], table["savings"]))])
        for table in found["ablations"]
    ]
    return [*sections, Section("", [], _notes(found))]


def _tables(found: Mapping[str, Any], ablation: Mapping[str, Any]) -> list[ReportTable]:
    """Quality, cost, and loss of each scale."""
    settings = {setting["setting"]: setting for setting in found["aggregate"]}
    lines = [(entry["label"], settings[entry["setting"]]) for entry in ablation["entries"]]
    first = "prefixes" if ablation["kind"] == "prefixes" else "window"
    names = {**SCORES, **qualities(found["features"], settings.values())}
    quality = ["validation_loss", *(key for key in SCORES if any(setting[key]["values"] for _, setting in lines))]
    unit, factor = _attention_unit(found)
    batch = lines[0][1]["cost"]["batch_size"]
    costs = [
        {
            first: label,
            "parameters": format_count(setting["parameters"]),
            f"attention, {unit}": format_number(factor * setting["attention_gmacs"]),
            "KV cache": format_bytes(setting["kv_cache_bytes"]),
            "ms an image": format_number(1000 * (setting["cost"]["seconds_per_image"] or math.nan)),
            "resident": format_bytes(setting["cost"]["peak_memory_bytes"]),
            "allocated": format_bytes(setting["cost"]["allocated_bytes"]),
            "seconds of training": format_spread(setting["training_seconds"]),
        }
        for label, setting in lines
    ]
    return [
        ReportTable(
            f"{ablation['title']}; {_seeds(found)}",
            [first, *(names[key] for key in quality)],
            [[label, *(format_spread(setting[key]) for key in quality)] for label, setting in lines],
        ),
        ReportTable(
            f"cost; time and memory of sampling {batch} image{'s together' if batch > 1 else ''}",
            [*costs[0]],
            [[*cells.values()] for cells in costs],
        ),
        ReportTable(
            "validation loss of each scale",
            [first, *found["scales"]],
            [[label, *map(format_spread, setting["validation_scale_loss"])] for label, setting in lines],
        ),
    ]


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = []
    scores = found["rows"][0]["scores"]
    if scores.get("demo_fid_real") is not None:
        notes.append(
            f"For comparison: {qualities(found['features'], found['aggregate'])['fid']} of real test images"
            f" {format_number(scores['demo_fid_real'])}, of training images resampled"
            f" {format_number(scores['demo_fid_floor'])}, of class means"
            f" {format_number(scores['demo_fid_class_means'])}; accuracy"
            f" on real test images {scores['classifier_accuracy_real']:.3f}."
        )
    memory = found["aggregate"][0]["cost"]["memory_is"]
    notes.append(
        f"KV cache of one image; time{f' (memory {memory})' if memory else ''} as `mvar bench` measures it, medians of"
        " rounds over all settings; allocated: the most that torch's allocator handed out."
    )
    if reason := scores.get("reasons", {}).get("fid"):
        notes.append(f"FID is not computed: {reason.rstrip('.')}.")
    equal = [entry["label"] for table in found["ablations"] for entry in table["entries"] if " = " in entry["label"]]
    if equal:
        notes.append(f"Lines with = are one model, trained once: {'; '.join(equal)}.")
    if len(found["seeds"]) > 1:
        notes.append(
            "p: Welch's t test against the baseline, corrected for the comparisons of the table (Holm); seed std:"
            " standard deviation over seeds, pooled over the table's settings. Settings share data, order and first"
            " weights of a seed."
        )
    return notes


def write_ablation(found: Mapping[str, Any], directory: Path) -> None:
    """Write ablation.md, with tables, what they show and the figure; and the figure as PNG and SVG."""
    *sections, notes = ablation_sections(found)
    write_page(
        directory / "ablation.md", "ablation.md.j2", sections=sections, notes=notes.sentences, seeds=_seeds(found),
        found=found,
    )  # fmt: skip
    figure = ablation_figure(found)
    for name in FIGURES:
        save_figure(figure, directory / name)


def ablation_figure(found: Mapping[str, Any]) -> Any:
    """One column per ablation, one row per quality: mean and standard deviation over seeds, each seed a small dot."""
    settings = {setting["setting"]: setting for setting in found["aggregate"]}
    shown, ablations = qualities(found["features"], settings.values()), found["ablations"]
    unit, factor = _attention_unit(found)
    real = found["rows"][0]["scores"].get("demo_fid_real")
    figure = new_figure(0.8 + 4.9 * len(ablations), 0.9 + 3.1 * len(shown))
    panels = figure.subplots(len(shown), len(ablations), squeeze=False, sharey="row")
    for column, ablation in enumerate(ablations):
        labels = shortest_labels((entry["label"], entry["setting"]) for entry in ablation["entries"])
        for axes, (key, quality) in zip(panels[:, column], shown.items(), strict=True):
            for order, (name, label) in enumerate(labels.items()):
                spread, cost = settings[name][key], factor * settings[name]["attention_gmacs"]
                if spread["mean"] is None:
                    continue
                style = {"color": COLOURS[order % len(COLOURS)], "fmt": MARKERS[order % len(MARKERS)], "label": label}
                axes.errorbar(cost, spread["mean"], spread["std"], markersize=9, capsize=4, linewidth=1.4, **style)
                axes.scatter([cost] * spread["n"], spread["values"], 25, style["color"], edgecolors="white", zorder=3)
            if key == "fid" and real is not None:
                axes.axhline(real, color=FAINT, linewidth=1, linestyle=":")
                axes.annotate("real test images", (0.99, real), xycoords=("axes fraction", "data"), ha="right",
                              va="bottom", fontsize=8, color=FAINT)  # fmt: skip
            axes.grid(alpha=0.3)
            axes.margins(x=0.12)
            if column == 0:
                axes.set_ylabel(f"{quality} (lower is better)")
        panels[0, column].set_title(ablation["title"].split(",")[0])
        panels[0, column].legend(frameon=False, fontsize=8)
        panels[-1, column].set_xlabel(f"attention of one image ({unit})")
    figure.suptitle(f"{found['model']}: {_seeds(found)}")
    return figure


def format_spread(spread: Mapping[str, Any]) -> str:
    """Mean ± standard deviation, to two figures of the latter."""
    mean, std = spread["mean"], spread["std"]
    if mean is None:
        return NOT_FOUND
    if not std:
        return format_number(mean) + ("" if std is None else " ± 0")
    decimals = min(6, max(0, 1 - math.floor(math.log10(std))))
    return f"{mean:,.{decimals}f} ± {std:.{decimals}f}"


def _attention_unit(found: Mapping[str, Any]) -> tuple[str, float]:
    """The unit that attention is shown in, and how many of them are 10⁹ multiply-accumulates."""
    most = max(setting["attention_gmacs"] for setting in found["aggregate"])
    return ("MMACs", 1000.0) if most < TINY_GMACS else ("GMACs", 1.0)


def _seeds(found: Mapping[str, Any]) -> str:
    seeds = found["seeds"]
    return f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else f"one seed ({seeds[0]})"
