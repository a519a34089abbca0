from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from mvar_core.reports.figures import plot_curves
from mvar_core.reports.pages import picture, svg_figure, write_page


def test_a_page_holds_its_pictures_and_escapes_text(tmp_path):
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    shown = picture(pixels, "a <caption>", scale=2)
    lines = plot_curves({"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}, tmp_path / "curve.svg", title="a < b")
    curve = svg_figure(tmp_path / "curve.svg", "T & T. More", lines)
    write_page(
        tmp_path / "page.html",
        "quickstart.html.j2",
        lines=(lines, 3),
        parameters="1 k",
        seed=0,
        sides="1, 2",
        samples=shown,
        stages=shown,
        reconstructions=shown,
        metrics=[["a", "b"], ["c", "1 < 2"]],
        curves=[curve],
        recommendation="R & D",
        attention=[],
        seconds=[["stage", "time"]],
        commands="mvar x > y",
    )
    text = (tmp_path / "page.html").read_text()
    assert "<figcaption>a &lt;caption&gt;</figcaption>" in text
    assert "R &amp; D" in text
    assert "mvar x &gt; y" in text
    assert "<td>1 &lt; 2</td>" in text
    assert 'width="8"' in text
    assert 'aria-label="T &amp; T"' in text
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--line[\w-]+)\)", text))
    assert used == {"--line-1-of-2", "--line-2-of-2"}
    assert all(f"{name}:" in text for name in used)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    data = text.partition("base64,")[2].partition('"')[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)
    body = text[text.index("<body>") : text.index("</body>") + len("</body>")]
    ElementTree.fromstring(re.sub(r"(<img[^>]*)>", r"\1/>", body))  # what is opened is closed, in order
