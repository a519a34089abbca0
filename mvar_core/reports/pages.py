"""Report pages: one HTML file that needs nothing else, from a template, in light and dark."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mvar_core.io.files import write_text
from mvar_core.io.pixels import Pixels
from mvar_core.reports.figures import colour_rules, page_svg

TableRows = list[list[str]]
"""A table, its heading first."""


class Figure(NamedTuple):
    """A figure or picture of a page: its markup and the line below it."""

    markup: Markup
    caption: str


def svg_figure(path: Path, caption: str, lines: int = 0) -> Figure:
    """A figure from an SVG file that `figures` made, with so many ordered lines."""
    label = str(Markup.escape(caption.partition(".")[0]))
    return Figure(Markup(page_svg(path, label, lines)), caption)  # noqa: S704 (matplotlib wrote it)


def picture(pixels: Pixels, caption: str, scale: int = 2) -> Figure:
    """An image (height, width, 3), enlarged `scale` times by repeating pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width = pixels.shape[1] * scale
    return Figure(
        Markup('<img class="pixels" src="data:image/png;base64,{}" width="{}" alt="{}">').format(data, width, caption),
        caption,
    )


def write_page(path: Path, template: str, *, lines: tuple[int, ...] = (), **values: Any) -> None:
    """Write a page.

    Args:
        path: The file.
        template: Name of a file in templates/.
        lines: Numbers of ordered lines in the page's figures, whose colours follow the reader's choice.
        **values: What the template shows; text is escaped.
    """
    environment = Environment(
        loader=PackageLoader("mvar_core.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    colours = Markup(colour_rules(*lines))  # noqa: S704 (our own constants)
    write_text(path, environment.get_template(template).render(colours=colours, **values))
