"""`mvar plan`: what a model costs, and which presets there are."""

from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar plan --preset mvar-d16-256 --batch-size 64 --device-memory 24GB")
def plan(
    machine: options.MemoryDevice,
    preset: options.Preset = None,
    checkpoint: options.OptionalCheckpoint = None,
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    batch_size: Annotated[
        int | None,
        options.option("--batch-size", "N", "Images together. Default: 1, and what the preset trains with.", min=1),
    ] = None,
    guided: Annotated[bool, options.option("--guided/--unguided", None, "Sampling with guidance runs twice.")] = True,
    device_memory: Annotated[
        str | None, options.option("--device-memory", "SIZE", "Find the largest batches that fit, as in 24GB.")
    ] = None,
) -> None:
    """Parameters, operations, KV cache and memory of a model, per scale and in total.

    Without a preset or a checkpoint, or with --preset alone, lists the presets. Multiply-accumulates of attention
    follow the MVAR paper's convention; memory is a prediction, in bfloat16 unless --dtype names another.
    """
    if preset is None and checkpoint is None and not settings and image_size is None:
        show_presets(mvar.list_presets())
        return
    cost = mvar.plan(**locals() | {"settings": settings or ()})
    console.show_cost(cost)
    console.show(cost)


def show_presets(listed: "mvar.PresetList") -> None:
    """One row for each preset."""
    rows = [
        (
            preset["name"],
            console.format_count(preset["parameters"]),
            preset["attention_gmacs"],
            console.format_bytes(preset["kv_cache_bytes"]),
            (preset["result"] or {}).get("fid"),
            preset["description"].split(";")[0].split(". ")[0],
        )
        for preset in listed.presets
    ]
    columns = ("name", "parameters", "attention GMACs", "KV cache, one image", "published FID", "what it is")
    console.table("presets", columns, rows)
    console.say("Next: mvar plan --preset NAME, or mvar train --preset NAME --tokens CACHE --out RUN.")
    console.show(listed)
