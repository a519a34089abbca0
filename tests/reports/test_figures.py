from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mvar_core.errors import DataError
from mvar_core.reports.figures import plot_attention, plot_batches, plot_metrics


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
    plot_metrics(metrics, tmp_path / "loss.png")
    check_picture(tmp_path / "loss.png")


def test_what_cannot_be_plotted_is_refused(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        plot_metrics(metrics, tmp_path / "loss.png")
    metrics.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    with pytest.raises(DataError, match="val_loss"):
        plot_metrics(metrics, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_plotting_leaves_no_global_state(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    code = (
        "import sys, pathlib\n"
        "from mvar_core.reports.figures import plot_metrics\n"
        "assert 'matplotlib' not in sys.modules\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "plot_metrics(folder / 'metrics.jsonl', folder / 'a.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def batch_rows(batches, names=("VAR, published style", "VAR", "MVAR", "3 scale prefixes")):
    return [
        {
            "name": name,
            "batch_size": batch,
            "seconds": None if name == "VAR" and batch == 64 else 1.0,
            "images_per_second": batch / (1 + order),
            "peak_memory_bytes": 2**30 * (1 + batch * (4 - order)),
        }
        for batch in batches
        for order, name in enumerate(names)
    ]


def attention_rows(sides, windows):
    return [
        {
            "side": side,
            "tokens": side**2 if isinstance(side, int) else side[0] * side[1],
            "window": window,
            "backend": backend,
            "batch": 1,
            "seconds": 1e-4 * order if window or order < 3 else None,
            "dtype": "float32",
            "device": "cpu",
        }
        for side in sides
        for window in windows
        for order, backend in enumerate(("dense", "tiled", "flex"), start=1)
    ]


@pytest.mark.parametrize("batches", [(4,), (1, 2, 8, 64)])
def test_memory_and_speed_against_the_batch(tmp_path, batches):
    plot_batches(batch_rows(batches), tmp_path / "bench.png", title="MVAR-d16: sampling")
    check_picture(tmp_path / "bench.png")
    plot_batches(batch_rows(batches), tmp_path / "bench.svg", title="MVAR-d16: sampling")
    text = (tmp_path / "bench.svg").read_text()
    assert text.startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.png", "bench.svg"]


@pytest.mark.parametrize(("sides", "windows"), [((16,), (7,)), ((8, [16, 24], 32, 64), (0, 3, 7))])
def test_attention_against_the_side(tmp_path, sides, windows):
    plot_attention(attention_rows(sides, windows), tmp_path / "sweep.png")
    check_picture(tmp_path / "sweep.png")


def test_rows_without_figures_are_refused(tmp_path):
    unmeasured = [{**row, "seconds": None} for row in batch_rows((1, 2))]
    with pytest.raises(DataError, match="nothing to plot"):
        plot_batches(unmeasured, tmp_path / "bench.png", title="none")
    with pytest.raises(DataError, match="nothing to plot"):
        plot_attention([], tmp_path / "bench.png")
    assert list(tmp_path.iterdir()) == []
