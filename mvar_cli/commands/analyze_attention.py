"""`mvar analyze-attention`: where a model's attention goes, measured on images, tokens or its own samples."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_bytes, format_seconds
from mvar_core.errors import ConfigError

if TYPE_CHECKING:
    from mvar_cli.attention_sources import TokenSource
    from mvar_core.analysis.locality_report import LocalityReport
    from mvar_core.config import ModelConfig
    from mvar_core.pipeline import Pipeline

EXAMPLE = "mvar analyze-attention --checkpoint runs/mvar --data digits --out attention"
PAGE = "report.html"


def run(
    checkpoint: options.Checkpoint,
    out: options.Out,
    tokens: options.Tokens = None,
    data: options.OptionalData = None,
    num: Annotated[int, typer.Option("--num", min=1, metavar="N", help="Images to measure.")] = 256,
    keep: Annotated[float, typer.Option("--keep", metavar="PART", help="Attention that settings must keep.")] = 0.95,
    write_preset: Annotated[
        Path | None,
        typer.Option(
            "--write-preset",
            metavar="FILE.yaml",
            help="Write the model with the recommended attention as a preset for train and finetune-from-var.",
        ),
    ] = None,
    tokenizer: options.TokenizerFile = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, metavar="N", help="Images in one pass. Default: as many as are fast."),
    ] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Measure where a model's attention goes, per scale and per neighbourhood, and what prefixes and windows keep it.

    Measured on --tokens, on --data, or without either on samples that the model draws itself. Writes report.html,
    report.json, and the figures as PNG and SVG.
    """
    console = Console(as_json)
    if tokens is not None and data is not None:
        raise ConfigError(
            "Attention is measured on tokens or on images.",
            "Give --tokens or --data, or neither for the model's own samples.",
        )
    if not 0 < keep <= 1:
        raise ConfigError(f"--keep is {keep}; expected a part of the attention, for example 0.95.")
    check_preset_path(write_preset, overwrite)

    from mvar_core.io.files import require_new_directory
    from mvar_core.pipeline import Pipeline

    require_new_directory(out, overwrite)
    if dry_run:
        _show_plan(console, checkpoint, tokenizer, num, tokens or data or "its own samples", out, write_preset)
        return
    training = run_settings(checkpoint) if write_preset else None
    start = time.monotonic()
    pipeline = Pipeline.from_pretrained(
        checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, attention=attention
    )
    source = open_source(
        console, pipeline, checkpoint, tokens, data, tokenizer=tokenizer, num=num, batch_size=batch_size, seed=seed
    )
    report = measure(console, pipeline, source, keep=keep)
    if write_preset is not None:
        write_recommended_preset(write_preset, pipeline.config, report, training)
    values = write_report(report, out, pipeline, source.name, write_preset)
    show_report(console, report, values)
    console.say(f"Written: {out / PAGE}" + (f" and {write_preset}" if write_preset else ""))
    from mvar_core.runtime import peak_memory_bytes

    memory, seconds = peak_memory_bytes(pipeline.device), time.monotonic() - start
    console.finish({**values, "seconds": seconds, "peak_memory_bytes": memory})
    console.note(f"{report.num_images} images in {format_seconds(seconds)}, {format_bytes(memory)}")


def check_preset_path(path: Path | None, overwrite: bool) -> None:
    """Refuse a preset that could not be read again, or that is there already.

    Raises:
        ConfigError: Not a YAML file's name, or a file that may not be replaced.
    """
    if path is None:
        return
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--write-preset {path} does not end in .yaml, which is how --preset knows a file.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is already there.", "Choose another name, or add --overwrite to replace it.")


def open_source(
    console: Console,
    pipeline: Pipeline,
    checkpoint: Path,
    tokens: Path | None,
    data: str | None,
    *,
    tokenizer: Path | None = None,
    num: int,
    batch_size: int | None = None,
    seed: int = 0,
) -> TokenSource:
    """The tokens that are measured; the model draws them where there are neither tokens nor images."""
    from mvar_cli import attention_sources as sources
    from mvar_core.analysis.locality import images_at_once

    asked = {"num": num, "batch_size": batch_size or images_at_once(pipeline.config, pipeline.device), "seed": seed}
    if tokens is not None:
        from mvar_core.models.official import tokenizer_hash_of

        return sources.from_cache(pipeline, tokens, tokenizer_hash_of(checkpoint, tokenizer), **asked)
    if data is not None:
        return sources.from_images(pipeline, data, **asked)
    return sources.from_model(console, pipeline, **asked)


