"""`mvar bench`: VAR against MVAR, measured in one run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import old_options as options
from mvar_cli.cost_table import side_name
from mvar_cli.old_console import Console, format_bytes, format_seconds
from mvar_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mvar_core.config import RunConfig
    from mvar_core.pyramid import PatchSize

EXAMPLE = "mvar bench --preset mvar-d16-256 --batch-size 1,4,8 --dtype bfloat16"
WHAT = ("sample", "train", "attention")
SHOWN_STAGES = 0.005
"""Stages below this part of the time are left to the JSON."""


def run(
    preset: options.Preset = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="DIR", help="A model directory or a run, in place of random weights."),
    ] = None,
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    what: Annotated[
        str, typer.Option("--what", metavar="WHAT", help="sample, train (a step of all scales) or attention.")
    ] = "sample",
    batch_size: Annotated[
        str, typer.Option("--batch-size", metavar="N,N…", help="Images together: one number or a comma list.")
    ] = "4",
    published_style: Annotated[
        bool,
        typer.Option(
            "--published-style",
            help="Also sample VAR as its published code does: autocast over float32 weights, cache of keys and values,"
            " whole batch at once. It is then the baseline.",
        ),
    ] = False,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Repetitions; medians are shown.")] = 3,
    breakdown: Annotated[
        bool, typer.Option("--breakdown/--no-breakdown", help="Also measure each stage, in a run of its own.")
    ] = True,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance; 0 is none. Default: the model's.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Keep the k likeliest codes; 0 keeps all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep this much probability; 0 or 1 keep all.")
    ] = None,
    sides: Annotated[
        str | None,
        typer.Option("--sides", metavar="N,HxW…", help="attention: sizes of the scales. Default: the model's, from 8."),
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option("--windows", metavar="K,K…", help="attention: windows, 0 is the whole scale. Default: 0 and 7."),
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="attention: forward and backward pass.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the figures, as .png or .svg.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Time, memory and throughput of VAR and MVAR, measured in one run.

    Measures the model beside its twin: a VAR of the same sizes, in which every token sees all earlier scales whole; or,
    where the model is a VAR, the MVAR of its sizes. Each row is measured in a process of its own. With a preset,
    weights are random: they change neither time nor memory.
    """
    console = Console(as_json)
    if what not in WHAT:
        raise ConfigError(f"--what {what!r} is not one of {', '.join(WHAT)}. {nearest(what, WHAT)}")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {plot} must end in .png or .svg.")
    batches = options.parse_numbers(batch_size, "--batch-size")
    if min(batches) < 1:
        raise ConfigError(f"--batch-size {batch_size!r}: a batch has at least one image.")
    config = _configuration(preset, checkpoint, settings or [], image_size)
    if what == "attention":
        rows = _attention(
            console,
            config,
            sides=options.parse_sizes(sides, "--sides"),
            windows=options.parse_numbers(windows, "--windows") if windows else [0, 7],
            batches=batches,
            repeats=repeats,
            backward=backward,
            machine=(device, dtype, attention),
        )
    else:
        from mvar_cli.benchmark import Request

        common = Request(
            what=what,
            config=config,
            checkpoint=checkpoint,
            repeats=repeats,
            device=device,
            dtype=dtype,
            attention=attention,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            breakdown=breakdown,
        )
        _check(common)
        rows = _compare(console, common, batches, published_style and what == "sample")
    if plot is not None:
        from mvar_core.reports.figures import plot_attention, plot_batches

        if what == "attention":
            plot_attention(rows, plot)
        else:
            plot_batches(rows, plot, title=f"{config.name}: {'sampling' if what == 'sample' else 'a training step'}")
        console.say(f"Drawn: {plot}")
    from mvar_core.runtime import describe_machine

    console.finish({"what": what, "model": config.name, "rows": rows, "machine": describe_machine(), "plot": plot})


def _configuration(
    preset: str | None, checkpoint: Path | None, settings: list[str], image_size: str | None
) -> RunConfig:
    from mvar_core.config import RunConfig
    from mvar_core.config.section import validate
    from mvar_core.workflows.plan import resolve

    if preset is None and checkpoint is None:
        raise ConfigError(
            "There is nothing to measure.", "Give --preset NAME (`mvar plan` lists them) or --checkpoint."
        )
    config = resolve(preset, checkpoint, settings, options.parse_size(image_size, "--image-size"))
    if config.transformer is None:
        raise ConfigError(f"{config.name} is a tokenizer without a transformer.", "Give a model that can sample.")
    if isinstance(config, RunConfig):
        return config
    whole: RunConfig = validate(RunConfig, config.model_dump(), str(checkpoint))
    return whole


