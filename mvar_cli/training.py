"""Of the old command line: training for the commands that have not moved yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvar_cli.old_console import Console
from mvar_core.config import Machine, RunConfig
from mvar_core.data.tokens import TokenCache
from mvar_core.training.transformer import TransformerOutcome
from mvar_core.workflows.runs import held_out as held_out
from mvar_core.workflows.train import fit_to_tokens as fit_to_tokens
from mvar_core.workflows.train import train_on_tokens
from mvar_core.workflows.train_tokenizer import TrainTokenizerResult, train_on_images


def train_run(
    console: Console,
    config: RunConfig,
    tokens: TokenCache,
    checkpoint: Path,
    out: Path,
    *,
    device: str,
    dtype: str,
    attention: str,
    **more: Any,
) -> TransformerOutcome:
    """`train_on_tokens`, reporting to a console."""
    machine = Machine(device=device, dtype=dtype, attention=attention)
    with console.progress("training", "steps") as bar:
        return train_on_tokens(
            config, tokens, checkpoint, out, machine=machine,
            progress=lambda stage, done, total, *, unit="", note="": bar(done, total, note), **more,
        )  # fmt: skip


def train_tokenizer_run(
    console: Console, config: RunConfig, data: str, out: Path, *, device: str, dtype: str, resume: bool
) -> TrainTokenizerResult:
    """`train_on_images`, reporting to a console."""
    with console.progress("tokenizer", "steps") as bar:
        return train_on_images(
            config, data, out, machine=Machine(device=device, dtype=dtype), resume=resume,
            progress=lambda stage, done, total, *, unit="", note="": bar(done, total, note),
        )  # fmt: skip
