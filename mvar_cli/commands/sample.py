"""`mvar sample`: class-conditional images, written as they come; stopped, it goes on where it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import options
from mvar_cli.console import Console, format_bytes, format_seconds
from mvar_cli.processes import Processes, processes
from mvar_cli.sample_request import NamedModel, Place, Wanted
from mvar_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mvar_cli.parts import Parts, Request
    from mvar_core.config import ModelConfig
    from mvar_core.pipeline import Pipeline

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
    compile_blocks: Annotated[
        bool,
        typer.Option("--compile", help="Compile the blocks first: for long runs.", rich_help_panel="Machine"),
    ] = False,
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Draw class-conditional images.

    An image depends on the seed, its number, its class, the settings and the weights alone: not on the batch size, the
    number of processes, or what was drawn before. The same command again goes on with a run that was stopped.
    """
    from mvar_cli.outputs import output_target

    output_format = output_format or {".npz": "npz", ".png": "grid"}.get(out.suffix.lower(), "png")
    target = output_target(out, output_format)
    if save_tokens and output_format == "grid":
        raise ConfigError(
            "--format grid has no place for tokens.", "Use --format png or npz, or leave out --save-tokens."
        )
    budget = options.parse_bytes(memory) if memory is not None else None
    given = {
        "cfg": cfg,
        "top_k": top_k,
        "top_p": top_p,
        "more_smooth": more_smooth,
        "cfg_schedule": options.parse_schedule(cfg_schedule),
        "cfg_scales": options.parse_scale_range(cfg_scales),
    }
    wanted = Wanted(classes, num, given, seed, output_format, save_tokens, stages, attention)
    place = Place(target, out, output_format, overwrite)
    with processes() as team:
        console = team.console(as_json)
        _check_place(team, place)
        model = NamedModel(checkpoint, tokenizer, team.device(device), dtype, attention, compiled=compile_blocks)
        config = model.early_config()
        if dry_run:
            _show_plan(console, config, wanted, batch_size, dtype, target)
            return
        request = wanted.request(config, model)
        parts, kept = _check_parts(team, place, request)
        pipeline = None
        if len(kept) < len(request.shards):
            pipeline = model.load()
        batches = {"batch_size": batch_size, "memory": budget}
        _make(console, team, parts, pipeline, place, batches)


def _check_place(team: Processes, place: Place) -> None:
    """Refuse an output that is there before anything slow; one that is on its way is looked at when more is known."""
    from mvar_cli.drawing import agreed
    from mvar_cli.outputs import require_free
    from mvar_cli.parts import parts_directory

    def check() -> None:
        if not parts_directory(place.target).is_dir():
            require_free(place.target, place.out, place.output_format, place.overwrite)

    agreed(team, check)


def _check_parts(team: Processes, place: Place, request: Request) -> tuple[Parts, set[int]]:
    """The shards' directory, and which of them are there; refuses what does not fit together."""
    from mvar_cli.drawing import agreed
    from mvar_cli.outputs import is_published, require_free
    from mvar_cli.parts import Parts

    parts = Parts(place.target, request)

    def check() -> set[int]:
        parts.require_same(place.overwrite)
        same = not parts.difference()
        if same and is_published(parts):
            return set(request.shards)
        require_free(place.target, place.out, place.output_format, place.overwrite)
        kept = parts.intact() if same else set()
        parts.require_space(parts.samples_in(kept))
        return kept

    return parts, agreed(team, check)


def _make(
    console: Console,
    team: Processes,
    parts: Parts,
    pipeline: Pipeline | None,
    place: Place,
    batches: dict[str, int | None],
) -> None:
    """Draw what is missing, put it together, and report."""
    from mvar_cli.drawing import termination_interrupts
    from mvar_cli.launch import leave
    from mvar_cli.outputs import is_published, publish, put_together

    request = parts.request
    begun = time.monotonic()
    drawn = 0
    drawing_seconds = 0.0
    try:
        with termination_interrupts():
            if pipeline is not None:
                drawn = _draw(console, team, parts, pipeline, batches)
                drawing_seconds = time.monotonic() - begun
            if team.first:
                with console.progress("putting together") as progress:
                    if is_published(parts):
                        publish(parts)
                    else:
                        put_together(parts, place.overwrite, progress)
    except KeyboardInterrupt:
        done = parts.samples_in(parts.present())
        if team.first:
            _report_interruption(console, parts, done, time.monotonic() - begun)
        if team.count == 1:  # else another process may be about to finish a shard
            parts.remove_if_empty()
        raise leave(130) from None
    except BaseException:
        parts.remove_if_empty()
        raise
    if team.first:
        from mvar_core.sampling.budget import IMAGES_AT_ONCE

        batch = min(batches["batch_size"] or IMAGES_AT_ONCE, request.total)
        _report(console, team, parts, pipeline, batch, drawn, drawing_seconds, time.monotonic() - begun)


