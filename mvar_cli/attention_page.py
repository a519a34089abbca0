"""The attention report as one HTML page: figures as SVG inside it, light and dark, and nothing else needed."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_cli.old_console import format_bytes
from mvar_core.analysis.reading import neighbourhood, read_attention
from mvar_core.reports.attention_plots import plot_lines
from mvar_core.reports.figure_style import colour_rules, page_svg

if TYPE_CHECKING:
    from mvar_core.analysis.locality_report import LocalityReport

STYLE = """
:root { color-scheme: light dark; --soft: #5a5a59; --rule: #dcdcda; --panel: #f1f1ef; }
@media (prefers-color-scheme: dark) { :root { --soft: #a5a5a4; --rule: #34373d; --panel: #1f2228; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--background); max-width: 66rem;
       margin: 2rem auto 4rem; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
p, li { max-width: 48rem; } .soft, figcaption { color: var(--soft); } figcaption { max-width: 48rem; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; display: block; }
.table { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
pre { background: var(--panel); padding: .7rem .9rem; overflow-x: auto; border-radius: 4px; }
ul { padding-left: 1.2rem; } .reading li { margin: .4rem 0; } code { font-size: .93em; }
"""

FIGURES = {
    "scale_mass": (
        "Which scales are looked at",
        "Each row is a scale that looks, each column one that is looked at; a row adds up to 1. The diagonal is the own"
        " scale, beside it on the left the scale before.",
    ),
    "window_mass": (
        "How near",
        "The part of a scale's attention to the own scale (and to the scale before, where the model sees it) that falls"
        " within k×k tokens around the query, or around the place that matches it. The dashed line is what attention"
        " spread evenly would give the last scale: only what lies above it is local.",
    ),
    "last_scale": (
        "Where the last scale looks",
        "Every scale that the last one sees, and under its size the part of the attention that it gets. Red is more"
        " than an even spread over all keys, blue less. Above: by where the key is, averaged over queries. Below: by"
        " where it is from the place that matches the query (+). A red centre is attention to neighbours.",
    ),
    "layers": (
        "What layers do",
        "Averages over heads. Left: attention to the own scale. Right: entropy over the most there can be; 1 is an even"
        " spread over all keys, 0 a single key.",
    ),
}


def write_attention_page(
    path: Path, name: str, report: LocalityReport, values: Mapping[str, Any], plots: Mapping[str, Path]
) -> None:
    """Write the page.

    Args:
        path: The file.
        name: What the model is called.
        report: What was measured.
        values: What report.json holds: source, savings and preset among it.
        plots: The figures' PNG files; their SVG files lie beside them.
    """
    from mvar_core.io.files import write_text

    lines = plot_lines(report)
    reading = read_attention(report)
    parts = [
        f"<h1>Where {html.escape(name)} looks</h1>",
        f'<p class="soft">{report.num_images:,} images: {html.escape(str(values["source"]))}. Token maps of'
        f" {', '.join(report.scale_names)}; all figures are averages over images, layers and"
        f" heads.</p>",
        f'<ul class="reading">{"".join(f"<li>{html.escape(said)}</li>" for said in reading.sentences)}</ul>',
        *(f'<p class="soft">{html.escape(note)}</p>' for note in report.notes),
        "<h2>In figures</h2>",
        _table(scale_rows(report)),
        '<p class="soft">Even: what attention that were spread evenly over everything a token sees would give. A scale'
        " is made from the scale before, so its own tokens carry what the papers call the adjacent scale.</p>",
    ]
    for key, (title, caption) in FIGURES.items():
        svg = plots[key].with_suffix(".svg").read_text(encoding="utf-8")
        drawn = page_svg(svg, key, title, lines if key == "window_mass" else 0)
        parts.append(f"<h2>{title}</h2>\n<figure>{drawn}<figcaption>{caption}</figcaption></figure>")
    parts += _recommendation(report, values)
    parts += [
        "<h2>Definitions</h2>",
        "<p>A query's attention adds up to 1. The place that matches the query (y, x) of a scale of h×w tokens in a"
        " scale of h′×w′ is (⌊(y + ½)·h′/h⌋, ⌊(x + ½)·w′/w⌋). Windows are shifted inward at the borders, so that all"
        " have k×k tokens; one longer than an axis covers it. Means over scales count every token alike and leave out"
        " the first scale.</p>",
        "<p>report.json beside this page holds all of it by layer and head.</p>",
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Where {html.escape(name)} looks</title>\n<style>{STYLE}{colour_rules(lines)}</style>\n"
        "</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )
    write_text(path, page)


def scale_rows(report: LocalityReport) -> list[list[str]]:
    """The table of scales, its heading first: own scale, scale before, both beside an even spread, and windows."""
    near = neighbourhood(report)
    mass, even = report.scale_mass, report.even_scale_mass
    windows, even_windows = report.window_share, report.even_window_mass
    shown = [k for k in (3, 7, 15) if k < max(report.pyramid.latent_grid)]
    rows = [["scale", "own", "before", "both", "even", *(f"in {k}×{k} of own" for k in shown), f"even {near}×{near}",
             f"in {near}×{near} of all"]]  # fmt: skip
    for scale, name in enumerate(report.scale_names):
        before, even_before = (values[scale, scale - 1] if scale else 0.0 for values in (mass, even))
        rows.append(
            [
                name,
                _part(mass[scale, scale]),
                _part(before) if scale else "",
                _part(mass[scale, scale] + before),
                _part(even[scale, scale] + even_before),
                *(_part(windows[k][scale]) for k in shown),
                _part(even_windows[near][scale, scale] / even[scale, scale]),
                _part(report.window_mass_by_scale[near][scale].sum()),
            ]
        )
    return rows


def saving_rows(savings: Mapping[str, Any]) -> list[list[str]]:
    """The table of savings, its heading first."""
    together = f"{savings['batch_size']} images"
    rows = [["", "as it is", "recommended", "part"]]
    for key, label in (
        ("attention_gmacs", "attention, one image (GMACs)"),
        ("kv_cache_bytes", f"KV cache, {together}"),
        ("sample_peak_bytes", f"peak memory of sampling, {together}"),
    ):
        figures = savings[key]
        shown = [
            f"{v:,.4g}" if key == "attention_gmacs" else format_bytes(v)
            for v in (figures["model"], figures["recommended"])
        ]
        rows.append([label, *shown, "–" if figures["part"] is None else _part(figures["part"])])
    return rows


def recommendation_sentence(report: LocalityReport) -> str:
    """The recommended settings in a line."""
    best = report.recommended
    windows = ",".join(map(str, best.windows))
    return (
        f"To keep {best.keep:g} of the attention: scale_prefixes {best.scale_prefixes}, windows {windows} (0 is a whole"
        f" scale); together they keep {best.kept:.4f}."
    )


def _recommendation(report: LocalityReport, values: Mapping[str, Any]) -> list[str]:
    best = report.recommended
    heading = ["scale", "window", "kept", "kept by prefixes", "kept by window", f"window for {best.keep:g} of own"]
    rows = [heading]
    for scale, name in enumerate(report.scale_names):
        rows.append(
            [
                name,
                str(best.windows[scale] or "whole"),
                _part(best.kept_by_scale[scale]),
                _part(best.kept_by_prefixes[scale]),
                _part(best.kept_by_windows[scale]),
                str(best.own_windows[scale] or "whole"),
            ]
        )
    parts = [
        "<h2>Recommended</h2>",
        f"<p>{html.escape(recommendation_sentence(report))} What is kept is attention as it is now, without any further"
        " training; a model that is trained or fine-tuned with these settings learns to make do with them.</p>",
        _table(rows),
        "<p>What it saves, as <code>mvar plan</code> predicts:</p>",
        _table(saving_rows(values["savings"])),
    ]
    windows = ",".join(map(str, best.windows))
    train = f"--set attention.scale_prefixes={best.scale_prefixes} --set attention.windows=[{windows}]"
    if preset := values.get("preset"):
        train = f"--preset {preset}"
    command = f"mvar finetune-from-var --var-checkpoint MODEL --tokens TOKENS --out RUN \\\n  {train}"
    parts.append(f"<pre>{html.escape(command)}</pre>")
    return parts


def _table(rows: Sequence[Sequence[str]]) -> str:
    heading, *body = rows
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _part(value: float) -> str:
    return f"{value:.3f}"