def measure(console: Console, pipeline: Pipeline, source: TokenSource, *, keep: float = 0.95) -> LocalityReport:
    """Run the model over tokens and gather its attention."""
    from mvar_core.analysis.locality import measure_locality

    depth = len(pipeline.transformer.blocks)

    with console.progress("attention", "layers") as progress:
        return measure_locality(
            pipeline.transformer,
            pipeline.quantizer,
            source.batches,
            pipeline.config,
            keep=keep,
            attention=pipeline.attention,
            progress=lambda done: progress(done, source.total * depth, f"image {done // depth} of {source.total}"),
        )


def write_report(
    report: LocalityReport, out: Path, pipeline: Pipeline, source: str, preset: Path | None = None
) -> dict[str, Any]:
    """report.json, the figures and the page; returns what report.json holds."""
    from mvar_cli.attention_page import write_attention_page
    from mvar_core.analysis.reading import read_attention
    from mvar_core.analysis.recommendation import savings
    from mvar_core.io.files import write_json
    from mvar_core.reports.attention_plots import plot_locality

    out.mkdir(parents=True, exist_ok=True)
    plots = plot_locality(report, out)
    bytes_per_value = pipeline.transformer.input_projection.weight.element_size()
    values = {
        "model": pipeline.config.name,
        "source": source,
        **report.to_dict(),
        "reading": read_attention(report).to_dict(),
        "savings": savings(
            pipeline.config, report.recommended, dtype_bytes=bytes_per_value, device=pipeline.device.type
        ),
        "plots": {name: str(path) for name, path in plots.items()},
        "plots_svg": {name: str(path.with_suffix(".svg")) for name, path in plots.items()},
        "report": str(out / PAGE),
        "preset": str(preset) if preset else None,
    }
    write_attention_page(out / PAGE, pipeline.config.name, report, values, plots)
    write_json(out / "report.json", values)
    return values


def run_settings(checkpoint: Path) -> dict[str, Any] | None:
    """What the run that a checkpoint is was configured with; None for a model without its run.

    Raises:
        ConfigError: The run's config.yaml cannot be read.
    """
    from mvar_core.config.presets import load_config, read_preset

    recorded = checkpoint / "config.yaml"
    if not recorded.is_file():
        return None
    values = read_preset(str(recorded))
    load_config(None, base=values)
    return values


def write_recommended_preset(
    path: Path, config: ModelConfig, report: LocalityReport, training: dict[str, Any] | None = None
) -> None:
    """Write the recommended model as a preset; it trains as the checkpoint's run did, where there is one.

    Raises:
        ConfigError: The recommended attention and the run's settings do not fit together.
    """
    import yaml

    from mvar_core.analysis.recommendation import preset_values
    from mvar_core.config.presets import load_config
    from mvar_core.io.files import write_text

    values = preset_values(config, report.recommended, training)
    load_config(None, base=values)
    head = f"# mvar train --preset {path.name} …, or mvar finetune-from-var --preset {path.name} …\n"
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None))


def show_report(console: Console, report: LocalityReport, values: dict[str, Any]) -> None:
    """Two short tables, what they say, and the recommendation."""
    from mvar_cli.attention_page import recommendation_sentence, saving_rows, scale_rows

    names, mass = report.scale_names, report.scale_mass
    console.table(
        "attention: rows look at columns",
        ("scale", *names),
        [
            (name, *(f"{mass[row][key]:.3f}" if key <= row else "" for key in range(len(names))))
            for row, name in enumerate(names)
        ],
    )
    heading, *rows = scale_rows(report)
    console.table("near and far", heading, rows)
    for sentence in [*values["reading"]["sentences"], *report.notes]:
        console.say(sentence)
    console.say(recommendation_sentence(report))
    heading, *rows = saving_rows(values["savings"])
    console.table("what that saves", heading, rows)


def _show_plan(
    console: Console, checkpoint: Path, tokenizer: Path | None, num: int, source: Any, out: Path, preset: Path | None
) -> None:
    from mvar_cli.costs import finish_dry_run
    from mvar_core.models import official
    from mvar_core.models.directory import read_model_config

    config: ModelConfig
    if checkpoint.is_file():
        config = official.convert(checkpoint, tokenizer or official.tokenizer_next_to(checkpoint)).config
    else:
        config = read_model_config(checkpoint)
    plan = [f"measure attention on {num} images of {source}", f"write report and figures to {out}"]
    finish_dry_run(console, config, plan + ([f"write the recommended preset to {preset}"] if preset else []))
