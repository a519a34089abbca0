"""`mvar sample`: class-conditional images, written as they come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import options
from mvar_cli.console import Console, format_bytes, format_seconds
from mvar_core.errors import ConfigError

if TYPE_CHECKING:
    from mvar_cli.console import Progress
    from mvar_cli.outputs import SampleWriter
    from mvar_core.config import ModelConfig
    from mvar_core.pipeline import Pipeline

SHOWN_SETTINGS = ("cfg", "top_k", "top_p", "more_smooth", "cfg_schedule", "cfg_scales", "seed")
EXAMPLE = "mvar sample --checkpoint runs/quickstart/mvar --class 3,7 --num 8 --out out"


def run(
    checkpoint: options.Checkpoint,
    classes: Annotated[
        list[str],
        typer.Option("--class", metavar="IDS|NAME|all", help="Labels, a comma list, a name, or all; repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="A directory, or a file for npz and grid.")],
    num: Annotated[int, typer.Option("--num", min=1, metavar="N", help="Images per class.")] = 1,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance; 0 is none. Default: the model's.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Keep the k likeliest codes; 0 keeps all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep this much probability; 0 or 1 keep all.")
    ] = None,
    more_smooth: Annotated[
        bool | None, typer.Option("--more-smooth/--no-more-smooth", help="Smoother looks; never for metrics.")
    ] = None,
    cfg_schedule: options.GuidanceSchedule = None,
    cfg_scales: options.GuidanceScales = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    memory: options.Memory = None,
    output_format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="png, npz or grid. Default: as --out ends.")
    ] = None,
    save_tokens: Annotated[bool, typer.Option("--save-tokens", help="Also write the token indices.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Also a strip per image: after each scale.")] = False,
    tokenizer: options.TokenizerFile = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Draw class-conditional images.

    An image depends on the seed, its number, its class, the settings and the weights alone: not on the batch size.
    """
    from mvar_cli.outputs import output_target, strips_directory
    from mvar_cli.selection import parse_classes

    console = Console(as_json)
    output_format = output_format or {".npz": "npz", ".png": "grid"}.get(out.suffix.lower(), "png")
    target = output_target(out, output_format, overwrite)
    if save_tokens and output_format == "grid":
        raise ConfigError(
            "--format grid has no place for tokens.", "Use --format png or npz, or leave out --save-tokens."
        )

    from mvar_core.pipeline import Pipeline
    from mvar_core.sampling.budget import IMAGES_AT_ONCE

    if checkpoint.is_dir():
        config = _check_early(checkpoint, classes, top_k)
        if dry_run:
            _show_plan(console, config, classes, num, batch_size, cfg, dtype, target)
            return
    pipeline = Pipeline.from_pretrained(
        checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, attention=attention
    )
    config = pipeline.config
    settings = pipeline.sampling_settings(
        cfg,
        top_k,
        top_p,
        more_smooth,
        options.parse_schedule(cfg_schedule),
        options.parse_scale_range(cfg_scales),
    )
    chosen = parse_classes(classes, pipeline.transformer.no_class, config.class_names)
    labels = [label for label in chosen for _ in range(num)]
    if dry_run:
        _show_plan(console, config, classes, num, batch_size, cfg, dtype, target)
        return
    batch = min(batch_size or IMAGES_AT_ONCE, len(labels))
    drawing: dict[str, Any] = {
        "cfg": settings.cfg,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "more_smooth": settings.more_smooth,
        "cfg_schedule": settings.cfg_schedule,
        "cfg_scales": settings.cfg_scales,
        "seed": seed,
        "memory": options.parse_bytes(memory) if memory else None,
        "stages": stages,
    }
    columns = 1 if stages else num if 1 < num <= 24 and len(chosen) > 1 else math.ceil(math.sqrt(len(labels)))
    with ExitStack() as stack:
        writer, directory = _open_writer(stack, target, output_format, len(labels), columns, save_tokens, stages)
        seconds = _draw(console, pipeline, labels, batch, drawing, writer)
        names = writer.close()
    outputs = [str(directory / name) for name in names]
    if stages and output_format == "png":
        outputs += [str(strips_directory(directory) / name) for name in names if name.endswith(".png")]
    _report(console, pipeline, len(labels), batch, seconds, outputs, target, drawing)


