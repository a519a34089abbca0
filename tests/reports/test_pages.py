from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from mvar_core.reports.figures import plot_metrics
from mvar_core.reports.pages import picture, svg_figure, write_page


def test_a_page_holds_its_pictures_and_escapes_text(tmp_path):
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    shown = picture(pixels, "a <caption>", scale=2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": 1, "b": 2}\n{"step": 1, "a": 2, "b": 1}\n')
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "curve.svg", keys=("a", "b"), title="a < b")
    curve = svg_figure(tmp_path / "curve.svg", "T & T. More")
    write_page(
        tmp_path / "page.html",
        "quickstart.html.j2",
        title="<digits>",
        classes="0, 1",
        images="pictures",
        neighbours=[],
        memorised=0.0,
        best_step=None,
        steps=1,
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
    assert "width: 8px" in text
    assert 'alt="T &amp; T"' in text
    assert "prefers-color-scheme: dark" in text
    embedded = dict(re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', text))
    assert base64.b64decode(embedded["svg+xml"]) == (tmp_path / "curve.svg").read_bytes()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(embedded["png"])))), pixels)
    assert not re.search(r'(?:src|href)="(?!data:)(?!attention/)', text)
    body = text[text.index("<body>") : text.index("</body>") + len("</body>")]
    ElementTree.fromstring(body)  # what is opened is closed, in order
