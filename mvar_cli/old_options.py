"""Options that several commands share, so that a name means the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli.old_console import Console
from mvar_core.errors import ConfigError

if TYPE_CHECKING:
    from mvar_core.pyramid import PatchSize


def complete_preset(incomplete: str) -> list[str]:
    """Names of presets for shell completion."""
    from mvar_core.config.presets import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME|FILE", help="A preset (`mvar plan` lists them) or a YAML file.",
                 autocompletion=complete_preset),
]  # fmt: skip
RequiredPreset = Annotated[
    str,
    typer.Option("--preset", metavar="NAME|FILE", help="A preset (`mvar plan` lists them) or a YAML file.",
                 autocompletion=complete_preset),
]  # fmt: skip
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the preset, as in a.b=c; repeatable."),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="N|HxW",
        help="Images of this size, as in 512 or 256x384: pyramid and windows follow. Default: the preset's.",
    ),
]
_CHECKPOINT = typer.Option("--checkpoint", metavar="DIR", help="A model directory, a run, or a published .pth file.")
Checkpoint = Annotated[Path, _CHECKPOINT]
OptionalCheckpoint = Annotated[Path | None, _CHECKPOINT]
_TOKENIZER = typer.Option("--checkpoint", metavar="DIR", help="Model directory that holds the tokenizer.")
TokenizerCheckpoint = Annotated[Path, _TOKENIZER]
OptionalTokenizerCheckpoint = Annotated[Path | None, _TOKENIZER]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer", metavar="FILE", help="The published tokenizer, where --checkpoint is a published .pth."
    ),
]
DATA_HELP = "Bundled digits or photographs, a folder of images, tar shards, or parquet files; see docs/data.md."
Data = Annotated[str, typer.Option("--data", metavar="NAME|PATH", help=DATA_HELP)]
OptionalData = Annotated[
    str | None,
    typer.Option("--data", metavar="NAME|PATH", help=DATA_HELP),
]
Tokens = Annotated[Path | None, typer.Option("--tokens", metavar="CACHE", help="Token cache, from `mvar tokenize`.")]
Validation = Annotated[
    Path | None, typer.Option("--validation", metavar="CACHE", help="Token cache of held-out images to measure on.")
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, metavar="N", help="Optimizer steps.")]
Epochs = Annotated[float | None, typer.Option("--epochs", metavar="N", help="Passes over the tokens.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from a checkpoint in --out.")]
_LOOP = "Loop"
Accumulate = Annotated[
    int | None,
    typer.Option("--accumulate", min=1, metavar="N", help="Micro-batches per step: less memory, equal gradients.",
                 rich_help_panel=_LOOP),
]  # fmt: skip
MicroBatch = Annotated[
    int | None,
    typer.Option("--micro-batch", min=1, metavar="N", help="The same, as images computed together.",
                 rich_help_panel=_LOOP),
]  # fmt: skip
ActivationCheckpointing = Annotated[
    bool | None,
    typer.Option("--activation-checkpointing/--no-activation-checkpointing",
                 help="Compute activations twice instead of keeping them.", rich_help_panel=_LOOP),
]  # fmt: skip
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the blocks (torch.compile).", rich_help_panel=_LOOP),
]
Ema = Annotated[
    float | None,
    typer.Option("--ema", min=0, max=1, metavar="DECAY", help="Average the weights, for example 0.9999; 0 = not.",
                 rich_help_panel=_LOOP),
]  # fmt: skip
CheckpointEvery = Annotated[
    int | None,
    typer.Option("--checkpoint-every", min=1, metavar="N", help="Steps between checkpoints and validations.",
                 rich_help_panel=_LOOP),
]  # fmt: skip
Keep = Annotated[
    int | None,
    typer.Option("--keep", min=1, metavar="N", help="Checkpoints to keep, beside the best one.", rich_help_panel=_LOOP),
]
SampleEvery = Annotated[
    int | None,
    typer.Option("--sample-every", min=0, metavar="N", help="Steps between pictures of samples; 0 = none.",
                 rich_help_panel=_LOOP),
]  # fmt: skip
TensorBoard = Annotated[
    bool | None,
    typer.Option("--tensorboard/--no-tensorboard", help="Log to TensorBoard too.", rich_help_panel=_LOOP),
]
WeightsAndBiases = Annotated[
    bool | None,
    typer.Option("--wandb/--no-wandb", help="Log to Weights & Biases too.", rich_help_panel=_LOOP),
]
Words = Annotated[
    list[str] | None,
    typer.Option("--words", metavar="TEXT", help="A text, for models that take words; repeatable."),
]
VectorsFile = Annotated[
    Path | None,
    typer.Option("--vectors", metavar="FILE", help="Vectors as .npy, .npz or .safetensors; see docs/conditioning.md."),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is already there.")]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel="Machine")
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.", rich_help_panel="Machine"),
]
Attention = Annotated[
    str,
    typer.Option(
        "--attention",
        metavar="NAME",
        help="auto, reference, dense, tiled, flex or natten; a named one never falls back.",
        rich_help_panel="Machine",
    ),
]
GuidanceSchedule = Annotated[
    str | None,
    typer.Option(
        "--cfg-schedule",
        metavar="NAME|LIST",
        help="Guidance over the scales: linear (as published), constant, cosine, or a comma list, one per scale.",
    ),
]
GuidanceScales = Annotated[
    str | None,
    typer.Option("--cfg-scales", metavar="FIRST-LAST", help="Guide these scales alone, from 0, as in 4-9."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="What sampling may take in all, as in 2GB. Default: half of what is free. Never changes an image.",
        rich_help_panel="Machine",
    ),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, metavar="N", help="Images at a time.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Where chance starts.")]
OptionalSeed = Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Where chance starts.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.", rich_help_panel="Output")
]
Fsdp = Annotated[
    bool,
    typer.Option("--fsdp", help="Slice the model over the processes, for one too large for a GPU.",
                 rich_help_panel="Machine"),
]  # fmt: skip
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print configuration, cost and plan, and do nothing.", rich_help_panel="Output"),
]


def parse_bytes(text: str) -> int:
    """Bytes from `24GB`, `16GiB`, `800MB` or a plain number.

    Raises:
        ConfigError: Not an amount of memory.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    stripped = text.strip().upper()
    number = stripped.rstrip("KMGTIB")
    try:
        return int(float(number) * units[stripped[len(number) :].strip() or ""])
    except (KeyError, ValueError):
        raise ConfigError(f"{text!r} is not an amount of memory.", "Write for example 24GB or 16GiB.") from None


