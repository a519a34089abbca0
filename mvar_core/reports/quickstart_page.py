"""The quickstart's page: samples, how they are generated, metrics, training curves, attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mvar_core.evaluation.demo import DemoScores
from mvar_core.formatting import format_number, format_seconds
from mvar_core.io.pixels import Pixels, make_grid
from mvar_core.reports.figures import plot_metrics
from mvar_core.reports.pages import TableRows, picture, svg_figure, write_page


def metric_rows(
    scores: DemoScores, psnr: float, code_usage: float, memorised: float, loss: float, held_out_loss: float
) -> TableRows:
    """The table of metrics: value, what to compare it with, what it would detect; without those that are nan."""
    number = format_number
    diversity = scores.pixel_diversity / scores.pixel_diversity_real
    distance = scores.nearest_distance / scores.nearest_distance_real
    fid = (
        f"training images resampled {number(scores.demo_fid_floor)}, real test {number(scores.demo_fid_real)},"
        f" class means {number(scores.demo_fid_class_means)}"
    )
    rows: list[tuple[float, list[str]]] = [
        (scores.classifier_accuracy, ["classifier accuracy", f"{scores.classifier_accuracy:.1%}",
         f"real {scores.classifier_accuracy_real:.1%}", "the wrong digit"]),
        (scores.demo_fid, ["demo-FID to training images", number(scores.demo_fid), fid,
         "features unlike those of digits"]),
        (diversity, ["pixel diversity within a class", number(scores.pixel_diversity),
         f"{diversity:.0%} of real {number(scores.pixel_diversity_real)}", "the same image over and over"]),
        (distance, ["distance to the nearest training image", number(scores.nearest_distance),
         f"{distance:.0%} of real {number(scores.nearest_distance_real)}", "copies of training images"]),
        (memorised, ["nearer than half of what is usual for held-out images", f"{memorised:.0%}", "none",
         "memorised images"]),
        (held_out_loss, ["loss on held-out images", number(held_out_loss), f"training {number(loss)}", "memorisation"]),
        (psnr, ["reconstruction PSNR (dB)", number(psnr), "test images", "a tokenizer that blurs"]),
        (code_usage, ["codebook usage", f"{code_usage:.1%}", "all codes", "dead codes"]),
    ]  # fmt: skip
    return [
        ["metric", "value", "compare with", "what it detects"],
        *(row for value, row in rows if not math.isnan(value)),
    ]


def time_rows(seconds: Mapping[str, float]) -> TableRows:
    """The table of stages."""
    return [["stage", "time"], *([name, format_seconds(spent)] for name, spent in seconds.items())]


def write_quickstart_page(
    path: Path,
    *,
    grid: Pixels,
    stages: Tensor,
    originals: Tensor,
    reconstructions: Tensor,
    attention: Mapping[str, str],
    neighbours: Sequence[tuple[Tensor, Tensor, str]],
    **texts: object,
) -> None:
    """Write the page, and the training curves of the runs `tokenizer` and `mvar` in its directory.

    Images are uint8: `grid` of samples, `stages` (classes, scales, H, W, 3) of one sample per class, `originals` and
    `reconstructions` (N, H, W, 3). `attention` holds the SVG files of the attention report by name, `neighbours`
    images, those nearest to them and a caption, `texts` what else the template shows.
    """
    out = path.parent
    curves = []
    for run, title, keys in (
        ("tokenizer", "Tokenizer", ("reconstruction", "quantizer")),
        ("mvar", "MVAR, cross-entropy per token", ("loss", "val_loss")),
    ):
        plot_metrics(out / run / "metrics.jsonl", out / f"{run}.svg", keys=keys, title=title)
        curves.append(svg_figure(out / f"{run}.svg", f"{title}."))
    write_page(
        path,
        "quickstart.html.j2",
        samples=picture(grid, "samples"),
        stages=picture(make_grid(stages.flatten(0, 1), stages.shape[1]), "after each scale"),
        reconstructions=picture(
            make_grid(torch.cat([originals, reconstructions]), len(originals)), "original, reconstruction"
        ),
        neighbours=[
            picture(make_grid(torch.cat([images, nearest]), len(images)), caption)
            for images, nearest, caption in neighbours
        ],
        curves=curves,
        attention=[
            svg_figure(Path(attention["scale_mass"]), "Which scales are attended to."),
            svg_figure(Path(attention["window_mass"]), "How near, within a scale."),
        ],
        **texts,
    )
