"""Dry runs of commands that are written in the old way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from mvar_cli.cost_table import cost_remarks, cost_tables
from mvar_cli.old_console import Console

if TYPE_CHECKING:
    from mvar_core.analysis.cost import Plan
    from mvar_core.config import ModelConfig, RunConfig


def cost_of(
    config: ModelConfig,
    *,
    batch_size: int | None = None,
    dtype: str = "auto",
    guided: bool = True,
    device: str = "auto",
) -> Plan:
    """The predicted cost of a model and of its training."""
    from mvar_core.analysis import cost
    from mvar_core.config import Machine

    return cost.cost_of(config, Machine(device=device, dtype=dtype), batch_size=batch_size, guided=guided)


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
    cost = cost or cost_of(config)
    values: Mapping[str, Any] = config.model_dump(mode="json", exclude_none=True)
    console.say(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip())
    for table in cost_tables(cost):
        console.table(*table)
    for remark in cost_remarks(cost):
        console.say(remark)
    for number, step in enumerate(plan, 1):
        console.say(f"{number}. {step}")
    console.say("Nothing was done (--dry-run).")
    console.finish({"dry_run": True, "configuration": values, "cost": cost.to_dict(), "plan": list(plan), **facts})


def steps_of(config: RunConfig, rows: int) -> int:
    """Optimizer steps that a configuration asks for on so many rows."""
    from mvar_core.training.order import planned_steps

    return planned_steps(config.train, rows)
