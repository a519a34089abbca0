"""`mvar plan`: what a model costs, and which presets there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_bytes, format_count

if TYPE_CHECKING:
    from mvar_core.config import ModelConfig

EXAMPLE = "mvar plan --preset mvar-d16-256 --batch-size 64 --device-memory 24GB"
BARE_OPTIONS = ("--preset",)
"""Options that may stand without a value: `mvar plan --preset` lists the presets, as `mvar plan` does."""


def run(
    preset: options.Preset = None,
    checkpoint: options.OptionalCheckpoint = None,
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, metavar="N", help="Images together. Default: 1, and the preset's training."
        ),
    ] = None,
    guided: Annotated[bool, typer.Option("--guided/--unguided", help="Sampling with guidance runs twice.")] = True,
    device_memory: Annotated[
        str | None, typer.Option("--device-memory", metavar="SIZE", help="Find the largest batch, as in 24GB.")
    ] = None,
    memory: options.Memory = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "bfloat16",
    listing: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Parameters, operations, KV cache and memory of a model, per scale and in total.

    Without a preset or a checkpoint, or with --preset alone, lists the presets. Multiply-accumulates of attention
    follow the MVAR paper's convention; memory is a prediction.
    """
    console = Console(as_json)
    if listing or (preset is None and checkpoint is None and not settings and image_size is None):
        _list_presets(console)
        return
    from mvar_cli.costs import cost_of, show_cost

    config = resolve(preset, checkpoint, settings or [], image_size)
    cost = cost_of(
        config,
        batch_size=batch_size,
        dtype=dtype,
        guided=guided,
        device=device,
        device_memory=options.parse_bytes(device_memory) if device_memory else None,
        memory=options.parse_bytes(memory) if memory else None,
    )
    show_cost(console, cost)
    console.finish(cost.to_dict())


def resolve(
    preset: str | None, checkpoint: Path | None, settings: list[str], image_size: str | None = None
) -> ModelConfig:
    """The configuration of a preset, or of a model directory."""
    from mvar_core.config.presets import load_config
    from mvar_core.errors import ConfigError

    if checkpoint is None:
        return load_config(preset, settings, {"image_size": options.parse_size(image_size, "--image-size")})
    if preset is not None or settings or image_size is not None:
        raise ConfigError(
            "--checkpoint brings its own configuration.", "Leave out --preset, --set and --image-size, or --checkpoint."
        )
    from mvar_core.models.directory import read_model_config

    return read_model_config(checkpoint)


def _list_presets(console: Console) -> None:
    from mvar_cli.costs import cost_of
    from mvar_core.config.presets import load_config, preset_names

    rows, entries = [], []
    for name in preset_names():
        config = load_config(name)
        cost = cost_of(config, dtype="bfloat16")
        fid = config.result.fid if config.result else None
        entries.append(
            {
                "name": name,
                "description": config.description,
                "source": config.source,
                "parameters": cost.parameters,
                "attention_gmacs": cost.attention_gmacs,
                "kv_cache_bytes": cost.kv_cache_bytes,
                "result": config.result.model_dump() if config.result else None,
            }
        )
        rows.append(
            (
                name,
                format_count(cost.parameters),
                cost.attention_gmacs,
                format_bytes(cost.kv_cache_bytes),
                fid,
                config.description.split(";")[0].split(". ")[0],
            )
        )
    console.table(
        "presets", ("name", "parameters", "attention GMACs", "KV cache, one image", "published FID", "what it is"), rows
    )
    console.say("Next: mvar plan --preset NAME, or mvar train --preset NAME.")
    console.finish({"presets": entries})
