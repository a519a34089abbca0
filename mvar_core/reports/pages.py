"""Report pages: one HTML file that needs nothing else, from a template, in light and dark."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from PIL import Image

from mvar_core.io.files import write_text
from mvar_core.io.pixels import Pixels

TableRows = list[list[str]]
"""A table, its heading first."""


class Figure(NamedTuple):
    """A figure or picture of a page: its markup and the line below it."""

    markup: Markup
    caption: str


def svg_figure(path: Path, caption: str) -> Figure:
    """A figure from an SVG file, whose lightness a dark page inverts; `caption` starts with its name."""
    name = caption.partition(".")[0]
    return Figure(_embedded("figure", path.read_bytes(), "svg+xml", name), caption)


def picture(pixels: Pixels, caption: str, scale: int = 2) -> Figure:
    """An image (height, width, 3), enlarged `scale` times by repeating pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return Figure(_embedded("pixels", buffer.getvalue(), "png", caption, f"{pixels.shape[1] * scale}px"), caption)


def _embedded(kind: str, content: bytes, encoding: str, alt: str, width: str = "auto") -> Markup:
    data = base64.b64encode(content).decode("ascii")
    markup = Markup('<img class="{}" style="width: {}" src="data:image/{};base64,{}" alt="{}"/>')
    return markup.format(kind, width, encoding, data, alt)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from a file in templates/, which shows the values; text is escaped in HTML."""
    environment = Environment(
        loader=PackageLoader("mvar_core.reports"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    write_text(path, environment.get_template(template).render(**values))
