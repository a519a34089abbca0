"""`mvar sample`: class-conditional images, written as they come; stopped, it goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console
from mvar_cli.processes import processes
from mvar_cli.sample_request import NamedModel, Place, Wanted

if TYPE_CHECKING:
    from mvar_core.config import ModelConfig

EXAMPLE = "mvar sample --checkpoint runs/quickstart/mvar --class 3,7 --num 8 --out out"


def run(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="A directory, or a file for npz and grid.")],
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="IDS|NAME|all", help="Labels, a comma list, a name, or all; repeatable."),
    ] = None,
    words: options.Words = None,
    vectors: options.VectorsFile = None,
    num: Annotated[int, typer.Option("--num", min=1, metavar="N", help="Images per class, text or vector.")] = 1,
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
    """Draw images of classes; of texts or vectors, where the model is conditioned on them.

    An image depends on the seed, its number, its class, text or vector, the settings and the weights alone: not on the
    batch size, the number of processes, or what was drawn before. The same command again goes on with a run that was
    stopped.
    """
    if not classes and not words and vectors is None:
        raise typer.BadParameter("say what to draw with --class, --words or --vectors", param_hint="--class")
    from mvar_cli.drawing import pipeline_draws
    from mvar_cli.outputs import choose_format, output_target
    from mvar_cli.sample_run import check_parts, check_place, make

    output_format = choose_format(out, output_format, save_tokens)
    target = output_target(out, output_format)
    budget = options.parse_bytes(memory) if memory is not None else None
    given = {
        "cfg": cfg,
        "top_k": top_k,
        "top_p": top_p,
        "more_smooth": more_smooth,
        "cfg_schedule": options.parse_schedule(cfg_schedule),
        "cfg_scales": options.parse_scale_range(cfg_scales),
    }
    wanted = Wanted(
        classes or [], num, given, seed, output_format, save_tokens, stages, attention, words or (), vectors
    )
    place = Place(target, out, output_format, overwrite)
    with processes() as team:
        console = team.console(as_json)
        check_place(team, place)
        model = NamedModel(checkpoint, tokenizer, team.device(device), dtype, attention, compiled=compile_blocks)
        config = model.early_config()
        if dry_run:
            _show_plan(console, config, wanted, batch_size, dtype, target)
            return
        request = wanted.request(config, model)
        parts, kept = check_parts(team, place, request)
        draw = None
        if len(kept) < len(request.shards):
            batches = {"batch_size": batch_size, "memory": budget}
            draw = pipeline_draws(model.load(), request.conditions_of, stages=stages, **request.settings, **batches)
        make(console, team, parts, draw, place, model.device, batch_size)


def _show_plan(
    console: Console, config: ModelConfig, wanted: Wanted, batch_size: int | None, dtype: str, target: Path
) -> None:
    from mvar_cli.costs import cost_of, finish_dry_run

    settings = wanted.settings(config)
    count, kind = len(wanted.chosen(config).labels), "classes" if wanted.classes else "texts or vectors"
    total = count * wanted.num
    batch = min(batch_size or 1, total)
    cost = cost_of(config, batch_size=batch, dtype=dtype, guided=settings.guided)
    steps = [f"draw {total} images: {wanted.num} of each of {count} {kind}", f"write {target}"]
    finish_dry_run(console, config, steps, cost=cost, images=total)