def parse_schedule(text: str | None) -> Any:
    """A guidance schedule from its name or from one number per scale.

    Raises:
        ConfigError: Neither.
    """
    if text is None or text in ("linear", "constant", "cosine"):
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--cfg-schedule {text!r} is not known.", "Use linear, constant, cosine, or a comma list of numbers."
        ) from None


def parse_scale_range(text: str | None) -> tuple[int, int] | None:
    """First and last scale from `4-9`, or one scale from `9`.

    Raises:
        ConfigError: Not a range.
    """
    if text is None:
        return None
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise ConfigError(f"--cfg-scales {text!r} is not a range of scales.", "Write for example 4-9.") from None


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers from a comma list.

    Raises:
        ConfigError: Something between the commas is not a whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a comma list of whole numbers.") from None


def parse_size(text: str | None, option: str) -> PatchSize | None:
    """A size from `512` or `256x384`, height first.

    Raises:
        ConfigError: Neither.
    """
    if text is None:
        return None
    from mvar_core.pyramid import read_size

    try:
        return read_size(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}.") from None


def parse_sizes(text: str | None, option: str) -> list[PatchSize] | None:
    """The sizes of scales from a comma list of what `parse_size` takes.

    Raises:
        ConfigError: Something between the commas is not a size.
    """
    if text is None:
        return None
    from mvar_core.pyramid import read_sizes

    try:
        return read_sizes(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: {error}.") from None


def parse_windows(text: str | None) -> int | list[int] | str | None:
    """`--windows`: one number for all windowed scales, one per scale, or auto (auto:K) for where they pay.

    Raises:
        ConfigError: Not whole numbers.
    """
    if text is None or text.startswith("auto"):
        return text
    numbers = parse_numbers(text, "--windows")
    return numbers[0] if len(numbers) == 1 else numbers


def parse_prefixes(text: str | None) -> int | str | None:
    """`--scale-prefixes`: a number, or "all".

    Raises:
        ConfigError: Neither.
    """
    if text is None or text == "all":
        return text
    return parse_numbers(text, "--scale-prefixes")[0]


def interrupted(console: Console) -> typer.Exit:
    """What to raise after an interrupted run has been saved."""
    console.note("Interrupted; the run is saved. The same command goes on from here.")
    return typer.Exit(130)
