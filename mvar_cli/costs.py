"""Tables of what a model costs, for `mvar plan` and for every `--dry-run`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_cli.old_console import Console, format_bytes, format_count

if TYPE_CHECKING:
    from mvar_core.analysis.cost import Plan
    from mvar_core.config import ModelConfig, RunConfig

DTYPE_BYTES = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2}


def cost_of(
    config: ModelConfig,
    *,
    batch_size: int | None = None,
    dtype: str = "auto",
    guided: bool = True,
    device: str = "auto",
    device_memory: int | None = None,
    memory: int | None = None,
) -> Plan:
    """The predicted cost of a model and of its training.

    Args:
        config: The model, or a run.
        batch_size: Images sampled or trained on together; by default 1, and what the run trains with.
        dtype: Of weights and activations.
        guided: Whether sampling also runs without the class.
        device: Kind of device that the bytes are for; auto is a GPU where the system has one.
        device_memory: Bytes to find the largest batch for.
        memory: Bytes that sampling may take.

    Raises:
        ConfigError: Unknown dtype, or sizes that make no sense.
    """
    from mvar_core.analysis.cost import plan
    from mvar_core.config import RunConfig
    from mvar_core.config.training import TrainConfig
    from mvar_core.errors import ConfigError, nearest

    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"--dtype {dtype!r} is not known. {nearest(dtype, DTYPE_BYTES)}")
    train = config.train if isinstance(config, RunConfig) else TrainConfig(batch_size=batch_size or 1)
    return plan(
        config,
        batch_size=batch_size or 1,
        dtype_bytes=DTYPE_BYTES[dtype],
        guided=guided,
        device=device_kind(device),
        device_memory=device_memory,
        memory=memory,
        train=train.model_copy(update={"batch_size": batch_size}) if batch_size else train,
    )


def device_kind(name: str) -> str:
    """cpu, cuda or mps for the name of a device; auto is what this machine seems to have, found without torch."""
    if name != "auto":
        return name.split(":")[0]
    if Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        return "cuda"
    return "mps" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"


def show_cost(console: Console, cost: Plan) -> None:
    """Totals and one row per scale."""
    rows = [
        ("parameters, transformer", format_count(cost.parameters)),
        ("parameters, tokenizer", format_count(cost.tokenizer_parameters)),
        ("tokens per image", f"{cost.tokens:,}"),
        ("attention, one image, no guidance", f"{cost.attention_gmacs:,.4g} GMACs"),
        ("everything, one image, no guidance", f"{cost.total_gmacs:,.4g} GMACs"),
        ("everything, one image, guided", f"{cost.guided_gmacs:,.4g} GMACs"),
        (f"KV cache, {_batch(cost)}", format_bytes(cost.kv_cache_bytes)),
        (f"weights for sampling, {8 * cost.dtype_bytes} bit", format_bytes(cost.weight_bytes)),
        (f"peak memory of sampling, {_batch(cost)}, {cost.device}", format_bytes(cost.sample_peak_bytes)),
        ("each further image of the batch keeps", format_bytes(cost.image_bytes)),
    ]
    if cost.train_peak_bytes is not None:
        rows.append((f"peak memory of training, batch {cost.train_batch_size}", format_bytes(cost.train_peak_bytes)))
    if cost.device_memory is not None:
        rows.append((f"largest batch of sampling in {format_bytes(cost.device_memory)}", f"{cost.largest_batch:,}"))
        if cost.largest_train_batch is not None:
            rows.append(
                (f"largest batch of training in {format_bytes(cost.device_memory)}", f"{cost.largest_train_batch:,}")
            )
    console.table(cost.name, ("what", "how much"), rows)
    console.table(
        "where the operations are, one image, no guidance",
        ("part", "GMACs", "%"),
        [(part, gmacs, 100 * gmacs / cost.total_gmacs) for part, gmacs in cost.parts_gmacs.items() if gmacs],
    )
    console.table(
        "scales",
        (
            "side",
            "tokens",
            "window",
            "keys per query",
            "attention GMACs",
            "total GMACs",
            "KV cache kept",
            "micro-batch",
            "its memory",
        ),
        [
            (
                side_name(scale["side"]),
                scale["tokens"],
                str(scale["window"] or "whole"),
                scale["keys_per_query"],
                scale["attention_gmacs"],
                scale["total_gmacs"],
                format_bytes(scale["kv_cache_bytes"]),
                scale["micro_batch"],
                format_bytes(scale["activation_bytes"]),
            )
            for scale in cost.scales
        ],
    )
    together = f"{cost.images_together} image" + ("s" if cost.images_together > 1 else "")
    budget = f" in {format_bytes(cost.memory)}" if cost.memory is not None else ""
    console.say(
        f"Sampling: {together} from scale to scale together{budget}, at each scale a micro-batch at a time;"
        f" {cost.decoder_images} decoded at a time."
    )
    if cost.largest_batch:
        console.say(
            "The largest batch of sampling is bounded by what an image keeps from scale to scale: a scale itself takes"
            " the memory that it is given."
        )


def side_name(side: int | Sequence[int]) -> str:
    """What tables call a scale's size: 16, or 16×24."""
    return str(side) if isinstance(side, int) else "×".join(map(str, side))


def finish_dry_run(
    console: Console, config: ModelConfig, plan: Sequence[str], *, cost: Plan | None = None, **facts: Any
) -> None:
    """Print what a command would do: configuration, cost and plan.

    Args:
        console: Where to.
        config: The resolved configuration.
        plan: What would happen, in order.
        cost: Its cost; by default predicted from the configuration.
        facts: Further keys of the JSON object.
    """
    import yaml

    cost = cost or cost_of(config)
    values: Mapping[str, Any] = config.model_dump(mode="json", exclude_none=True)
    console.say(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip())
    show_cost(console, cost)
    for number, step in enumerate(plan, 1):
        console.say(f"{number}. {step}")
    console.say("Nothing was done (--dry-run).")
    console.finish({"dry_run": True, "configuration": values, "cost": cost.to_dict(), "plan": list(plan), **facts})


def steps_of(config: RunConfig, rows: int) -> int:
    """Optimizer steps that a configuration asks for on so many rows."""
    from mvar_core.training.order import planned_steps

    return planned_steps(config.train, rows)


def _batch(cost: Plan) -> str:
    return f"batch {cost.batch_size}" + (", guided" if cost.guided else "")
