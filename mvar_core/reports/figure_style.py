"""Colours of figures on light and on dark pages, and SVG files made part of a page that follows the reader's choice.

A figure is drawn once, in LIGHT. Its colours of text and lines are of its own kind, so that in a page's SVG they can be
replaced by CSS variables, of which the page holds a light and a dark value (`colour_rules`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Palette:
    """Colours that depend on what lies behind the figure.

    Attributes:
        ink: Text, ticks and axes.
        faint: Grid lines and what is said beside the matter.
        background: Behind the figure.
        lines: Where on the colour map viridis the first and the last of several lines stand.
    """

    ink: str
    faint: str
    background: str
    lines: tuple[float, float]

    def line(self, order: int, count: int) -> str:
        """The colour of one of `count` lines that have an order."""
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        first, last = self.lines
        return to_hex(colormaps["viridis"](first + (last - first) * order / max(1, count - 1)))

    def settings(self, name: str) -> dict[str, Any]:
        """Matplotlib's settings; `name` makes the same figure the same bytes."""
        return {
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "axes.edgecolor": self.ink,
            "xtick.color": self.ink,
            "ytick.color": self.ink,
            "grid.color": self.faint,
            "axes.facecolor": "none",
            "figure.facecolor": self.background,
            "savefig.facecolor": self.background,
            "svg.hashsalt": name,
        }


LIGHT = Palette("#1b1b1a", "#8a8a89", "#fefefe", (0.0, 0.85))
DARK = Palette("#e6e6e5", "#8b8b8c", "#16181d", (0.3, 1.0))


@contextmanager
def drawing(name: str, palette: Palette = LIGHT) -> Iterator[None]:
    """Matplotlib draws with a palette's colours for as long as the block runs."""
    from matplotlib import rc_context

    with rc_context(palette.settings(name)):
        yield


def page_svg(svg: str, name: str, label: str, lines: int = 0) -> str:
    """An SVG file's text as an element of a page.

    Args:
        svg: The file, drawn in LIGHT.
        name: Goes before every id, for figures of one page must not share any.
        label: What the figure shows, for those who hear the page.
        lines: How many ordered lines it has.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    width = re.search(r'<svg[^>]*?\bwidth="([\d.]+)pt"', svg)
    assert width is not None
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", opening)
    style = f"width:{float(width[1]) * 4 / 3:.0f}px"
    opening += f' role="img" aria-label="{label}" style="{style}"'
    for variable, value in _variables(LIGHT, lines).items():
        rest = rest.replace(value, f"var({variable})")
    return f"{opening}>{rest}".strip()


def colour_rules(lines: int) -> str:
    """The CSS that `page_svg` needs: variables, light and dark."""
    light, dark = ("".join(f"{n}:{v};" for n, v in _variables(p, lines).items()) for p in (LIGHT, DARK))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def _variables(palette: Palette, lines: int) -> dict[str, str]:
    named = {"--ink": palette.ink, "--faint": palette.faint, "--background": palette.background}
    return named | {f"--line-{order}": palette.line(order, lines) for order in range(lines)}