def _draw(console: Console, team: Processes, parts: Parts, pipeline: Pipeline, batches: dict[str, int | None]) -> int:
    """Draw this process's part of the missing shards; returns how many samples all processes have drawn."""
    from mvar_cli.drawing import Progressing, agreed, draw_shards, pipeline_draws
    from mvar_cli.parts import MANIFEST
    from mvar_cli.writers import WriterPool

    request = parts.request

    def start() -> set[int]:
        parts.start()
        kept = parts.intact()
        for shard in parts.present() - kept:
            parts.shard_path(shard).unlink()
        return kept

    kept = agreed(team, start)
    if not (parts.directory / MANIFEST).is_file():
        raise DataError(
            f"Process {team.rank} does not see {parts.directory}, which the first process has made.",
            "Choose an --out on a file system that all machines share.",
        )
    missing = [shard for shard in request.shards if shard not in kept]
    own = missing[team.rank :: team.count]
    if kept:
        console.note(f"Going on: {parts.samples_in(kept)} of {request.total} images are there already.")
    draw = pipeline_draws(pipeline, stages=request.stages, **request.settings, **batches)
    with console.progress("sampling") as progress:
        progressing = Progressing(parts, kept, own, progress)
        draw_shards(parts, own, draw, progressing, WriterPool(processes=team.count))
        if team.first:
            progressing.wait_for_others()
    return request.total - parts.samples_in(kept)


def _report_interruption(console: Console, parts: Parts, done: int, seconds: float) -> None:
    total = parts.request.total
    if done:
        console.note(f"Interrupted; {done} of {total} images are kept. The same command goes on from here.")
    else:
        console.note("Interrupted before the first image was finished.")
    console.finish({"images": done, "total": total, "interrupted": True, "seconds": seconds, "outputs": []})


def _report(
    console: Console,
    team: Processes,
    parts: Parts,
    pipeline: Pipeline | None,
    batch: int,
    drawn: int,
    drawing_seconds: float,
    seconds: float,
) -> None:
    import torch

    from mvar_cli.outputs import outputs_of
    from mvar_core.runtime import peak_memory_bytes

    request = parts.request
    device = pipeline.device if pipeline is not None else torch.device(request.device)
    memory = peak_memory_bytes(device)
    speed = drawn / drawing_seconds if drawn else None
    settings = request.settings
    row: dict[str, Any] = {
        "images": request.total,
        "time": format_seconds(seconds),
        "images/s": speed,
        "batch": batch,
        "peak memory": format_bytes(memory),
        "device": str(device),
        "cfg": settings["cfg"],
        "top-k": settings["top_k"],
        "top-p": settings["top_p"],
    }
    if drawn < request.total:
        row["drawn before"] = request.total - drawn
    if team.count > 1:
        row["processes"] = team.count
    console.table(request.model, tuple(row), [tuple(row.values())])
    console.say(f"Written: {parts.target}")
    console.finish(
        {
            "images": request.total,
            "resumed": request.total - drawn,
            "seconds": seconds,
            "images_per_second": speed,
            "peak_memory_bytes": memory,
            "outputs": outputs_of(parts),
            "batch_size": batch,
            "processes": team.count,
            "device": str(device),
            "settings": settings,
        }
    )


def _show_plan(
    console: Console, config: ModelConfig, wanted: Wanted, batch_size: int | None, dtype: str, target: Path
) -> None:
    from mvar_cli.costs import cost_of, finish_dry_run

    settings = wanted.settings(config)
    count = len(wanted.labels(config))
    total = count * wanted.num
    batch = min(batch_size or 1, total)
    cost = cost_of(config, batch_size=batch, dtype=dtype, guided=settings.guided)
    steps = [f"draw {total} images: {wanted.num} of each of {count} classes", f"write {target}"]
    finish_dry_run(console, config, steps, cost=cost, images=total)
