"""`mvar analyze-attention`: where a model's attention goes, measured on images or tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import options
from mvar_cli.console import Console, format_seconds
from mvar_core.errors import ConfigError

if TYPE_CHECKING:
    from mvar_core.analysis.locality import LocalityReport
    from mvar_core.config import ModelConfig
    from mvar_core.pipeline import Pipeline

EXAMPLE = "mvar analyze-attention --checkpoint runs/mvar --data digits --out attention"


def run(
    checkpoint: options.Checkpoint,
    out: options.Out,
    tokens: options.Tokens = None,
    data: options.OptionalData = None,
    num: Annotated[int, typer.Option("--num", min=1, metavar="N", help="Images to measure.")] = 256,
    keep: Annotated[float, typer.Option("--keep", metavar="PART", help="Attention that settings must keep.")] = 0.95,
    tokenizer: options.TokenizerFile = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Measure where a model's attention goes, per scale and per neighbourhood, and what prefixes and windows keep it.

    Writes report.json and pictures.
    """
    console = Console(as_json)
    if (tokens is None) == (data is None):
        raise ConfigError("Attention is measured on tokens or images.", "Give either --tokens or --data.")
    if not 0 < keep <= 1:
        raise ConfigError(f"--keep is {keep}; expected a part of the attention, for example 0.95.")

    from mvar_core.files import require_new_directory
    from mvar_core.pipeline import Pipeline

    require_new_directory(out, overwrite)
    if dry_run:
        _show_plan(console, checkpoint, num, tokens or data, out)
        return
    pipeline = Pipeline.from_pretrained(
        checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, attention=attention
    )
    start = time.monotonic()
    report = measure(
        console, pipeline, checkpoint, tokens, data, num=num, keep=keep, batch_size=batch_size or 16, seed=seed
    )
    values = write_report(report, out)
    show_report(console, report)
    console.say(f"Written: {out}")
    console.finish({**values, "seconds": time.monotonic() - start})
    console.note(f"{report.num_images} images in {format_seconds(time.monotonic() - start)}")


def measure(
    console: Console,
    pipeline: Pipeline,
    checkpoint: Path,
    tokens: Path | None,
    data: str | None,
    *,
    num: int,
    keep: float,
    batch_size: int,
    seed: int,
) -> LocalityReport:
    """Run the model over evenly chosen tokens or images and gather its attention."""
    import numpy as np

    from mvar_core.analysis.locality import measure_locality

    fetch: Callable[[np.ndarray], Any]
    if tokens is not None:
        from mvar_core.data.tokens import TokenCache

        cache = TokenCache.open(tokens)
        cache.check(_hash(pipeline, checkpoint), pipeline.config.pyramid)
        rows, fetch = len(cache), cache.batch
    else:
        from mvar_core.data.images import ImageRows, open_images

        assert data is not None
        images = ImageRows(open_images(data), pipeline.config.image_shape)

        def encode(chosen: np.ndarray) -> Any:
            pixels, labels = images.batch(chosen)
            return pipeline.encode(pixels), labels

        rows, fetch = len(images), encode
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:num])
    batches = (fetch(chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size))
    with console.progress("attention") as progress:
        return measure_locality(
            pipeline.transformer,
            pipeline.tokenizer.quantizer,
            batches,
            pipeline.config,
            keep=keep,
            attention=pipeline.attention,
            progress=lambda done: progress(done, len(chosen)),
        )


def write_report(report: LocalityReport, out: Path) -> dict[str, Any]:
    """report.json and the pictures; returns what report.json holds."""
    from mvar_core.analysis.plots import plot_locality
    from mvar_core.files import write_json

    out.mkdir(parents=True, exist_ok=True)
    plots = {name: str(path) for name, path in plot_locality(report, out).items()}
    values = {**report.to_dict(), "plots": plots}
    write_json(out / "report.json", values)
    return values


def show_report(console: Console, report: LocalityReport) -> None:
    """Tables of scale mass and window mass, and the recommendation."""
    sides = [str(size) for size in report.patch_sizes]
    mass = report.scale_mass
    console.table(
        "attention by scale: rows are query scales, columns key scales",
        ("side", *sides),
        [
            (side, *(f"{mass[row][key]:.3f}" if key <= row else "" for key in range(len(sides))))
            for row, side in enumerate(sides)
        ],
    )
    windows = report.window_mass
    console.table(
        "attention within a window of the own scale, part of all",
        ("side", *(f"{window}×{window}" for window in windows)),
        [(side, *(f"{windows[window][row]:.3f}" for window in windows)) for row, side in enumerate(sides)],
    )
    for note in report.notes:
        console.say(note)
    best = report.recommended
    console.say(
        f"To keep {best.keep:.0%} of the attention: scale_prefixes {best.scale_prefixes},"
        f" windows {','.join(map(str, best.windows))}"
    )


def _hash(pipeline: Pipeline, checkpoint: Path) -> str:
    from mvar_core.models.directory import tokenizer_hash

    if checkpoint.is_dir():
        return tokenizer_hash(checkpoint)
    raise ConfigError(
        f"{checkpoint} is a published file; a token cache belongs to a model directory.",
        "Run `mvar convert` first, or use --data.",
    )


def _show_plan(console: Console, checkpoint: Path, num: int, source: Any, out: Path) -> None:
    from mvar_cli.costs import finish_dry_run
    from mvar_core.models.directory import read_model_config

    config: ModelConfig = read_model_config(checkpoint)
    finish_dry_run(
        console, config, [f"measure attention on {num} images of {source}", f"write report and pictures to {out}"]
    )
