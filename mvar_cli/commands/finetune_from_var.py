"""`mvar finetune-from-var`: the training of `mvar train`, starting from VAR weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mvar_cli import options
from mvar_cli.commands.train import TrainRequest, execute

EXAMPLE = "mvar finetune-from-var --preset digits --var-checkpoint V --tokens T --out ft"


def run(
    preset: options.RequiredPreset,
    var_checkpoint: Annotated[
        Path, typer.Option("--var-checkpoint", metavar="DIR", help="Model directory (or published .pth) to start from.")
    ],
    out: options.Out,
    checkpoint: options.OptionalTokenizerCheckpoint = None,
    tokenizer: options.TokenizerFile = None,
    tokens: options.Tokens = None,
    data: options.OptionalData = None,
    settings: options.Settings = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    seed: options.OptionalSeed = None,
    validation: options.Validation = None,
    accumulate: options.Accumulate = None,
    micro_batch: options.MicroBatch = None,
    activation_checkpointing: options.ActivationCheckpointing = None,
    compile_blocks: options.Compile = None,
    ema: options.Ema = None,
    checkpoint_every: options.CheckpointEvery = None,
    keep: options.Keep = None,
    sample_every: options.SampleEvery = None,
    tensorboard: options.TensorBoard = None,
    wandb: options.WeightsAndBiases = None,
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    fsdp: options.Fsdp = False,
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Train an MVAR that starts from VAR weights; which token sees which follows from the preset, never from the file.

    The tokenizer is the VAR's own unless --checkpoint names another. Running the same command again goes on where it
    stopped.
    """
    start = var_checkpoint
    if var_checkpoint.is_file():
        start = convert_beside(var_checkpoint, tokenizer, out)
    request = TrainRequest(
        preset=preset,
        checkpoint=checkpoint or start,
        out=out,
        tokens=tokens,
        data=data,
        settings=tuple(settings or ()),
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        validation=validation,
        resume=resume,
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        attention=attention,
        loop={
            "accumulate": accumulate,
            "micro_batch": micro_batch,
            "activation_checkpointing": activation_checkpointing,
            "compile": compile_blocks,
            "ema": ema,
            "checkpoint_every": checkpoint_every,
            "keep": keep,
            "sample_every": sample_every,
            "tensorboard": tensorboard,
            "wandb": wandb,
        },
        fsdp=fsdp,
        start=start,
    )
    execute(as_json, request, dry_run)


def convert_beside(model: Path, tokenizer: Path | None, out: Path) -> Path:
    """The model directory of a published file, made once beside the run, by the first process."""
    from mvar_cli.launch import Worker
    from mvar_core.files import atomic_directory
    from mvar_core.models import official
    from mvar_core.models.conversion import import_official

    directory = out.parent / f"{out.name}-start"
    if Worker.here().rank == 0 and not (directory / "config.json").is_file():
        with atomic_directory(directory) as temporary:
            import_official(model, tokenizer or official.tokenizer_beside(model), temporary, kind="var")
    while not (directory / "config.json").is_file():  # should the first process fail, its launcher ends this one
        time.sleep(0.2)
    return directory
