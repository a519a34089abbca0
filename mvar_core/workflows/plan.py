"""What a model costs, and which presets there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_core.analysis.cost import Plan, cost_of
from mvar_core.config import Machine, ModelConfig
from mvar_core.config.machine import parse_bytes
from mvar_core.config.presets import load_config, preset_names
from mvar_core.errors import ConfigError
from mvar_core.models.directory import read_model_config
from mvar_core.pyramid import PatchSize
from mvar_core.results import Result


def plan(
    preset: str | None = None,
    *,
    checkpoint: Path | str | None = None,
    settings: Sequence[str] = (),
    image_size: PatchSize | str | None = None,
    batch_size: int | None = None,
    guided: bool = True,
    device_memory: int | str | None = None,
    machine: Machine = Machine(),
) -> Plan:
    """Predict parameters, operations, KV cache and memory of a model, per scale and in total.

        cost = mvar.plan("mvar-d16-256", batch_size=64, device_memory="24GB")
        cost.attention_gmacs, cost.kv_cache_bytes, cost.largest_batch

    Args:
        preset: Name of a preset or a YAML file.
        checkpoint: A model directory, in place of a preset.
        settings: Changes to the preset, as `attention.scale_prefixes=2`.
        image_size: Side, or (height, width), also as "256x384"; pyramid and windows follow.
        batch_size: Images sampled or trained on together; by default 1, and what the preset trains with.
        guided: Whether sampling uses guidance, which doubles the transformer's rows.
        device_memory: Bytes, also as "24GB", to find the largest batches for.
        machine: Kind of device, dtype (auto is bfloat16) and memory of sampling.

    Raises:
        MvarError: An unknown preset or key, a checkpoint that is not one, or sizes that make no sense.
    """
    config = resolve(preset, checkpoint, settings, image_size)
    if machine.dtype == "auto":
        machine = machine.model_copy(update={"dtype": "bfloat16"})
    memory = parse_bytes(device_memory) if isinstance(device_memory, str) else device_memory
    return cost_of(config, machine, batch_size=batch_size, guided=guided, device_memory=memory)


def resolve(
    preset: str | None,
    checkpoint: Path | str | None,
    settings: Sequence[str],
    image_size: PatchSize | str | None = None,
) -> ModelConfig:
    """The configuration of a preset, or of a model directory."""
    if checkpoint is None:
        return load_config(preset, settings, {"image_size": image_size})
    if preset is not None or settings or image_size is not None:
        hint = "Leave out --preset, --set and --image-size, or --checkpoint."
        raise ConfigError("--checkpoint brings its own configuration.", hint)
    return read_model_config(Path(checkpoint))


@dataclass(frozen=True, kw_only=True)
class PresetList(Result):
    """The presets that mvar ships: name, description, source, parameters, attention_gmacs, kv_cache_bytes, result.

    KV caches are of one guided image in bfloat16; the result is what was published, where anything was.
    """

    presets: tuple[dict[str, Any], ...]


def list_presets() -> PresetList:
    """All presets with their sizes, costs and published results.

    print([preset["name"] for preset in mvar.list_presets().presets])
    """
    presets = []
    for name in preset_names():
        config, cost = load_config(name), plan(name)
        costs = {key: getattr(cost, key) for key in ("parameters", "attention_gmacs", "kv_cache_bytes")}
        result = config.result.model_dump() if config.result else None
        presets.append(
            {"name": name, "description": config.description, "source": config.source, **costs, "result": result}
        )
    return PresetList(presets=tuple(presets))
