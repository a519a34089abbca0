from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from attention_reports import report_of
from PIL import Image

from mvar_core.reports.attention import FIGURES, plot_attention_report


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
    ("patch_sizes", "prefixes", "windows"),
    [((1,), "all", ()), ((1, 2, 4, 8), 1, (0, 0, 0, 3)), ((1, (2, 3), (4, 6)), 2, ())],
)
def test_figures_of_a_report(tmp_path, patch_sizes, prefixes, windows):
    paths = plot_attention_report(report_of(patch_sizes, prefixes, windows), tmp_path / "plots")
    assert list(paths) == ["scale_mass", "window_mass", "last_scale", "layers"]
    for name, path in paths.items():
        assert path.name == f"{name}.png"
        check_picture(path)
        assert ElementTree.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert len(list((tmp_path / "plots").iterdir())) == 2 * len(paths)


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_figures_say_what_they_show():
    report = report_of((1, 2, 4, 8))
    said = {name: texts(make(report)) for name, make in FIGURES.items()}
    for row in range(4):
        for column in range(row + 1):
            value = report.scale_mass[row, column]
            assert (f"{value:.2f}".removeprefix("0") if value < 0.995 else "1") in said["scale_mass"]
    assert {"Within k×k of the own scale", "Within k×k of the scale before", "8, even spread"} <= set(
        said["window_mass"]
    )
    for scale, grid in enumerate(("1×1", "2×2", "4×4", "8×8")):
        value = f"{report.scale_mass[-1, scale]:.2f}".removeprefix("0")
        assert f"{grid}\n{value}" in said["last_scale"]
    assert {"layer", "On the own scale", "How evenly it is spread"} <= set(said["layers"])
    alone = texts(FIGURES["window_mass"](report_of((1, 2, 4, 8), 1)))
    assert "Within k×k of the scale before" not in alone


def test_figures_show_the_values_of_the_report():
    report = report_of((1, 2, 4, 8))
    shown = FIGURES["scale_mass"](report).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown.filled(0), report.scale_mass)
    assert shown.mask.tolist() == np.triu(np.ones((4, 4), bool), k=1).tolist()

    own, before, *_ = FIGURES["window_mass"](report).axes
    for line, scale in zip(own.lines, (1, 2, 3), strict=False):
        ks, values = line.get_data()
        np.testing.assert_allclose(values, [report.window_share[k][scale] for k in ks])
        assert values[-1] == pytest.approx(1)
        assert line.get_label() == report.pyramid.names[scale]
    for line, scale in zip(before.lines, (1, 2, 3), strict=False):
        ks, values = line.get_data()
        projected = [report.window_mass_by_scale[k][scale, scale - 1] / report.scale_mass[scale, scale - 1] for k in ks]
        np.testing.assert_allclose(values, projected)
    np.testing.assert_allclose(own.lines[-1].get_data()[1][:4], [1 / 64, 9 / 64, 25 / 64, 49 / 64])

    panels = FIGURES["last_scale"](report).axes
    for scale in range(4):
        keys = panels[scale].images[0].get_array()
        np.testing.assert_allclose(2.0**keys / 85, report.last_scale_keys[scale], rtol=1e-6)
        placed = panels[4 + scale].images[0].get_array()
        found = 2.0**placed * report.even.last_scale_displacements[scale]
        inside = np.abs(placed) < 2  # colours end there
        np.testing.assert_allclose(found[inside], report.last_scale_displacements[scale][inside], rtol=1e-6)

    own, spread, *_ = FIGURES["layers"](report).axes
    by_layer = report.scale_mass_by_head.mean(axis=1)
    np.testing.assert_allclose(own.images[0].get_array(), np.diagonal(by_layer, axis1=1, axis2=2))
    entropy = report.entropy_by_head.mean(axis=1)[:, 1:] / report.even.entropy_by_head[0, 0][1:]
    np.testing.assert_allclose(spread.images[0].get_array()[:, 1:], entropy)
    assert spread.images[0].get_array().mask[:, 0].all()


def test_no_text_lies_on_another():
    """Of each figure at the published pyramid, no two labels overlap."""
    from matplotlib.text import Text

    report = report_of((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16)
    for name, make in FIGURES.items():
        figure = make(report)
        figure.draw_without_rendering()
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.findobj(Text)
            if text.get_text().strip() and text.get_visible()
        ]
        assert len(boxes) > 8
        for index, (first, box) in enumerate(boxes):
            for second, other in boxes[index + 1 :]:
                width = min(box.x1, other.x1) - max(box.x0, other.x0)
                height = min(box.y1, other.y1) - max(box.y0, other.y0)
                assert min(width, height) < 2 or first == second, (name, first, second)


def test_a_figure_is_the_same_bytes_again_and_leaves_no_settings(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report = report_of((1, 2, 4))
    first, second = plot_attention_report(report, tmp_path / "a"), plot_attention_report(report, tmp_path / "b")
    for name in first:
        assert first[name].with_suffix(".svg").read_bytes() == second[name].with_suffix(".svg").read_bytes()
    assert dict(matplotlib.rcParams) == before
