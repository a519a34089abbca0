"""The attention report: figures, tables, and the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvar_core.analysis.attention import AttentionReport
from mvar_core.analysis.findings import neighbourhood
from mvar_core.formatting import format_bytes
from mvar_core.reports.pages import TableRows, svg_figure, write_page


def write_attention_page(path: Path, report: AttentionReport, values: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: The file.
        report: What was measured.
        values: The content of report.json; the figures that it names exist.
    """
    write_page(
        path,
        "attention.html.j2",
        name=values["model"],
        source=values["source"],
        report=report,
        sentences=values["reading"]["sentences"],
        scales=scale_rows(report),
        svg=lambda name, caption: svg_figure(Path(values["plots_svg"][name]), caption),
        recommendation=recommendation_sentence(report),
        savings=saving_rows(values["savings"]),
        preset=values["preset"],
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
