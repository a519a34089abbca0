"""What the quickstart's page says and shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvar_cli.old_console import format_count, format_number, format_seconds
from mvar_cli.report import Picture, Section, page
from mvar_cli.story import Results, next_commands
from mvar_core.io.files import write_text
from mvar_core.io.pictures import make_grid
from mvar_core.io.pixels import Pixels, from_uint8, to_uint8
from mvar_core.reports.figures import plot_metrics

if TYPE_CHECKING:
    from mvar_core.analysis.attention import AttentionReport
    from mvar_core.pipeline import Pipeline


def measure_rows(results: Results) -> list[tuple[str, str, str, str]]:
    """The table of measures: name, value, what to compare it with, what it would catch."""
    measures, tokenizer = results.measures, results.tokenizer
    diversity = measures.pixel_diversity / measures.pixel_diversity_real
    distance = measures.nearest_distance / measures.nearest_distance_real
    return [
        ("measure", "value", "compare with", "what it would catch"),
        (
            "classifier accuracy",
            f"{measures.classifier_accuracy:.1%}",
            f"real {measures.classifier_accuracy_real:.1%}",
            "the wrong digit",
        ),
        (
            "demo-FID to training images",
            format_number(measures.demo_fid),
            f"training images redrawn {format_number(measures.demo_fid_floor)},"
            f" real test {format_number(measures.demo_fid_real)},"
            f" class means {format_number(measures.demo_fid_class_means)}",
            "features unlike those of digits",
        ),
        (
            "pixel diversity within a class",
            format_number(measures.pixel_diversity),
            f"{diversity:.0%} of real {format_number(measures.pixel_diversity_real)}",
            "the same image over and over",
        ),
        (
            "distance to the nearest training image",
            format_number(measures.nearest_distance),
            f"{distance:.0%} of real {format_number(measures.nearest_distance_real)}",
            "copies of training images",
        ),
        ("reconstruction PSNR (dB)", format_number(tokenizer.psnr), "test images", "a tokenizer that blurs"),
        ("codebook in use", f"{tokenizer.code_usage:.1%}", "all codes", "dead codes"),
    ]


def write_page(out: Path, pipeline: Pipeline, test: Tensor, results: Results, attention: AttentionReport) -> None:
    """Write index.html and the curves it shows.

    Args:
        out: The quickstart's directory; grid.png and the attention's pictures are there already.
        pipeline: The trained model.
        test: Real images that were not trained on, uint8 (N, 3, H, W).
        results: What was measured.
        attention: Where the attention goes.
    """
    plot_metrics(
        out / "tokenizer" / "metrics.jsonl",
        out / "tokenizer.png",
        keys=("reconstruction", "quantizer"),
        title="Tokenizer",
    )
    plot_metrics(out / "mvar" / "metrics.jsonl", out / "mvar.png", title="MVAR, cross-entropy per token")
    config = results.config
    sides = str(config.pyramid)
    best = attention.recommended
    sections = [
        Section(
            "Samples",
            "One row per class. How far they are from the training images is measured below.",
            [Picture.of_file(out / "grid.png", "drawn by the model", 2)],
        ),
        Section(
            "How a sample comes about",
            f"Token maps of sides {sides} are drawn one after the other; each column shows the image after one more.",
            [Picture.of_pixels(_stages(pipeline), "after each scale", 2)],
        ),
        Section(
            "What the tokenizer keeps",
            "Test images above, and below what is left of them after tokens alone.",
            [Picture.of_pixels(_reconstructions(pipeline, test[:16]), "original, reconstruction", 2)],
        ),
        Section(
            "Measures",
            "Each alone can be had by cheating, by repeating one image or by copying; together they cannot.",
            rows=measure_rows(results),
        ),
        Section(
            "Training",
            pictures=[
                Picture.of_file(out / "tokenizer.png", f"tokenizer, {results.tokenizer.steps} steps"),
                Picture.of_file(out / "mvar.png", f"MVAR, {config.train.steps} steps"),
            ],
            side_by_side=True,
        ),
        Section(
            "Attention",
            f"To keep {best.keep:.0%} of the attention: scale_prefixes {best.scale_prefixes},"
            f" windows {', '.join(map(str, best.windows))}. {' '.join(attention.notes)}",
            [
                Picture.of_file(out / "attention" / "scale_mass.png", "which scales are looked at"),
                Picture.of_file(out / "attention" / "window_mass.png", "how near in the own scale"),
            ],
            side_by_side=True,
        ),
        Section(
            "Time",
            rows=[("stage", "time"), *((name, format_seconds(spent)) for name, spent in results.stage_seconds.items())],
        ),
        Section("What to type next", code=next_commands(out)),
    ]
    introduction = (
        f"A tokenizer and an MVAR of {format_count(results.parameters)} parameters, trained from nothing on the bundled"
        f" handwritten digits, seed {config.seed}."
    )
    write_text(out / "index.html", page("MVAR on handwritten digits", introduction, sections))


def _stages(pipeline: Pipeline) -> Pixels:
    """One row per class, one column per scale."""
    classes = pipeline.transformer.no_class
    drawn = pipeline.sample(range(classes), seed=0, stages=True)
    assert drawn.stages is not None
    return make_grid(drawn.stages.flatten(0, 1), drawn.stages.shape[1])


def _reconstructions(pipeline: Pipeline, images: Tensor) -> Pixels:
    """Originals in one row, reconstructions in the next."""
    decoded = pipeline.decode(pipeline.encode(from_uint8(images.permute(0, 2, 3, 1))))
    both = torch.cat([images.permute(0, 2, 3, 1), to_uint8(decoded).cpu()])
    return make_grid(both, len(images))
