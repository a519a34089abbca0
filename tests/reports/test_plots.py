from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mvar_core.errors import DataError
from mvar_core.reports.plots import plot_curves, plot_metrics, read_metric


def check_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    # Nothing is cut off at the borders.
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def test_losses_of_a_run(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 4 / (1 + step)} | ({"val_loss": 1.0} if step % 4 == 0 else {}) for step in range(9)]
    metrics.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert read_metric(metrics, "val_loss") == ([0, 4, 8], [1, 1, 1])
    plot_metrics(metrics, tmp_path / "loss.png")
    check_picture(tmp_path / "loss.png")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        read_metric(metrics, "loss")
    metrics.write_text('{"step": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="val_loss"):
        plot_metrics(metrics, tmp_path / "loss.png")
    metrics.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        read_metric(metrics, "loss")
    with pytest.raises(DataError, match="nothing to draw"):
        plot_curves({}, tmp_path / "loss.png", title="nothing")
    assert not (tmp_path / "loss.png").exists()


def test_drawing_leaves_no_global_state():
    code = (
        "import sys, tempfile, pathlib\n"
        "from mvar_core.reports.plots import plot_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot_curves({'a': ([0, 1], [0, 1])}, pathlib.Path(tempfile.mkdtemp()) / 'a.png', title='a')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
