from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mvar_core.analysis.locality import WINDOWS, LocalityReport, recommend
from mvar_core.analysis.plots import plot_curves, plot_locality, plot_metrics, read_metric
from mvar_core.errors import DataError
from mvar_core.scales import ScalePyramid


def report_of(patch_sizes):
    pyramid = ScalePyramid.from_patch_sizes(patch_sizes)
    scales = pyramid.num_scales
    scale_mass = np.tril(0.3 ** np.abs(np.subtract.outer(np.arange(scales), np.arange(scales))))
    scale_mass /= scale_mass.sum(axis=1, keepdims=True)
    own = np.diagonal(scale_mass)[:, None]
    sides = np.array([max(grid) for grid in pyramid.grids])[:, None]
    window_mass = own * np.minimum(1, np.array(WINDOWS)[None, :] / sides) ** 0.5
    return LocalityReport(
        patch_sizes=pyramid.patch_sizes,
        scale_prefixes="all",
        model_windows=(0,) * scales,
        num_images=1,
        scale_mass_by_head=scale_mass[None, None],
        window_mass_by_head=window_mass[None, None],
        entropy_by_head=np.zeros((1, 1, scales)),
        distance_by_head=np.zeros((1, 1, scales)),
        recommended=recommend(scale_mass, window_mass, pyramid.grids, 0.95),
    )


def check_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    # Nothing is cut off at the borders.
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


@pytest.mark.parametrize(
    "patch_sizes",
    [(1,), (1, 2, 4, 8), (1, (2, 3), (4, 6)), (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)],
)
def test_pictures_of_a_report(tmp_path, patch_sizes):
    paths = plot_locality(report_of(patch_sizes), tmp_path / "plots")
    assert set(paths) == {"scale_mass", "window_mass"}
    for path in paths.values():
        check_picture(path)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["scale_mass.png", "window_mass.png"]


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
        "from mvar_core.analysis.plots import plot_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot_curves({'a': ([0, 1], [0, 1])}, pathlib.Path(tempfile.mkdtemp()) / 'a.png', title='a')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