def _check_early(checkpoint: Path, classes: list[str], top_k: int | None) -> ModelConfig:
    """Find what can be found wrong before gigabytes of weights are read."""
    from mvar_cli.selection import parse_classes
    from mvar_core.models.directory import read_model_config
    from mvar_core.sampling.sampler import check_settings

    config = read_model_config(checkpoint)
    if top_k is not None:
        check_settings(config.sampling.model_copy(update={"top_k": top_k}), config)
    if config.transformer is not None:
        parse_classes(classes, config.transformer.num_classes, config.class_names)
    return config


def _open_writer(
    stack: ExitStack, target: Path, output_format: str, total: int, columns: int, save_tokens: bool, stages: bool
) -> tuple[SampleWriter, Path]:
    """A writer on a temporary name that the stack turns into the target, and where its outputs will lie."""
    from mvar_cli import outputs
    from mvar_core.files import atomic_directory, atomic_path

    writer: SampleWriter
    if output_format == "png":
        strips = stack.enter_context(atomic_directory(outputs.strips_directory(target))) if stages else None
        writer = outputs.PngWriter(stack.enter_context(atomic_directory(target)), strips, total, save_tokens)
        return stack.enter_context(writer), target
    temporary = stack.enter_context(atomic_path(target))
    if output_format == "npz":
        writer = outputs.NpzWriter(temporary, total, save_tokens)
    else:
        writer = outputs.GridWriter(temporary, columns)
    return stack.enter_context(writer), target


def shifted(progress: Progress, start: int, total: int) -> Callable[[int, int], None]:
    """Reports of a part of the images as reports of all of them."""
    return lambda done, _: progress(start + done, total)


def _draw(
    console: Console, pipeline: Pipeline, labels: list[int], batch: int, drawing: dict[str, Any], writer: SampleWriter
) -> float:
    """Sample batch by batch into the writer; returns the seconds it took."""
    import numpy as np

    from mvar_core.runtime import synchronize

    start_time = time.monotonic()
    with console.progress("sampling") as progress:
        progress(0, len(labels))
        for start in range(0, len(labels), batch):
            part = labels[start : start + batch]
            samples = pipeline.sample(
                part,
                indices=range(start, start + len(part)),
                batch_size=batch,
                progress=shifted(progress, start, len(labels)),
                **drawing,
            )
            stages = samples.stages.numpy() if samples.stages is not None else None
            writer.write(samples.images.numpy(), np.asarray(part, np.int64), samples.tokens.numpy(), stages)
            progress(start + len(part), len(labels))
    synchronize(pipeline.device)
    return time.monotonic() - start_time


def _report(
    console: Console,
    pipeline: Pipeline,
    count: int,
    batch: int,
    seconds: float,
    outputs: list[str],
    target: Path,
    drawing: dict[str, Any],
) -> None:
    from mvar_core.runtime import peak_memory_bytes

    memory = peak_memory_bytes(pipeline.device)
    console.table(
        pipeline.config.name,
        ("images", "time", "images/s", "batch", "peak memory", "device", "cfg", "top-k", "top-p"),
        [
            (
                count,
                format_seconds(seconds),
                count / seconds,
                batch,
                format_bytes(memory),
                str(pipeline.device),
                drawing["cfg"],
                drawing["top_k"],
                drawing["top_p"],
            )
        ],
    )
    console.say(f"Written: {target}")
    console.finish(
        {
            "images": count,
            "seconds": seconds,
            "images_per_second": count / seconds,
            "peak_memory_bytes": memory,
            "outputs": outputs,
            "batch_size": batch,
            "device": str(pipeline.device),
            "settings": {name: drawing[name] for name in SHOWN_SETTINGS},
        }
    )


def _show_plan(
    console: Console,
    config: ModelConfig,
    classes: list[str],
    num: int,
    batch_size: int | None,
    cfg: float | None,
    dtype: str,
    target: Path,
) -> None:
    from mvar_cli.costs import cost_of, finish_dry_run
    from mvar_cli.selection import parse_classes

    count = len(parse_classes(classes, config.transformer.num_classes if config.transformer else 0, config.class_names))
    batch = min(batch_size or 1, count * num)
    guided = (config.sampling.cfg if cfg is None else cfg) > 0
    cost = cost_of(config, batch_size=batch, dtype=dtype, guided=guided)
    steps = [f"draw {count * num} images: {num} of each of {count} classes", f"write {target}"]
    finish_dry_run(console, config, steps, cost=cost, images=count * num)
