"""`mvar edit`: a part of given images drawn anew, the rest kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mvar_cli import old_options as options
from mvar_cli.processes import processes
from mvar_cli.sample_request import NamedModel, Place, Wanted
from mvar_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mvar_cli.edit_request import Edit
    from mvar_cli.old_console import Console
    from mvar_core.config import ModelConfig

EXAMPLE = "mvar edit --checkpoint var-d16 --image a.png --box 64,64,192,192 --out out"


def run(
    checkpoint: options.Checkpoint,
    images: Annotated[
        list[Path], typer.Option("--image", metavar="PATH", help="An image file, or a folder of them; repeatable.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="A directory, or a file for npz and grid.")],
    box: Annotated[
        str | None,
        typer.Option("--box", metavar="X0,Y0,X1,Y1", help="A box in pixels of the image's file, from its upper left."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", metavar="FILE", help="A mask instead: white inside; of the image's or model's size."),
    ] = None,
    keep: Annotated[
        str,
        typer.Option("--keep", metavar="SIDE", help="What stays: outside (in-painting) or inside (out-painting)."),
    ] = "outside",
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="IDS|NAME|all", help="Draw this class there, or several; default: no class."),
    ] = None,
    words: options.Words = None,
    num: Annotated[int, typer.Option("--num", min=1, metavar="N", help="Variants per image and class.")] = 1,
    paste: Annotated[
        bool, typer.Option("--paste", help="Lay the image's own pixels over what stays: bit-equal there.")
    ] = False,
    coverage: Annotated[
        float,
        typer.Option("--coverage", metavar="PART", help="Of a coarse token that must stay for it to stay; at most 1."),
    ] = 0.5,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance towards --class. Default: the model's.")] = None,
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
    save_tokens: Annotated[
        bool, typer.Option("--save-tokens", help="Also write the tokens, and which of them stayed.")
    ] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Also a strip per image: after each scale.")] = False,
    tokenizer: options.TokenizerFile = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Draw a part of images anew: in-painting, out-painting, and editing towards a class.

    The image's tokens stay at every scale where box or mask say so, and the model draws the rest around them: VAR's
    zero-shot editing, for any VAR or MVAR. The image is first resized and cropped to the model's size, and box or mask
    with it. Without --paste, what stays is shown as the tokenizer decodes it.
    """
    if (box is None) == (mask is None):
        raise ConfigError("There must be one region to edit.", "Give --box X0,Y0,X1,Y1 or --mask FILE, one of them.")
    if keep not in ("inside", "outside"):
        raise ConfigError(f"--keep {keep!r} is not known.", "Use inside or outside.")
    from mvar_cli.edit_request import Edit, edit_draws, parse_box
    from mvar_cli.outputs import choose_format, output_target
    from mvar_cli.sample_run import check_parts, check_place, make

    output_format = choose_format(out, output_format, save_tokens)
    target = output_target(out, output_format)
    region = parse_box(box) if box is not None else None
    budget = options.parse_bytes(memory) if memory is not None else None
    given = {
        "cfg": cfg if classes or words else 0.0,  # without a class there is nothing to guide towards
        "top_k": top_k,
        "top_p": top_p,
        "more_smooth": more_smooth,
        "cfg_schedule": options.parse_schedule(cfg_schedule) if classes or words else "linear",
        "cfg_scales": options.parse_scale_range(cfg_scales),
    }
    wanted = Wanted(classes or [], num, given, seed, output_format, save_tokens, stages, attention, words or ())
    place = Place(target, out, output_format, overwrite)
    with processes() as team:
        console = team.console(as_json)
        if cfg and not classes and not words:
            console.note("--cfg guides towards a class; without --class it has no effect.")
        check_place(team, place)
        model = NamedModel(checkpoint, tokenizer, team.device(device), dtype, attention)
        config = model.early_config()
        if config.transformer is None:
            raise CheckpointError(
                f"{config.name} is a tokenizer without a transformer.", "Train one with `mvar train`."
            )
        edit = Edit(config, images, region, mask, keep, coverage)
        if dry_run:
            _show_plan(console, config, wanted, edit, batch_size, dtype, target)
            return
        request = edit.request(wanted.request(config, model), paste=paste)
        parts, there = check_parts(team, place, request)
        draw = None
        if len(there) < len(request.shards):
            batches = {"batch_size": batch_size, "memory": budget}
            draw = edit_draws(model.load(), edit, request, stages=stages, **request.settings, **batches)
        facts = {"keep": keep, "coverage": coverage, "paste": paste, "box": region, "mask": mask, "edits": edit.facts()}
        make(console, team, parts, draw, place, model.device, batch_size, facts)


def _show_plan(
    console: Console,
    config: ModelConfig,
    wanted: Wanted,
    edit: Edit,
    batch_size: int | None,
    dtype: str,
    target: Path,
) -> None:
    from mvar_cli.costs import cost_of, finish_dry_run

    settings, classes = wanted.settings(config), len(wanted.chosen(config).labels)
    total = len(edit.paths) * max(1, classes) * wanted.num
    cost = cost_of(config, batch_size=min(batch_size or 1, total), dtype=dtype, guided=settings.guided)
    facts = edit.facts()
    kept = ", ".join(
        f"{grid}: {count} of {grid.tokens}"
        for grid, count in zip(config.pyramid.grids, facts[0]["kept_by_scale"], strict=True)
    )
    steps = [
        f"encode {len(edit.paths)} images; tokens that stay of {edit.paths[0].name}, scale by scale: {kept}",
        f"draw the others, {total} times in all",
        f"write {target}",
    ]
    finish_dry_run(console, config, steps, cost=cost, images=total, edits=facts)
