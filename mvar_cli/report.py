"""The quickstart's page: one HTML file that holds its pictures and needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fafafa; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p { max-width: 46rem; } img { max-width: 100%; display: block; margin: 0.6rem 0; }
img.pixels { image-rendering: pixelated; } figure { margin: 0; } figcaption { color: #555; font-size: 0.9rem; }
table { border-collapse: collapse; margin: 0.6rem 0; } td, th { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left;
        border-bottom: 1px solid #ddd; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #eef0f2; padding: 0.7rem 0.9rem; overflow-x: auto; border-radius: 4px; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots img { max-width: 29rem; width: 100%; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        png: Its bytes.
        caption: The line below it.
        scale: How many times it is enlarged, by repeating pixels; 0 shows it as it is.
    """

    png: bytes
    caption: str
    scale: int = 0

    @classmethod
    def of_pixels(cls, pixels: np.ndarray, caption: str, scale: int = 1) -> Picture:
        """A picture from uint8 (H, W, 3)."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return cls(buffer.getvalue(), caption, scale)

    @classmethod
    def of_file(cls, path: Path, caption: str, scale: int = 0) -> Picture:
        """A picture from a PNG file."""
        return cls(path.read_bytes(), caption, scale)

    def to_html(self) -> str:
        """The figure with its data inside."""
        data = base64.b64encode(self.png).decode("ascii")
        size = ""
        if self.scale:
            width = int.from_bytes(self.png[16:20], "big")  # where a PNG keeps it
            size = f' class="pixels" width="{width * self.scale}"'
        caption = html.escape(self.caption)
        return (
            f'<figure><img src="data:image/png;base64,{data}"{size} alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: A paragraph.
        pictures: Shown one below the other, or side by side where `side_by_side` says so.
        rows: A table; its first row is the heading.
        code: Commands to copy.
        side_by_side: How pictures are laid.
    """

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    rows: Sequence[Sequence[str]] = ()
    code: str = ""
    side_by_side: bool = False

    def to_html(self) -> str:
        """The section."""
        parts = [f"<h2>{html.escape(self.title)}</h2>"]
        if self.text:
            parts.append(f"<p>{html.escape(self.text)}</p>")
        pictures = "\n".join(picture.to_html() for picture in self.pictures)
        if pictures:
            parts.append(f'<div class="plots">{pictures}</div>' if self.side_by_side else pictures)
        if self.rows:
            heading, *body = self.rows
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
            lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in body)
            parts.append(f"<table><tr>{head}</tr>{lines}</table>")
        if self.code:
            parts.append(f"<pre>{html.escape(self.code)}</pre>")
        return "\n".join(parts)


def page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML."""
    body = "\n".join(section.to_html() for section in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>{html.escape(introduction)}</p>\n{body}\n</body>\n</html>\n"
    )


def _cell(text: str) -> str:
    numeric = text.replace(".", "").replace(",", "").replace("%", "").replace("×", "").strip().isdigit()
    return f'<td class="number">{html.escape(text)}</td>' if numeric else f"<td>{html.escape(text)}</td>"
