"""`mvar bench`: VAR against MVAR, measured in one run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import mvar_core as mvar
from mvar_cli import console, options

SHOWN_STAGES = 0.005
"""Stages below this fraction of the time are left to the JSON."""


@options.command(example="mvar bench --preset mvar-d16-256 --batch-size 1,4,8 --dtype bfloat16")
def bench(
    sampling: options.GuidedSampling,
    machine: options.AttentionDevice,
    preset: options.Preset = None,
    checkpoint: Annotated[
        Path | None, options.option("--checkpoint", "DIR", "A model directory or a run, in place of random weights.")
    ] = None,
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    what: Annotated[
        str, options.option("--what", "WHAT", "sample, train (a step of all scales) or attention.")
    ] = "sample",
    batch_size: Annotated[str, options.option("--batch-size", "N,N…", "Images together: one number or several.")] = "4",
    published_style: Annotated[
        bool,
        options.option("--published-style", None,
                       "Also sample VAR as its published code does, as the baseline: autocast over float32 weights,"
                       " cache of keys and values, whole batch at once."),
    ] = False,
    repeats: Annotated[int, options.option("--repeats", "N", "Repetitions; medians are shown.", min=1)] = 3,
    breakdown: Annotated[
        bool, options.option("--breakdown/--no-breakdown", None, "Also measure each stage, in a run of its own.")
    ] = True,
    sides: Annotated[
        str | None,
        options.option("--sides", "N,HxW…", "attention: sizes of the scales. Default: the model's, from 8."),
    ] = None,
    windows: Annotated[str, options.option("--windows", "K,K…", "attention: windows, 0 is the whole scale.")] = "0,7",
    backward: Annotated[bool, options.option("--backward", None, "attention: forward and backward pass.")] = False,
    plot: Annotated[Path | None, options.option("--plot", "FILE", "Also plot the figures, as .png or .svg.")] = None,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Time, memory and throughput of VAR and MVAR, measured in one run.

    Measures the model next to its twin: a VAR of the same sizes, in which every token sees all earlier scales whole;
    or, where the model is a VAR, the MVAR of its sizes. Each row is measured in a process of its own. With a preset,
    weights are random: they change neither time nor memory.
    """
    given = locals() | {
        "settings": settings or (),
        "batch_size": options.parse_numbers(batch_size, "--batch-size"),
        "windows": options.parse_numbers(windows, "--windows"),
    }
    result = mvar.bench(**given, progress=console.progress)
    if what == "attention":
        show_attention(result.rows, backward)
    else:
        show_models(result.model, what, repeats, result.rows)
        show_stages([row for row in result.rows if row.get("stages")])
    if plot is not None:
        console.say(f"Written: {plot}")
    console.show(result)


def show_models(model: str, what: str, repeats: int, rows: Sequence[dict[str, Any]]) -> None:
    """Time, memory and ratios of every model at every batch size."""
    measured = next((row for row in rows if row["seconds"] is not None), None)
    where = f" on {measured['device']}, {measured['dtype']}" if measured else ""
    work = "sampling" if what == "sample" else "a training step of all scales"
    baseline = rows[0]["baseline"]
    console.table(
        f"{model}: {work}{where}, medians of {repeats}",
        ("model", "batch", "time", "images/s", "peak memory", "KV cache", f"faster than {baseline}", "of its memory"),
        [
            (
                row["name"],
                row["batch_size"],
                milliseconds(row["seconds"]),
                row["images_per_second"],
                console.format_bytes(row["peak_memory_bytes"]),
                console.format_bytes(row["kv_cache_bytes"]),
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


def show_stages(rows: Sequence[dict[str, Any]]) -> None:
    """Where the time goes, at the last batch size."""
    rows = [row for row in rows if row["batch_size"] == rows[-1]["batch_size"]]
    if not rows:
        return
    totals = [sum(row["stages"].values()) for row in rows]
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row["stages"]):
        seconds = [row["stages"].get(name, 0.0) for row in rows]
        fractions = [spent / total for spent, total in zip(seconds, totals, strict=True)]
        if max(fractions) >= SHOWN_STAGES:
            pairs = zip(seconds, fractions, strict=True)
            lines.append((name, *(cell for spent, fraction in pairs for cell in (1000 * spent, 100 * fraction))))
    columns = [f"{row['name']}, {unit}" for row in rows for unit in ("ms", "%")]
    console.table(f"where the time goes, batch {rows[0]['batch_size']}", ("stage", *columns), lines)


def show_attention(rows: Sequence[dict[str, Any]], backward: bool) -> None:
    """Every backend on every side and window."""
    first = rows[0]
    console.table(
        f"attention of one layer: {first['heads']} heads of {first['head_dim']}, {first['dtype']} on {first['device']},"
        f" {'forward and backward' if backward else 'forward'}",
        ("batch", "side", "window", "backend", "ms", "faster than dense", "auto picks it"),
        [
            (
                row["batch"],
                console.side_name(row["side"]),
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


def milliseconds(seconds: float | None) -> str:
    """A short time."""
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else console.format_seconds(seconds)
