"""The attention report: figures, tables, and the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvar_core.analysis.attention import AttentionReport
from mvar_core.analysis.findings import neighbourhood
from mvar_core.formatting import format_bytes
from mvar_core.reports.pages import TableRows, svg_figure, write_page

CAPTIONS = {
    "scale_mass": (
        "Which scales are attended to",
        "Attention across scales. Each row is the scale of the queries, each column an attended scale; a row sums to 1."
        " The diagonal is the queries' own scale, left of it the scale before.",
    ),
    "window_mass": (
        "How near",
        "Attention within windows. The fraction of a scale's attention to itself (and to the scale before, where the"
        " model sees it) that lies within k×k tokens around the query's matching position. The dashed line is an even"
        " spread at the last scale: only what lies above it is local.",
    ),
    "last_scale": (
        "What the last scale attends to",
        "Maps of the last scale's attention: every scale that it sees, and under the size its fraction of the"
        " attention. Red is more than an even spread over all keys, blue less. Above: by the key's position, averaged"
        " over queries. Below: by displacement from the query's matching position (+). A red centre is attention to"
        " neighbours.",
    ),
    "layers": (
        "How layers differ",
        "Layers, averaged over heads. Left: attention to the own scale. Right: entropy as a fraction of its maximum; 1"
        " is an even spread over all keys, 0 a single key.",
    ),
}


def write_attention_page(path: Path, report: AttentionReport, values: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: The file.
        report: What was measured.
        values: The content of report.json; the figures that it names exist.
    """
    best = report.recommended
    preset = values["preset"]
    windows = ",".join(map(str, best.windows))
    settings = f"--set attention.scale_prefixes={best.scale_prefixes} --set attention.windows=[{windows}]"
    write_page(
        path,
        "attention.html.j2",
        name=values["model"],
        source=values["source"],
        report=report,
        sentences=values["reading"]["sentences"],
        scales=scale_rows(report),
        figures=[
            (title, svg_figure(Path(values["plots_svg"][name]), caption)) for name, (title, caption) in CAPTIONS.items()
        ],
        recommendation=recommendation_sentence(report),
        recommended=recommended_rows(report),
        savings=saving_rows(values["savings"]),
        arguments=f"--preset {preset}" if preset else settings,
    )


def scale_rows(report: AttentionReport) -> TableRows:
    """Each scale's attention to itself and to the scale before, compared with an even spread, and within windows."""
    near = neighbourhood(report)
    mass, even = report.scale_mass, report.even.scale_mass
    shares, even_shares = report.window_share, report.even.window_share[near]
    shown = [k for k in (3, 7, 15) if k < max(report.pyramid.latent_grid)]
    rows = [["scale", "own", "before", "both", "even", *(f"in {k}×{k} of own" for k in shown), f"even {near}×{near}",
             f"in {near}×{near} of all"]]  # fmt: skip
    for scale, name in enumerate(report.scale_names):
        before, even_before = (values[scale, scale - 1] if scale else 0.0 for values in (mass, even))
        values = [
            mass[scale, scale],
            before if scale else None,
            mass[scale, scale] + before,
            even[scale, scale] + even_before,
            *(shares[k][scale] for k in shown),
            even_shares[scale],
            report.window_mass_by_scale[near][scale].sum(),
        ]
        rows.append([name, *("" if value is None else f"{value:.3f}" for value in values)])
    return rows


def recommended_rows(report: AttentionReport) -> TableRows:
    """The recommended window of each scale and what it keeps."""
    best = report.recommended
    rows = [["scale", "window", "kept", "kept by prefixes", "kept by window", f"window for {best.keep:g} of own"]]
    for scale, name in enumerate(report.scale_names):
        kept = (best.kept_by_scale[scale], best.kept_by_prefixes[scale], best.kept_by_windows[scale])
        window, own_window = (str(windows[scale] or "whole") for windows in (best.windows, best.own_windows))
        rows.append([name, window, *(f"{value:.3f}" for value in kept), own_window])
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


def recommendation_sentence(report: AttentionReport) -> str:
    """The recommended settings in a line."""
    best = report.recommended
    windows = ",".join(map(str, best.windows))
    return (
        f"To keep {best.keep:g} of the attention: scale_prefixes {best.scale_prefixes}, windows {windows} (0 is a whole"
        f" scale); together they keep {best.kept:.4f}."
    )
