"""Of the old command line: what `train`, `ablate` and `quickstart` call until they have moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvar_cli import console
from mvar_core.config import Machine, RunConfig
from mvar_core.config.training import DataConfig
from mvar_core.workflows.tokenize import TokenizeResult, write_tokens


def tokenize_run(
    _: Any,
    checkpoint: Path,
    config: RunConfig,
    data: str,
    out: Path,
    *,
    views: DataConfig,
    seed: int,
    device: str,
    dtype: str,
    overwrite: bool = False,
    team: Any = None,
) -> TokenizeResult:
    """`mvar_core.workflows.tokenize.write_tokens`."""
    config = config.model_copy(update={"data": views, "seed": seed})
    machine = Machine(device=device, dtype=dtype)
    return write_tokens(
        out,
        data=data,
        tokenizer=checkpoint,
        config=config,
        overwrite=overwrite,
        machine=machine,
        progress=console.progress,
    )
