"""The page of an attention report and its tables, from the content of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mvar_core.formatting import format_bytes
from mvar_core.reports.pages import TableRows, svg_figure, write_page


def write_attention_page(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page from the content of report.json; the figures that it names exist."""
    write_page(
        path,
        "attention.html.j2",
        **values,
        names=scale_names(values),
        scales=scale_rows(values),
        svg=lambda name, caption: svg_figure(Path(values["plots_svg"][name]), caption),
        recommendation=recommendation_sentence(values),
        saved=saving_rows(values["savings"]),
    )


def scale_names(values: Mapping[str, Any]) -> list[str]:
    """Each scale as its side, or height×width."""
    return ["×".join(map(str, size)) if isinstance(size, list) else str(size) for size in values["patch_sizes"]]


def scale_rows(values: Mapping[str, Any]) -> TableRows:
    """Each scale's attention to itself and to the scale before, compared with an even spread, and within windows."""
    near, mass, even = values["reading"]["window"], values["scale_mass"], values["even_scale_mass"]
    inside, even_inside = (values[f"{kind}window_mass_by_scale"][str(near)] for kind in ("", "even_"))
    shown = [k for k in (3, 7, 15) if k < max(np.ravel(values["patch_sizes"][-1]))]
    rows = [["scale", "own", "before", "both", "even", *(f"in {k}×{k} of own" for k in shown), f"even {near}×{near}",
             f"in {near}×{near} of all"]]  # fmt: skip
    for scale, name in enumerate(scale_names(values)):
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