def _check(request: Any) -> None:
    """Refuse before the first process is started what every one of them would refuse."""
    from mvar_core.errors import BackendError
    from mvar_core.kernels import check_backend
    from mvar_core.runtime import resolve_device, resolve_dtype
    from mvar_core.sampling.sampler import resolve_settings

    place = resolve_device(request.device)
    kind = resolve_dtype(request.dtype, place)
    resolve_settings(request.config, request.settings)
    for _, twin in twins(request.config):
        try:
            check_backend(request.attention, twin.patterns, place, kind, needs_grad=request.what == "train")
        except BackendError as error:
            raise BackendError(f"{error.message} ({twin.name})", error.hint) from None


def twins(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """The models to compare, by label, VAR first: same sizes, other attention."""
    from mvar_core.config import AttentionConfig
    from mvar_core.pyramid import spread_window

    var = config.model_copy(update={"attention": AttentionConfig(scale_prefixes="all")})
    if config.attention.scale_prefixes != "all":
        label = "MVAR" if config.attention.scale_prefixes == 1 else f"{config.attention.scale_prefixes} scale prefixes"
        return [("VAR", var), (label, config)]
    if any(config.windows):
        return [("VAR", var), ("VAR with windows", config)]
    windows = spread_window(7, config.windows)
    mvar = config.model_copy(update={"attention": AttentionConfig(scale_prefixes=1, windows=windows)})
    return [("VAR", config), ("MVAR", mvar)]


def _compare(console: Console, common: Any, batches: Sequence[int], published_style: bool) -> list[dict[str, Any]]:
    """Measure every model at every batch and show the tables."""
    from mvar_cli.benchmark import measure_alone

    models = [(label, config, False) for label, config in twins(common.config)]
    if published_style:
        models.insert(0, ("VAR, published style", models[0][1], True))
    rows: list[dict[str, Any]] = []
    requests = [(batch, model) for batch in batches for model in models]
    with console.progress("measuring", unit="rows") as progress:
        progress(0, len(requests))
        for done, (batch, (label, config, published)) in enumerate(requests, start=1):
            request = common.model_copy(update={"config": config, "batch_size": batch, "published_style": published})
            rows.append(_row(label, config, batch, measure_alone(request)))
            progress(done, len(requests), f"{label}, batch {batch}")
    _add_ratios(rows, models[0][0])
    _show(console, common, rows, models[0][0])
    return rows


def _row(label: str, config: RunConfig, batch: int, found: dict[str, Any]) -> dict[str, Any]:
    empty = {"seconds": None, "images_per_second": None, "peak_memory_bytes": None, "kv_cache_bytes": None}
    return {
        "name": label,
        "batch_size": batch,
        "scale_prefixes": config.attention.scale_prefixes,
        "windows": list(config.windows),
        **empty,
        **found,
    }


def _add_ratios(rows: list[dict[str, Any]], baseline: str) -> None:
    """Each row beside the baseline's of the same batch."""
    base = {row["batch_size"]: row for row in rows if row["name"] == baseline}
    for row in rows:
        other = base[row["batch_size"]]
        measured = row["seconds"] is not None and other["seconds"] is not None
        row["baseline"] = baseline
        row["times_faster"] = other["seconds"] / row["seconds"] if measured else None
        row["memory_ratio"] = row["peak_memory_bytes"] / other["peak_memory_bytes"] if measured else None


def _show(console: Console, common: Any, rows: list[dict[str, Any]], baseline: str) -> None:
    measured = next((row for row in rows if row["seconds"] is not None), None)
    where = f" on {measured['device']}, {measured['dtype']}" if measured else ""
    what = "sampling" if common.what == "sample" else "a training step of all scales"
    console.table(
        f"{common.config.name}: {what}{where}, medians of {common.repeats}",
        ("model", "batch", "time", "images/s", "peak memory", "KV cache", f"faster than {baseline}", "of its memory"),
        [
            (
                row["name"],
                row["batch_size"],
                _time(row["seconds"]),
                row["images_per_second"],
                format_bytes(row["peak_memory_bytes"]),
                format_bytes(row["kv_cache_bytes"]),
                "–" if row["times_faster"] is None else f"{row['times_faster']:.2f}×",
                "–" if row["memory_ratio"] is None else f"{row['memory_ratio']:.0%}",
            )
            for row in rows
        ],
    )
    for row in rows:
        if row.get("reason"):
            console.say(f"{row['name']}, batch {row['batch_size']}: {row['reason']}.")
    if measured:
        console.say(f"Peak memory: {measured['memory_is']}.")
    with_stages = [row for row in rows if row.get("stages") and row["batch_size"] == rows[-1]["batch_size"]]
    if with_stages:
        names = list(dict.fromkeys(name for row in with_stages for name in row["stages"]))
        totals = [sum(row["stages"].values()) for row in with_stages]
        shares = {
            name: [row["stages"].get(name, 0.0) / total for row, total in zip(with_stages, totals, strict=True)]
            for name in names
        }
        console.table(
            f"where the time goes, batch {rows[-1]['batch_size']}",
            ("stage", *(f"{row['name']}, {unit}" for row in with_stages for unit in ("ms", "%"))),
            [
                (
                    name,
                    *(
                        cell
                        for row, share in zip(with_stages, shares[name], strict=True)
                        for cell in (1000 * row["stages"].get(name, 0.0), 100 * share)
                    ),
                )
                for name in names
                if max(shares[name]) >= SHOWN_STAGES
            ],
        )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else format_seconds(seconds)


def _attention(
    console: Console,
    config: RunConfig,
    *,
    sides: list[PatchSize] | None,
    windows: list[int],
    batches: Sequence[int],
    repeats: int,
    backward: bool,
    machine: tuple[str, str, str],
) -> list[dict[str, Any]]:
    """Time every backend over sides and windows."""
    from mvar_core.analysis.attention_sweep import sweep
    from mvar_core.kernels import available_backends
    from mvar_core.runtime import resolve_device, resolve_dtype

    device = resolve_device(machine[0])
    dtype = resolve_dtype(machine[1], device)
    assert config.transformer is not None
    for window in windows:
        if window < 0 or (window and window % 2 == 0):
            raise ConfigError(f"--windows holds {window}; a window is odd, and 0 is the whole scale.")
    grids = sides
    if not grids:
        patches = config.pyramid.patch_sizes
        grids = [size for size, grid in zip(patches, config.pyramid, strict=True) if min(grid) >= 8] or [patches[-1]]
    names = [name for name, reason in available_backends(device, dtype) if reason is None and name != "reference"]
    if machine[2] != "auto":
        names = list(dict.fromkeys(["dense", machine[2]]))
    rows: list[dict[str, Any]] = []
    total = len(batches) * len(grids) * len(windows)
    started = itertools.count(1)
    with console.progress("measuring", unit="scales") as progress:
        for batch in batches:
            rows += sweep(
                grids,
                windows,
                names,
                heads=config.transformer.num_heads,
                head_dim=config.transformer.head_dim,
                batch=batch,
                dtype=dtype,
                device=device,
                backward=backward,
                repeats=repeats,
                progress=lambda note: progress(next(started), total, note),
            )
    for row in rows:
        seen = f"window {row['window']}" if row["window"] else "whole"
        row["name"] = f"{row['backend']}, side {side_name(row['side'])}, {seen}"
        row["batch_size"] = row["batch"]
        row["images_per_second"] = row["batch"] / row["seconds"] if row["seconds"] else None
        row["peak_memory_bytes"] = row["peak_bytes"]
        row["kv_cache_bytes"] = 0
    console.table(
        f"attention of one layer: {config.transformer.num_heads} heads of {config.transformer.head_dim}, "
        f"{str(dtype).removeprefix('torch.')} on {device}, {'forward and backward' if backward else 'forward'}",
        ("batch", "side", "window", "backend", "ms", "faster than dense", "auto picks it"),
        [
            (
                row["batch"],
                side_name(row["side"]),
                str(row["window"] or "whole"),
                row["backend"],
                None if row["seconds"] is None else 1000 * row["seconds"],
                "–" if row["times_dense"] is None else f"{row['times_dense']:.2f}×",
                "yes" if row["chosen"] else "",
            )
            for row in rows
        ],
    )
    for reason in dict.fromkeys(f"{row['backend']}: {row['reason']}" for row in rows if row["reason"]):
        console.say(reason)
    return rows
